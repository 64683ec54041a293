"""The command line: `dlkernels`, or `python -m dlkernels`.

`info`, `check` and `bench` need only the core of the package; `run` and `predict` need the extra `experiments` and are
declared in dlkernels/experiments/cli.py.
"""

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Runs one command; the process's exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("run", "predict"):
        return _experiments(argv)

    parser = argparse.ArgumentParser(prog="dlkernels", description="Kernels for PyTorch, measured and explained.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("info", help="what was built, what this machine has, what is in use")
    commands.add_parser("check", help="compare every operator with torch's, forward and backward, on this machine")
    bench = commands.add_parser("bench", help="time an operator side by side with torch.nn")
    commands.add_parser("run", help="train, measure and draw one of the topics", add_help=False)
    commands.add_parser("predict", help="ask the last trained network", add_help=False)

    from .bench import cli as bench_cli

    bench_cli.add_arguments(bench)
    args = parser.parse_args(argv)
    if args.command == "bench":
        return bench_cli.run(args)
    if args.command == "check":
        from ._check import check_all

        return 1 if check_all() else 0
    from ._info import info

    print(info())
    return 0


def _experiments(argv: list[str]) -> int:
    try:
        from .experiments import cli
    except ImportError as error:
        print(
            f"dlkernels {argv[0]} needs the experiments' libraries ({error}): pip install 'dlkernels[experiments]'",
            file=sys.stderr,
        )
        return 1
    return cli.main(argv)
