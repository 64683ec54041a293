"""What becomes of measured rows: lines on the terminal, JSON, a small tab-separated table, a summary, a roofline."""

import json
import math
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from dlkernels.bench.harness import Row
from dlkernels.bench.machine import Roofs, dtype_name

DISTURBED_PERCENT = 10.0  # of the processors' time taken by others: then a row says little, however narrow its interval
SURELY_SLOW = 0.90  # a row is surely slower when its whole interval lies under this

Record = dict[str, Any]


# ---- records --------------------------------------------------------------------------------------


def record(row: Row, roofs: Roofs) -> Record:
    """A row in physical units; of a refused row only the reason."""
    case = row.case
    what: Record = {
        "list": case.list,
        "shape": case.name,
        "variant": case.variant,
        "direction": case.direction,
        "dtype": dtype_name(case.dtype),
    }
    if row.refused is not None:
        return what | {"reason": row.refused}
    limit, roof = roofs.seconds(case.flops, case.bytes, case.dtype)
    ours, theirs = row.ours.median, row.theirs.median
    per_step = {
        name: time / case.steps * 1e6 for name, time in zip(STEP_COLUMNS, (ours, theirs), strict=True) if case.steps
    }
    return (
        what
        | per_step
        | {
            "ours_ms": ours * 1e3,
            "ours_mad_ms": row.ours.mad * 1e3,
            "torch_ms": theirs * 1e3,
            "torch_mad_ms": row.theirs.mad * 1e3,
            "ratio": row.ratio,
            "ratio_low": row.low,
            "ratio_high": row.high,
            "repeats": float(row.repeats),
            "calls_per_repeat": float(row.batch),
            "ours_gflops": case.flops / ours * 1e-9,
            "torch_gflops": case.flops / theirs * 1e-9,
            "ours_gbs": case.bytes / ours * 1e-9,
            "roof_percent": limit / ours * 100,
            "roof": roof,
            "ours_error": row.error_ours,
            "torch_error": row.error_theirs,
            "others_percent": row.others * 100,
        }
    )


TABLE_ROWS = 100  # a table with more keeps its summary only
WORDS = (
    "list",
    "shape",
    "variant",
    "format",
    "direction",
    "dtype",
    "roof",
    "reason",
)  # the columns that are no numbers
COLUMNS = (
    *("list", "shape", "variant", "direction", "dtype"),
    *("ours_ms", "ours_mad_ms", "torch_ms", "torch_mad_ms", "ratio", "ratio_low", "ratio_high"),
    *("repeats", "calls_per_repeat", "ours_gflops", "torch_gflops", "ours_gbs", "roof_percent", "roof"),
    *("ours_error", "torch_error", "others_percent", "reason"),
)
STEP_COLUMNS = ("ours_us_per_step", "torch_us_per_step")  # of operators that go through time


def summarise(records: list[Record]) -> list[Record]:
    """One line per list, memory format and direction: rows, geometric mean and least ratio, how many below 1."""
    groups: dict[tuple, list[Record]] = {}
    for row in records:
        groups.setdefault((row["list"], f"{row['variant']}".split(",")[0], row["direction"]), []).append(row)
    lines = []
    for (list_, layout, direction), rows in groups.items():
        measured = [row for row in rows if not row.get("reason")]
        ratios = [row["ratio"] for row in measured]
        lines.append(
            {
                "list": list_,
                "format": layout,
                "direction": direction,
                "rows": len(measured),
                "geomean": statistics.geometric_mean(ratios) if ratios else math.nan,
                "min": min(ratios, default=math.nan),
                "below_1": sum(ratio < 1 for ratio in ratios),
                "surely_below_0.90": sum(row["ratio_high"] < SURELY_SLOW for row in measured),
                "refused": len(rows) - len(measured),
            }
        )
    return lines


# ---- terminal -------------------------------------------------------------------------------------

HEADER = (
    f"{'shape':30} {'variant':30} {'direction':9} {'ours ms':>14} {'torch ms':>14} {'torch/ours':>10} {'95 %':10}"
    f" {'GFLOP/s':>8} {'GB/s':>6} {'of roof':>10} {'error':>8} {'torch':>8}"
)


def line(row: Record) -> str:
    """A row for the terminal."""
    direction = "fwd" if row["direction"] == "forward" else "fwd+bwd"
    what = f"{row['shape']:30} {row['variant']:30} {direction:9}"
    if row.get("reason"):
        return f"{what} REFUSED, no time: {row['reason']}"
    ours, theirs = (
        f"{row['ours_ms']:.3g} ±{row['ours_mad_ms']:.1g}",
        f"{row['torch_ms']:.3g} ±{row['torch_mad_ms']:.1g}",
    )
    interval = f"{row['ratio_low']:.2f}..{row['ratio_high']:.2f}"
    roof = f"{row['roof_percent']:.0f} % {row['roof']}"
    return (
        f"{what} {ours:>14} {theirs:>14} {row['ratio']:>10.2f} {interval:10} {row['ours_gflops']:>8.1f}"
        f" {row['ours_gbs']:>6.1f} {roof:>10} {row['ours_error']:>8.1e} {row['torch_error']:>8.1e}"
        f"{_per_step(row)}{' disturbed' * disturbed(row)}"
    )


def _per_step(row: Record) -> str:
    return f" {row[STEP_COLUMNS[0]]:.3g} us/step" if STEP_COLUMNS[0] in row else ""


def disturbed(row: Record) -> bool:
    return row.get("others_percent", 0.0) > DISTURBED_PERCENT


def summary_text(records: list[Record]) -> str:
    """The summary for the terminal."""
    texts = [
        f"{'list':15} {'format':24} {'direction':17} {'rows':>4} {'geomean':>8} {'min':>6} {'below 1':>8}"
        f" {'surely below 0.90':>18} {'refused':>8}"
    ]
    for group in summarise(records):
        texts.append(
            f"{group['list']:15} {group['format']:24} {group['direction']:17} {group['rows']:>4}"
            f" {group['geomean']:>8.2f} {group['min']:>6.2f} {group['below_1']:>8}"
            f" {group['surely_below_0.90']:>18} {group['refused']:>8}"
        )
    return "\n".join(texts)


def roofs_text(roofs: Roofs) -> str:
    rates = ", ".join(f"{name} {rate * 1e-9:.0f} GFLOP/s" for name, rate in roofs.arithmetic.items())
    return f"{rates}, copy_ {roofs.copy * 1e-9:.1f} GB/s"


# ---- files ----------------------------------------------------------------------------------------


def write_atomically(path, data: str | bytes) -> None:
    """Writes beside the file and renames, so that the file is the old one or the new one, never half of it."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_json(
    path, machine: dict, roofs: Roofs, operators: dict[str, list[Record]], notes: dict | None = None
) -> None:
    """Everything: the machine, the roofs, every row, the summary and the notes of each operator."""
    content = {
        "machine": machine,
        "roofs": {
            "arithmetic_gflops": {name: rate * 1e-9 for name, rate in roofs.arithmetic.items()},
            "copy_gbs": roofs.copy * 1e-9,
        },
        "operators": {
            name: {"rows": rows, "summary": summarise(rows), "notes": (notes or {}).get(name, {})}
            for name, rows in operators.items()
        },
    }
    write_atomically(path, json.dumps(_without_nan(content), indent=1, ensure_ascii=False) + "\n")


def _without_nan(value):
    """NaN is no JSON."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_table(path, machine: dict, roofs: Roofs, records: list[Record]) -> None:
    """The small table for bench/results/: the machine in lines that start with #, then the rows, tab-separated.

    Of more than TABLE_ROWS rows it keeps the summary; everything is in the JSON.
    """
    lines = records if len(records) <= TABLE_ROWS else summarise(records)
    steps = STEP_COLUMNS if any(STEP_COLUMNS[0] in row for row in records) else ()
    columns = COLUMNS + steps if lines is records else tuple(lines[0])
    texts = [f"# {key}: {value}" for key, value in (machine | {"roofs": roofs_text(roofs)}).items()]
    texts.append("\t".join(columns))
    for row in lines:
        texts.append("\t".join(_cell(row.get(column)) for column in columns))
    write_atomically(path, "\n".join(texts) + "\n")


def _cell(value):
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"


def read_table(path) -> tuple[dict[str, str], list[Record]]:
    """The machine, and the rows or summary lines of a table."""
    machine: dict[str, str] = {}
    rows: list[list[str]] = []
    for text in Path(path).read_text(encoding="utf-8").splitlines():
        if text.startswith("# "):
            key, _, value = text[2:].partition(": ")
            machine[key] = value
        else:
            rows.append(text.split("\t"))
    header, *lines = rows
    return machine, [{key: _value(key, cell) for key, cell in zip(header, line, strict=True) if cell} for line in lines]


def _value(column, cell):
    if column in WORDS:
        return cell
    return int(cell) if cell.isdigit() else float(cell)


def read_summary(path) -> tuple[dict[str, str], list[Record]]:
    """The machine, and the summary of a table."""
    machine, rows = read_table(path)
    return machine, rows if rows and "geomean" in rows[0] else summarise(rows)


def draw_roofline(path, roofs: Roofs, records: list[Record], title: str) -> None:
    """FLOP/s over FLOP per byte: our dots, torch's, and the measured roofs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [row for row in records if not row.get("reason")]
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    for column, marker, colour, label in (
        ("torch_gflops", "s", "#d55e00", "torch.nn"),
        ("ours_gflops", "o", "#0072b2", "dlkernels"),
    ):
        # FLOP per byte = (FLOP/s) / (byte/s), both of ours: the case's own numbers.
        intensity = [row["ours_gflops"] / row["ours_gbs"] for row in measured]
        speeds = [row[column] for row in measured]
        axes.scatter(intensity, speeds, s=18, c=colour, marker=marker, alpha=0.7, label=label)
    dtypes = {row["dtype"] for row in measured}
    shown = [(name, rate) for name, rate in roofs.arithmetic.items() if "float64" not in name or "float64" in dtypes]
    for (name, rate), style in zip(shown, ("-", "--", ":"), strict=False):
        ridge = rate / roofs.copy  # the bandwidth's slope meets the ceiling here
        ends = [min(0.5, ridge / 4), ridge, max(500.0, ridge * 4)]
        under = [min(rate, roofs.copy * x) * 1e-9 for x in ends]
        axes.plot(ends, under, style, color="black", linewidth=1, label=f"copy_ and {name}")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP per byte (definition; every tensor once)",
        ylabel="GFLOP/s",
        title=title,
    )
    axes.grid(True, which="both", alpha=0.2)
    axes.legend()
    suffix = Path(path).suffix.lstrip(".") or "png"
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder) / f"figure.{suffix}"
        figure.savefig(drawn, dpi=120)
        write_atomically(path, drawn.read_bytes())
