"""`dlkernels run` and `dlkernels predict`. Topics are found by name; adding one needs no edit here."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

import torch
import typer

import dlkernels
from dlkernels.experiments import DataError, Options, UsageError, topics, training
from dlkernels.experiments.report import Report, write_index

RUNS = Path("dlkernels-runs")
BACKENDS = ("native", "reference", "torch")

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,  # brackets in the help are brackets
    pretty_exceptions_enable=False,
    help="Experiments that teach deep learning from the inside.",
)


def main(argv: list[str]) -> int:
    """Run one command, such as ["run", "basic_classifiers", "--quick"]; returns the exit status.

    0: done. 1: a file is missing or corrupt. 2: the command line is wrong. 130: interrupted, the report is written.
    """
    try:
        return app(argv, prog_name="dlkernels", standalone_mode=False) or 0
    except (UsageError, DataError) as error:
        message, status = str(error), 2 if isinstance(error, UsageError) else 1
    except typer.Abort:
        message, status = "interrupted", 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's errors have it, whichever click they come from
            raise
        message, status = error.format_message(), 2
    print(f"dlkernels: {message}", file=sys.stderr)
    return status


@app.command("run")
def run_command(
    topic: Annotated[str, typer.Argument(help=f"One of {', '.join(topics())}; or all.")],
    quick: Annotated[bool, typer.Option("--quick", help="Under 25 seconds on two cores.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Under 5 seconds: proves that it runs.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for results. [default: ./dlkernels-runs/TOPIC]")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads to compute with.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    data: Annotated[str | None, typer.Option(help="mnist, fashion-mnist, cifar10, sst2 or a path.")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder with data, before DLKERNELS_DATA and downloads.")] = None,
    backend: Annotated[str, typer.Option(help="Who computes our layers: native, reference, torch.")] = "native",
) -> int:
    """Train, measure and draw one topic, or all."""
    if quick and smoke:
        raise UsageError("--quick and --smoke exclude each other")
    if backend not in BACKENDS:
        raise UsageError(f"--backend must be one of {', '.join(BACKENDS)}, got '{backend}'")
    if root is not None and not root.is_dir():
        raise UsageError(f"--root: there is no folder {root}")
    if topic == "all" and data is not None:
        raise UsageError("--data goes with one topic, not with all")
    chosen = topics() if topic == "all" else [_known(topic)]
    _check_device(device)
    if threads:
        torch.set_num_threads(threads)
    form = "smoke" if smoke else "quick" if quick else "full"
    with training.distributed(device) as device, dlkernels.backend(backend):
        for name in chosen:
            folder = out if out and topic != "all" else (out or RUNS) / name
            report = run_topic(Options(name, folder, form, seed, device, data, root, backend))
            if report.interrupted:
                return 130
        if topic == "all" or out is None:
            training.say(f"index:  {write_index(folder.parent)}")
    return 0


@app.command("predict")
def predict_command(
    topic: Annotated[str, typer.Argument(help="A topic whose network can be asked, such as basic_classifiers.")],
    what: Annotated[str, typer.Argument(help="The path of an image, or a sentence.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the run. [default: ./dlkernels-runs/TOPIC]")] = None,
) -> int:
    """Ask the model of the last run about one image or sentence."""
    module = _module(_known(topic))
    if not hasattr(module, "predict"):
        raise UsageError(f"topic {topic} has nothing to predict")
    module.predict(out or RUNS / topic, what)
    return 0


def run_topic(options: Options) -> Report:
    """Run one topic and write its report, also when it is interrupted."""
    module = _module(options.topic)
    title, _, text = inspect.cleandoc(module.__doc__ or "").partition("\n\n")
    report = Report(options, title.strip(), " ".join(text.partition("\n\n")[0].split()))
    training.say(f"{report.title} ({options.topic}, {options.form} form, seed {options.seed})")
    try:
        module.run(options, report)
    except KeyboardInterrupt:
        report.interrupted = True
    training.say(f"report: {report.write()}")
    return report


def _known(topic: str) -> str:
    if topic not in topics():
        raise UsageError(f"there is no topic '{topic}'; there are {', '.join(topics())}")
    return topic


def _module(topic: str) -> ModuleType:
    return importlib.import_module(f"dlkernels.experiments.{topic}")


def _check_device(device: str) -> None:
    """One sentence now instead of a long traceback later."""
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise UsageError(f"--device must be cpu, cuda or cuda:NUMBER, got '{device}'")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {device}: torch sees {torch.cuda.device_count()} CUDA devices")
