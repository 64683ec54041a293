"""Broadcasting by strides: one element is read many times, none is copied.

=================== ===================================================================================
name                what it answers
=================== ===================================================================================
is_broadcastable    do these shapes fit together?
broadcast_shapes    which shape do they make?
expand              a view of a tensor with other sizes; -1 keeps a size
expand_as           the same, sizes given by another tensor
broadcast_to        the same, sizes given as one tuple
broadcast_tensors   views of all tensors, of one common shape
=================== ===================================================================================

The two rules, for shapes that are aligned from the right:

1. A shape that is too short is continued with 1 on its left.
2. In every dimension, all sizes are equal, or some are 1. A size of 1 stretches to the other size, to 0 too.

And how a dimension stretches without a copy: element (i, j) lies at storage[offset + i * stride_0 + j * stride_1], so
a stride of 0 reads the same element for every index. Sizes and strides are computed here and handed to
``torch.as_strided``; nothing of torch's own broadcasting is used. Results, strides and errors are those of torch 2.13.

Because elements are shared, a result should not be written to: one write would show in many places.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from operator import index
from typing import Any

import torch
from torch import Tensor

from ._words import class_name

__all__ = ["broadcast_shapes", "broadcast_tensors", "broadcast_to", "expand", "expand_as", "is_broadcastable"]


# ------------------------------------------------------------------------------------------------------------- shapes


def is_broadcastable(*shapes: int | Sequence[int] | Tensor) -> bool:
    """Whether the shapes fit together: in every dimension, aligned from the right, all sizes but 1 are equal.

    Args:
        *shapes: any number of shapes (a number is a shape of one dimension), or of tensors.

    Returns:
        True where :func:`broadcast_shapes` has an answer, False where it raises an error for sizes that do not fit.

    Example:
        >>> is_broadcastable((5, 1, 3), (4, 1), (3,))
        True
        >>> is_broadcastable((2, 3), (3, 2))
        False
    """
    aligned = [_as_shape(shape.shape if isinstance(shape, Tensor) else shape)[::-1] for shape in shapes]
    columns = [{size for size in column if size != 1} for column in zip_longest(*aligned, fillvalue=1)]
    return all(len(sizes) <= 1 and min(sizes, default=0) >= 0 for sizes in columns)


def broadcast_shapes(*shapes: int | Sequence[int]) -> torch.Size:
    """The shape that all shapes broadcast to; the same as torch.broadcast_shapes.

    In dimension d, counted from the right: the one size that is not 1, or 1 where all are.

    Args:
        *shapes: any number of shapes; a number is a shape of one dimension.

    Returns:
        The common shape; () for no shapes.

    Raises:
        RuntimeError: two sizes differ and neither is 1, or something is not a shape.
        ValueError: a negative size.

    Example:
        >>> broadcast_shapes((5, 1, 3), (4, 1), (3,))
        torch.Size([5, 4, 3])
    """
    lists = [_as_shape(shape) for shape in shapes if shape is not None]
    common = [1] * max(map(len, lists), default=0)  # rule 1: all that is missing is 1
    for position, shape in enumerate(lists):
        for d in range(-1, -1 - len(shape), -1):  # from the right: -1, -2, ...
            if shape[d] == common[d]:
                continue
            if common[d] == 1 and shape[d] < 0:
                raise ValueError("Attempting to broadcast a dimension with negative length!")
            if common[d] == 1:  # rule 2: what was found so far stretches ...
                common[d] = shape[d]
            elif shape[d] != 1:  # ... or this one does, or they do not fit
                raise RuntimeError(
                    f"Attempting to broadcast a dimension of length {shape[d]} at {d}! Mismatching argument at index "
                    f"{position} had {shape}; but expected shape should be broadcastable to {common}"
                )
    return torch.Size(common)


def _as_shape(shape: Any) -> Sequence[int]:
    if isinstance(shape, int):
        return (shape,)
    if not isinstance(shape, Sequence):
        raise RuntimeError(f"Input shapes should be of type ints, a tuple of ints, or a list of ints, got {shape}")
    return shape


# -------------------------------------------------------------------------------------------------------- one tensor


def expand(a: Tensor, *sizes: Any) -> Tensor:
    """A view of `a` with the given sizes; the same as a.expand(*sizes).

    With d counted from the right, size_d and stride_d those of `a`:

    - d exists in `a`, and the new size is size_d or -1: nothing changes;
    - d exists, size_d = 1: the new size, with stride 0;
    - d is new, on the left: the new size, with stride 0.

    Args:
        a: (...) tensor, of any dtype, strides and device.
        *sizes: ints, or one tuple or list of them; at least as many as `a` has dimensions. -1 keeps the size.

    Returns:
        (sizes) view that shares `a`'s memory. Its gradient, summed over the dimensions that were stretched, is `a`'s:
        an element that was read five times has five times the influence.

    Raises:
        RuntimeError: a size differs and the old one is not 1; too few sizes; -1 for a new dimension.
        TypeError: not a tensor; sizes that are not whole numbers.

    Source:
        torch's inferExpandGeometry (aten/src/ATen/ExpandUtils.cpp).

    Example:
        >>> a = torch.tensor([[1], [2]])
        >>> expand(a, -1, 3).stride()
        (1, 0)
    """
    if not isinstance(a, Tensor):
        raise TypeError(f"expand(): argument 'a' (position 1) must be Tensor, not {class_name(a)}")
    if not sizes:
        raise TypeError('expand() missing 1 required positional arguments: "size"')
    if len(sizes) == 1 and not _is_int(sizes[0]):
        return _expand(a, _as_sizes("expand", 1, sizes[0]))
    if not _is_int(sizes[0]):
        raise TypeError(f"expand() takes 1 positional argument but {len(sizes)} were given")
    return _expand(a, _as_sizes("expand", 1, sizes))


def expand_as(a: Tensor, b: Tensor) -> Tensor:
    """A view of `a` with the sizes of `b`; the same as a.expand_as(b).

    Args:
        a: (...) tensor.
        b: (sizes) tensor; only its shape counts.

    Returns:
        (sizes) view that shares `a`'s memory.

    Raises:
        RuntimeError, TypeError: as :func:`expand`.

    Example:
        >>> expand_as(torch.tensor([[1], [2]]), torch.zeros(2, 3)).tolist()
        [[1, 1, 1], [2, 2, 2]]
    """
    if not isinstance(b, Tensor):
        raise TypeError(f"expand_as(): argument 'other' (position 1) must be Tensor, not {class_name(b)}")
    return expand(a, b.shape)


def broadcast_to(a: Tensor, size: Sequence[int]) -> Tensor:
    """A view of `a` with the given size; the same as torch.broadcast_to(a, size).

    Args:
        a: (...) tensor.
        size: tuple or list of ints, as in :func:`expand`.

    Returns:
        (size) view that shares `a`'s memory.

    Raises:
        RuntimeError, TypeError: as :func:`expand`.

    Example:
        >>> broadcast_to(torch.tensor([1, 2]), (3, 2)).stride()
        (0, 1)
    """
    if not isinstance(a, Tensor):
        raise TypeError(f"broadcast_to(): argument 'input' (position 1) must be Tensor, not {class_name(a)}")
    return _expand(a, _as_sizes("broadcast_to", 2, size))


def _expand(a: Tensor, target: list[int]) -> Tensor:
    """The sizes and strides of the view, from the right."""
    missing = len(target) - a.dim()
    if missing < 0:
        raise RuntimeError(
            f"expand({_type_name(a)}{{{list(a.shape)}}}, size={target}): the number of sizes provided ({len(target)}) "
            f"must be greater or equal to the number of dimensions in the tensor ({a.dim()})"
        )
    sizes, strides = list(target), [0] * len(target)
    for d in reversed(range(len(target))):
        if d >= missing:
            size, stride = a.shape[d - missing], a.stride(d - missing)
        else:
            size = 1
            stride = sizes[d + 1] * strides[d + 1] if a.dim() else 0  # of no use while the size is 1; torch's choice
        if target[d] == -1:
            if d < missing and a.dim():
                raise RuntimeError(
                    f"The expanded size of the tensor (-1) isn't allowed in a leading, non-existing dimension {d}"
                )
            sizes[d] = size if d >= missing else -1  # a tensor without dimensions: as_strided refuses the -1
        elif size != target[d]:
            if size != 1:
                raise RuntimeError(
                    f"The expanded size of the tensor ({target[d]}) must match the existing size ({size}) at "
                    f"non-singleton dimension {d}.  Target sizes: {target}.  Tensor sizes: {list(a.shape)}"
                )
            stride = 0  # this is broadcasting
        strides[d] = stride
    return torch.as_strided(a, sizes, strides, a.storage_offset())


# ------------------------------------------------------------------------------------------------------ many tensors


def broadcast_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Views of all tensors, of the shape that they have in common; the same as torch.broadcast_tensors.

    Args:
        *tensors: any number of tensors; dtypes and devices may differ.

    Returns:
        As many views, each sharing the memory of its tensor; a tensor that has the shape already is returned itself.

    Raises:
        RuntimeError: two sizes differ and neither is 1.
        TypeError: something is not a tensor.

    Example:
        >>> a, b = broadcast_tensors(torch.zeros(3, 1), torch.zeros(4))
        >>> a.shape, a.stride(), b.stride()
        (torch.Size([3, 4]), (1, 0), (0, 1))
    """
    for position, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"expected Tensor as element {position} in argument 0, but got {class_name(tensor)}")
    common: tuple[int, ...] = ()
    for tensor in tensors:
        common = _common(common, tensor.shape)
    return tuple(tensor if tensor.shape == common else _expand(tensor, list(common)) for tensor in tensors)


def _common(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    """The shape that two shapes make, from the right."""
    dimensions = max(len(a), len(b))
    common = [1] * dimensions
    for d in range(1, dimensions + 1):
        size_a = a[-d] if d <= len(a) else 1
        size_b = b[-d] if d <= len(b) else 1
        if size_a != size_b and size_a != 1 and size_b != 1:
            raise RuntimeError(
                f"The size of tensor a ({size_a}) must match the size of tensor b ({size_b}) at non-singleton "
                f"dimension {dimensions - d}"
            )
        common[-d] = size_b if size_a == 1 else size_a
    return tuple(common)


# ------------------------------------------------------------------------------------------- torch's words in errors


def _is_int(value: Any) -> bool:
    """Whether torch takes it for a size: an int, NumPy's ints, a whole-number tensor of one element; not a bool."""
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dim() > 0):
        return False
    try:
        index(value)
    except TypeError:
        return False
    return True


def _as_sizes(function: str, position: int, size: Any) -> list[int]:
    """The sizes as ints, or the TypeError of torch's argument parser."""
    if not isinstance(size, (tuple, list)):
        raise TypeError(
            f"{function}(): argument 'size' (position {position}) must be tuple of ints, not {class_name(size)}"
        )
    if size and not _is_int(size[0]):
        raise TypeError(
            f"{function}(): argument 'size' (position {position}) must be tuple of ints, but found element of type "
            f"{class_name(size[0])} at pos 0"
        )
    for place, value in enumerate(size, start=1):
        if not _is_int(value) and not isinstance(value, bool):
            raise TypeError(
                f"{function}(): argument 'size' failed to unpack the object at pos {place} with error "
                f'"type must be tuple of ints,but got {class_name(value)}"'
            )
        if not -(2**63) <= index(value) < 2**63:
            raise TypeError(
                f"{function}(): argument 'size' failed to unpack the object at pos {place} with error "
                '"Overflow when unpacking long long"'
            )
    return [index(value) for value in size]


_OLD_NAMES = ("Byte", "Char", "Short", "Int", "Long", "Half", "Float", "Double")


def _type_name(a: Tensor) -> str:
    """How torch's errors call a tensor's type: torch.FloatTensor, but CPUBoolType."""
    name = a.type().rpartition(".")[2].removesuffix("Tensor")
    if name in _OLD_NAMES and a.device.type in ("cpu", "cuda"):
        return a.type()
    device = a.device.type
    return f"{device.upper() if device in ('cpu', 'cuda') else device.capitalize()}{name}Type"
