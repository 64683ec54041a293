"""Measures conv2d and keeps the table in bench/results/.

    python bench/bench_conv2d.py [--suite quick] [--dtype float32] [--precision highest] [--threads N] [--device cpu]

What ours and theirs are, and what they cost, is in dlkernels/bench/conv2d.py; `dlkernels bench conv2d` prints the same
without keeping it. Only a table that was measured on an otherwise idle machine is worth keeping: see its line
"others".
"""

import argparse
import sys
from pathlib import Path

import torch

from dlkernels.bench import cli

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    args = parser.parse_args(["conv2d", *sys.argv[1:]])
    precision = args.precision or torch.get_float32_matmul_precision()
    words = [
        "conv2d",
        args.suite,
        args.dtype,
        *[precision] * (precision != "highest"),
        *[args.device] * (args.device != "cpu"),
    ]
    stem = "_".join(words)
    args.table = args.table or RESULTS / f"{stem}.tsv"
    return cli.run(args)


if __name__ == "__main__":
    sys.exit(main())
