"""Measures reset_gate_rnn and keeps the table in bench/results/.

    python bench/bench_reset_gate_rnn.py [--suite quick] [--dtype float32] [--precision P] [--threads N] [--device cpu]

What ours and theirs are, and what they cost, is in dlkernels/bench/reset_gate_rnn.py; `dlkernels bench reset_gate_rnn`
prints the same without keeping it. Only a table that was measured on an otherwise idle machine is worth keeping: see
its line "others".
"""

import sys
from pathlib import Path

from dlkernels.bench import cli

if __name__ == "__main__":
    sys.exit(cli.keep_table("reset_gate_rnn", Path(__file__).parent / "results"))
