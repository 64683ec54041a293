"""What a run leaves behind: metrics.json, the figures as PNG, and one report.html that needs nothing but itself.

A topic fills a :class:`Report` in the order in which a person should read it; the command line writes it, also when
the run was interrupted. Text and names go through Jinja2's autoescape: nothing that comes from data can become markup.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import torch
from cycler import cycler
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dlkernels.experiments import Options, atomic_path
from dlkernels.experiments.training import rank, world

__all__ = ["COLOURS", "Report", "figure", "interval", "write_index"]

# Okabe and Ito's palette: told apart by every kind of colour vision, and in print. Black is left for text and axes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")

_STYLE: Any = {
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10.5,
    "axes.edgecolor": "#5f6b76",
    "grid.color": "#e3e7eb",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 2,
    "font.size": 10.5,
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "figure.facecolor": "white",
}


@contextlib.contextmanager
def figure(width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure of this size in inches, in the house style, free of any display."""
    with mpl.rc_context(_STYLE):
        yield Figure(figsize=(width, height))


def interval(right: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share that was seen as `right` of `total` (Wilson's, good near 0 and 1 too)."""
    z = 1.96
    share = right / total
    centre = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return (centre - half) / (1 + z * z / total), (centre + half) / (1 + z * z / total)


@dataclass(frozen=True)
class _Text:
    kind = "text"
    paragraphs: tuple[str, ...]


@dataclass(frozen=True)
class _Table:
    kind = "table"
    caption: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class _Picture:
    kind = "figure"
    name: str
    png: bytes
    caption: str
    alternative: str

    @property
    def uri(self) -> str:
        """The image as a data URI."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


class Report:
    """The report of one run, filled in reading order.

    Args:
        options: of the run.
        title: of the topic.
        question: that the experiment answers.

    Attributes:
        metrics: what goes to metrics.json under "results": numbers, strings, lists and dicts of them.
        data_name: what the run used; shown with the conditions of the run.
        interrupted: the run was stopped early; the report says so.
    """

    def __init__(self, options: Options, title: str, question: str) -> None:
        self.options = options
        self.title = title
        self.question = question
        self.metrics: dict[str, Any] = {}
        self.data_name = ""
        self.interrupted = False
        self._headlines: list[tuple[str, str]] = []
        self._sections: list[tuple[str, list[Any]]] = []
        self._begin = time.perf_counter()

    def headline(self, value: str, label: str) -> None:
        """A figure for the top of the page: "98.9 %", "of unseen digits are read correctly"."""
        self._headlines.append((value, label))

    def section(self, heading: str, *paragraphs: str) -> None:
        """Begin a section; tables and figures that follow belong to it."""
        self._sections.append((heading, []))
        if paragraphs:
            self.text(*paragraphs)

    def text(self, *paragraphs: str) -> None:
        """Add paragraphs of plain text."""
        self._add(_Text(paragraphs))

    def table(self, caption: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a table. Cells are shown as str() gives them; the first column is left-aligned, the others right."""
        self._add(_Table(caption, tuple(columns), [tuple(str(cell) for cell in row) for row in rows]))

    def figure(self, name: str, drawn: Figure, caption: str, alternative: str) -> None:
        """Add a figure, saved as `name`.png. `caption` says what to look for, `alternative` what is to be seen."""
        buffer = io.BytesIO()
        FigureCanvasAgg(drawn).print_png(buffer, metadata={"Software": None})  # savefig would draw everything twice
        self._add(_Picture(name, buffer.getvalue(), caption, alternative))

    def write(self) -> Path:
        """Write everything (the first process only) and return the path of the page."""
        page = self.options.out / "report.html"
        if rank() == 0:
            pictures = [block for _, blocks in self._sections for block in blocks if block.kind == "figure"]
            for picture in pictures:
                _write(self.options.out / f"{picture.name}.png", picture.png)
            record = self._record([picture.name for picture in pictures])
            _write(self.options.out / "metrics.json", json.dumps(record, indent=1, allow_nan=False).encode())
            _write(page, self._html(record).encode())
        return page

    def _add(self, block: _Text | _Table | _Picture) -> None:
        self._sections[-1][1].append(block)

    def _record(self, figures: list[str]) -> dict[str, Any]:
        """What metrics.json holds."""
        options = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self.options).items()}
        return {
            "topic": self.options.topic,
            "title": self.title,
            "question": self.question,
            "options": options,
            "data": self.data_name,
            "interrupted": self.interrupted,
            "seconds": round(time.perf_counter() - self._begin, 2),
            "finished": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "machine": _machine(self.options.device),
            "headlines": [{"value": value, "label": label} for value, label in self._headlines],
            "figures": [f"{name}.png" for name in figures],
            "results": _finite(self.metrics),
        }

    def _html(self, record: dict[str, Any]) -> str:
        return _template("report_template.html").render(
            record=record, sections=self._sections, conditions=self._conditions(record), command=self._command()
        )

    def _conditions(self, record: dict[str, Any]) -> list[tuple[str, str]]:
        machine = record["machine"]
        return [
            ("data", self.data_name),
            ("form", self.options.form),
            ("seed", str(self.options.seed)),
            ("layers of dlkernels", self.options.backend),
            ("device", f"{machine['device']}; threads: {machine['threads']}; processes: {machine['processes']}"),
            ("software", f"torch {machine['torch']}, Python {machine['python']}"),
            ("finished", f"{record['finished']}, after {record['seconds']:.1f} s"),
        ]

    def _command(self) -> str:
        """The command that makes this run again."""
        options = self.options
        words = ["dlkernels", "run", options.topic, *([] if options.form == "full" else [f"--{options.form}"])]
        words += ["--seed", str(options.seed)]
        words += [] if options.data is None else ["--data", options.data]
        words += [] if options.device == "cpu" else ["--device", options.device]
        words += [] if options.backend == "native" else ["--backend", options.backend]
        return " ".join(words)


def write_index(folder: Path) -> Path:
    """Write `folder`/index.html: one card for every run in a folder below, with its headline and first figure."""
    cards = []
    for path in sorted(folder.glob("*/metrics.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not a run's: no card
            record = json.loads(path.read_text())
            picture = path.parent / record["figures"][0] if record["figures"] else None
            card = {key: record[key] for key in ("title", "question", "headlines", "finished", "interrupted")}
            card["link"] = f"{path.parent.name}/report.html"
            card["uri"] = _Picture("", picture.read_bytes(), "", "").uri if picture else None
            cards.append(card)
    page = folder / "index.html"
    if rank() == 0:
        _write(page, _template("index_template.html").render(cards=cards).encode())
    return page


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _write(path: Path, content: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _machine(device: str) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else f"CPU ({platform.machine()})",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": world(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
