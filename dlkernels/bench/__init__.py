"""Our layers measured against torch's: `dlkernels bench`, or `python -m dlkernels bench`.

harness.py times one case and refuses to give a time without parity; <operator>.py says how to make the two sides and
what they cost, and may add notes to the summary; shapes/<operator>.tsv lists the sizes; machine.py describes the
machine and measures its roofs; report.py writes tables, files and the roofline; cli.py puts them together.
"""
