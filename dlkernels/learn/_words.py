"""Words that torch's argument parser uses in its errors."""

from typing import Any


def class_name(value: Any) -> str:
    """How torch's errors call a value's class: Tensor, list, but numpy.ndarray (classes written in C have a module)."""
    kind = type(value)
    written_in_c = not kind.__flags__ & 1 << 9  # Py_TPFLAGS_HEAPTYPE
    return f"{kind.__module__}.{kind.__name__}" if written_in_c and kind.__module__ != "builtins" else kind.__name__
