"""The shape lists: one tab-separated file per operator, read here.

In a file, a cell with commas stands for each of its values, and the cells of a line multiply out. A column `X_cpu` or
`X_cuda` is the column X on that device, "-" for none; a column `device` keeps the whole line to one device.
"""

import itertools
from pathlib import Path

FOLDER = Path(__file__).parent


def operators() -> list[str]:
    """The operators that have a shape list."""
    return sorted(path.stem for path in FOLDER.glob("*.tsv"))


def lists(operator: str) -> list[str]:
    """The names of an operator's lists, in the order of the file."""
    return list(dict.fromkeys(line["list"] for line in _lines(operator)))


def select(operator: str, suite: str, device: str = "cpu") -> list[dict[str, str]]:
    """The lines of a suite, multiplied out: "quick" (the lines marked so, at that batch N or B), "all", or one list."""
    chosen = []
    for line in _lines(operator):
        if line.get("device", device) != device:
            continue
        quick = line.pop("quick", "-")
        line = {key.removesuffix(f"_{device}"): cell for key, cell in line.items() if not _elsewhere(key, device)}
        if suite == "quick":
            if quick == "-":
                continue
            line["N" if "N" in line else "B"] = quick
        elif suite not in ("all", line["list"]):
            continue
        # "source" is prose: its commas do not multiply.
        cells = [[cell] if key == "source" else cell.split(",") for key, cell in line.items()]
        chosen += [dict(zip(line, values, strict=True)) for values in itertools.product(*cells) if "-" not in values]
    return chosen


def _elsewhere(column, device):
    return any(column.endswith(f"_{other}") for other in ("cpu", "cuda") if other != device)


def _lines(operator):
    text = (FOLDER / f"{operator}.tsv").read_text(encoding="utf-8")
    header, *lines = [line.split("\t") for line in text.splitlines() if line and not line.startswith("#")]
    return [dict(zip(header, line, strict=True)) for line in lines]
