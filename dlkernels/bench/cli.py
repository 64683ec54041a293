"""`dlkernels bench OP|all`: arguments, checks before a long run, the run, and its files."""

import argparse
import importlib
import importlib.util
import sys
import time
from pathlib import Path

import torch

from dlkernels.bench import harness, machine, report, shapes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
BUDGET_S = {"quick": 50.0, "all": 1150.0}  # for each operator, its last row not included; a list takes what it needs


class UsageError(Exception):
    """A wrong argument, in one sentence."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Measure our layers against torch's: parity first, then time, in physical units."
    parser.add_argument("operator", metavar="OP", help=f"{', '.join(operators())} or all")
    parser.add_argument(
        "--suite", default="quick", help="quick (under a minute an operator), all (under 20), or a list's name"
    )
    parser.add_argument("--dtype", default="float32", help=", ".join(DTYPES))
    parser.add_argument("--precision", help="of float32: highest, high or medium, for both sides")
    parser.add_argument("--threads", type=int, help="as torch.set_num_threads, for both sides")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", metavar="FILE", help="write every figure there")
    parser.add_argument("--table", metavar="FILE", help="write a small tab-separated table there (one operator)")
    parser.add_argument("--figure", metavar="FILE", help="draw a roofline there (one operator; needs matplotlib)")


def keep_table(operator: str, results: Path) -> int:
    """What bench/bench_<operator>.py does: a run with this process' arguments whose table stays in the folder."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args([operator, *sys.argv[1:]])
    precision = args.precision or torch.get_float32_matmul_precision()
    words = [operator, args.suite, args.dtype, *[precision] * (precision != "highest")]
    words += [args.device] * (args.device != "cpu")
    args.table = args.table or results / f"{'_'.join(words)}.tsv"
    return run(args)


def operators() -> list[str]:
    """The operators that can be measured: a shape list and a module dlkernels/bench/<operator>.py."""
    return [name for name in shapes.operators() if importlib.util.find_spec(f"dlkernels.bench.{name}")]


def run(args: argparse.Namespace) -> int:
    """Measures and prints. Returns 0, 1 when a row was refused, 2 for a wrong argument, 130 when interrupted."""
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        names = check(args)
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        if args.precision is not None:
            torch.set_float32_matmul_precision(args.precision)
        return _measure(names, args)
    except UsageError as error:
        print(f"dlkernels bench: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])


def check(args: argparse.Namespace) -> list[str]:
    """The operators to measure; raises UsageError for anything that would stop the run later."""
    known = operators()
    names = known if args.operator == "all" else [args.operator]
    _one_of("operator", args.operator, [*known, "all"])
    for name in names:
        suites = ["quick", "all", *shapes.lists(name)]
        if args.operator != "all" or not any(args.suite in shapes.lists(other) for other in known):
            _one_of("suite", args.suite, suites)
    names = [name for name in names if args.suite in ("quick", "all", *shapes.lists(name))]
    _one_of("dtype", args.dtype, DTYPES)
    _one_of("device", args.device, ["cpu", "cuda"])
    if args.precision is not None:
        _one_of("precision", args.precision, harness.PRECISION_BOUND)
    if args.threads is not None and args.threads < 1:
        raise UsageError(f"--threads must be at least 1, not {args.threads}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda, but torch sees no CUDA device here")
    for option in ("json", "table", "figure"):
        path = getattr(args, option, None)
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise UsageError(f"--{option} {path}: there is no folder {Path(path).absolute().parent}")
        if path is not None and option != "json" and len(names) > 1:
            raise UsageError(f"--{option} takes one operator at a time, not all")
    if getattr(args, "figure", None) and not importlib.util.find_spec("matplotlib"):
        raise UsageError("--figure needs matplotlib: pip install matplotlib")
    return names


def _one_of(what, given, known):
    if given not in known:
        raise UsageError(f"unknown {what} {given!r}; there is {', '.join(known)}")


def _measure(names, args):
    start, watch, dtype = time.monotonic(), machine.Watch(), DTYPES[args.dtype]
    facts = machine.describe(args.device) | {"suite": args.suite, "device": args.device, "dtype": args.dtype}
    roofs = machine.measure_roofs(dtype, args.device)
    for key, value in (facts | {"roofs": report.roofs_text(roofs)}).items():
        print(f"{key + ':':18} {value}")
    clock, interrupted, left_out = harness.make_clock(args.device), False, 0
    done: dict[str, list[report.Record]] = {}
    notes: dict[str, dict[str, str]] = {}
    for name in names:
        operator_start, records = time.monotonic(), list[report.Record]()
        done[name], module = records, importlib.import_module(f"dlkernels.bench.{name}")
        cases = module.cases(args.suite, args.device, dtype)
        print(f"\n{name}: {len(cases)} rows\n{report.HEADER}", flush=True)
        try:
            for position, case in enumerate(cases):
                if time.monotonic() - operator_start > BUDGET_S.get(args.suite, float("inf")):
                    left_out += len(cases) - position
                    break
                if not records or records[-1]["list"] != case.list:
                    print(f"-- {case.list}")
                records.append(report.record(harness.measure(case, clock), roofs))
                print(report.line(records[-1]), flush=True)
        except KeyboardInterrupt:
            interrupted = True
        print(f"\n{report.summary_text(records)}", flush=True)
        notes[name] = module.notes(records) if hasattr(module, "notes") else {}
        for key, value in notes[name].items():
            print(f"{key}: {value}", flush=True)
        if interrupted:
            print("interrupted: the rows above are complete, the others were not measured")
            break
    if left_out:
        print(f"{left_out} rows were not measured: the time of suite {args.suite} was over")
    facts |= {"rows not measured": f"{left_out}"} if left_out else {}
    others, disturbed = watch.others(), sum(report.disturbed(row) for rows in done.values() for row in rows)
    facts["others"] = f"{others * 100:.1f} % of the processors' time, {disturbed} rows disturbed"
    print(f"other processes took {facts['others']}")
    if disturbed:
        print("a disturbed row says little, however narrow its interval: measure on an idle machine")
    _write(args, facts, roofs, done, notes)
    print(f"{time.monotonic() - start:.0f} s", flush=True)
    return 130 if interrupted else int(any(row.get("reason") for rows in done.values() for row in rows))


def _write(args, facts, roofs, done, notes):
    if args.json:
        report.write_json(args.json, facts, roofs, done, notes)
    for name, records in done.items():
        if getattr(args, "table", None):
            report.write_table(args.table, facts | {"operator": name} | notes.get(name, {}), roofs, records)
        if getattr(args, "figure", None):
            title = f"{name}, {args.dtype}, {args.device}, threads: {facts['threads']}"
            report.draw_roofline(args.figure, roofs, records, title)
