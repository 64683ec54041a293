"""Writes the speed tables of README.md from bench/results/*.tsv, between two HTML comments.

python tools/readme_tables.py            replaces what stands between the markers
python tools/readme_tables.py --check    changes nothing; exit status 1 when README.md is out of date
"""

import argparse
import math
import sys
from pathlib import Path

from dlkernels.bench.report import Record, read_summary, write_atomically

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
DIRECTIONS = ("forward", "forward+backward")
HEADER = (
    "| operator | shapes | variant | forward: mean (least) | forward+backward: mean (least) | slower than torch |",
    "|---|---|---|---:|---:|---:|",
)


def speed_tables(results: Path) -> str:
    """Markdown: for every machine and setting a sentence and one table of all operators that were measured there."""
    measured: dict[str, list[str]] = {}
    for path in sorted(results.glob("*.tsv")):
        machine, lines = read_summary(path)
        measured.setdefault(conditions(machine), []).extend(table_lines(machine["operator"], lines))
    texts = ["\n".join([f"{machine}\n", *HEADER, *lines]) for machine, lines in measured.items()]
    return "\n\n".join(texts) if texts else "Nothing has been measured yet."


def conditions(machine: dict[str, str]) -> str:
    """Where and how a table was measured."""
    return (
        f"Suite {machine['suite']}, {machine['dtype']}, float32 precision {machine['float32 precision']},"
        f" {machine['threads']} threads on {machine.get('gpu', machine['processor'])}"
        f" (instruction set: {machine['instruction set']}), torch {machine['torch']}, {machine['date']}:"
    )


def table_lines(operator: str, lines: list[Record]) -> list[str]:
    """A line for every list of shapes and variant: the geometric mean of torch's time over ours, and the least."""
    groups = {(group["list"], group["format"], group["direction"]): group for group in lines}
    texts = []
    for list_, variant in dict.fromkeys((key[0], key[1]) for key in groups):
        both = [groups[list_, variant, direction] for direction in DIRECTIONS if (list_, variant, direction) in groups]
        cells = {group["direction"]: f"{group['geomean']:.2f}x ({group['min']:.2f}x)" for group in both}
        cells |= {group["direction"]: "refused" for group in both if math.isnan(group["geomean"])}
        means = " | ".join(cells.get(direction, "") for direction in DIRECTIONS)
        slower, rows = sum(group["below_1"] for group in both), sum(group["rows"] for group in both)
        texts.append(f"| {operator} | {list_} | {variant} | {means} | {slower} of {rows} |")
    return texts


def replace(readme: str, tables: str) -> str:
    """The text with the tables between the markers; ValueError when these are not there once, in order."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README.md must have {BEGIN} once and {END} once after it")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{tables}\n{END}{rest.split(END)[1]}"


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description="Write README.md's speed tables from bench/results/.")
    parser.add_argument("--check", action="store_true", help="only say whether README.md is up to date")
    args = parser.parse_args(arguments)
    path = root / "README.md"
    old = path.read_text(encoding="utf-8")
    try:
        new = replace(old, speed_tables(root / "bench" / "results"))
    except ValueError as error:
        print(f"readme_tables: {error}", file=sys.stderr)
        return 2
    if args.check:
        if new != old:
            print("README.md's speed tables are out of date: run python tools/readme_tables.py", file=sys.stderr)
        return int(new != old)
    if new != old:
        write_atomically(path, new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
