"""The eight topics' experiments: train, measure, draw.

A topic is one module here with the same name as a module in :mod:`dlkernels.learn`. It offers

* ``run(options, report)``: train, measure, and fill the report;
* ``predict(folder, what)``, if there is something to predict: answer for one input with the last trained model;
* its docstring, whose first line is the title and whose second paragraph the question.

Nothing else has to be edited to add one: the command line finds topics by name. Shared by all: ``data`` (loading),
``training`` (the loop) and ``report`` (metrics, figures, pages).
"""

from __future__ import annotations

import contextlib
import os
import pkgutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dlkernels.learn

__all__ = ["DataError", "Options", "UsageError", "atomic_path", "topics"]


class UsageError(Exception):
    """The command line asks for something that does not exist: one sentence for the person who typed it."""


class DataError(Exception):
    """A file is missing, truncated or corrupt: names the file and says what to do."""


@dataclass(frozen=True)
class Options:
    """What the person chose on the command line.

    Attributes:
        topic: name of the experiment.
        out: folder for everything the run writes; created when the first file is.
        form: "full", "quick" (under 25 seconds on two cores) or "smoke" (under 5 seconds, proves that it runs).
        seed: of everything random.
        device: "cpu", "cuda" or "cuda:1".
        data: name of a data set or a path; None for the topic's embedded one.
        root: folder to look for data in, before DLKERNELS_DATA and before any download.
        backend: "native", "reference" or "torch": who computes the layers of dlkernels.
    """

    topic: str
    out: Path
    form: str = "full"
    seed: int = 0
    device: str = "cpu"
    data: str | None = None
    root: Path | None = None
    backend: str = "native"

    def pick(self, full: int, quick: int, smoke: int) -> int:
        """The number that belongs to the form of this run."""
        return {"full": full, "quick": quick, "smoke": smoke}[self.form]


def topics() -> list[str]:
    """Names of all experiments: the modules that exist both here and in dlkernels.learn."""
    blocks = {module.name for module in pkgutil.iter_modules(dlkernels.learn.__path__)}
    return sorted(blocks & {module.name for module in pkgutil.iter_modules(__path__)})


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Write a file wholly or not at all: yields a temporary path, which becomes `target` when the block succeeds.

    The folder is created. If the block fails, the temporary file is removed and an old `target` stays as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    """The permissions that new files must not have (mkstemp makes private ones)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
