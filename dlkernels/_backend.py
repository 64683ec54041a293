"""Which implementation the public functions use: a default of the process, and an override of the thread."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

BACKENDS = ("native", "reference", "torch")

_default = "native"


class _Override(threading.local):
    name: str | None = None  # on the class: a thread that has set none finds it as fast as its own


_override = _Override()


def current_backend() -> str:
    """The backend that a call on this thread uses now."""
    return _override.name or _default


def set_backend(name: str) -> None:
    """Sets the process's default backend.

    Args:
        name: "native" (the kernels, the default), "reference" (plain PyTorch, by definition, forward and backward) or
            "torch" (the fastest composition of stock torch operators).

    Raises:
        ValueError: another name.

    Example:
        >>> dlkernels.set_backend("reference")
        >>> dlkernels.Conv2d(3, 8, 3)(torch.randn(1, 3, 8, 8)).shape
        torch.Size([1, 8, 6, 6])
        >>> dlkernels.set_backend("native")
    """
    global _default
    _default = _checked(name)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Uses the named backend on this thread inside a `with` block; blocks nest.

    Args:
        name: as for `set_backend`.

    Raises:
        ValueError: another name.

    Example:
        >>> with dlkernels.backend("torch"):
        ...     y = dlkernels.conv2d(x, w)
    """
    previous = _override.name
    _override.name = _checked(name)
    try:
        yield
    finally:
        _override.name = previous


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name
