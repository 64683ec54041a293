"""Measures conv_transpose2d and keeps the table in bench/results/.

    python bench/bench_conv_transpose2d.py [--suite quick] [--dtype float32] [--precision P] [--threads N]
                                           [--device cpu]

What ours and theirs are, and what they cost, is in dlkernels/bench/conv_transpose2d.py; `dlkernels bench
conv_transpose2d` prints the same without keeping it. Only a table that was measured on an otherwise idle machine is
worth keeping: see its line "others".
"""

import sys
from pathlib import Path

from dlkernels.bench import cli

if __name__ == "__main__":
    sys.exit(cli.keep_table("conv_transpose2d", Path(__file__).parent / "results"))
