"""Measures split_linear and keeps the table in bench/results/.

    python bench/bench_split_linear.py [--suite quick] [--dtype float32] [--precision P] [--threads N] [--device cpu]

What ours and theirs are, and what they cost, is in dlkernels/bench/split_linear.py; `dlkernels bench split_linear`
prints the same without keeping it. Only a table that was measured on an otherwise idle machine is worth keeping: see
its line "others".
"""

import sys
from pathlib import Path

from dlkernels.bench import cli

if __name__ == "__main__":
    sys.exit(cli.keep_table("split_linear", Path(__file__).parent / "results"))
