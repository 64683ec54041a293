"""DropNorm by definition: one set of features is dropped for all rows, the others are normalised among themselves.

Letters: N rows (all leading dimensions of the input), M features (its trailing dimensions, together). K is the set of
kept features, |K| their number.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def drop_mask(keys, dropped):
    """The mask that drops the features with the smallest keys.

    keep[i] = (number of j with (keys[j], j) < (keys[i], i)) >= dropped: keys are compared first, then positions.

    Args:
        keys: any shape, M elements of any ordered dtype, random.
        dropped: how many to drop, 0..M.

    Returns:
        bool of keys' shape, True = kept, False exactly `dropped` times. With equally likely orders of the keys every
        set of that many features is equally likely.

    Raises:
        RuntimeError: `dropped` outside 0..M.

    Source: selection of the k smallest of n random keys, Knuth, "The Art of Computer Programming", volume 2, 3.4.2.

    Example:
        >>> drop_mask(torch.tensor([5, 1, 7, 1]), 2)
        tensor([ True, False,  True, False])
    """
    M = keys.numel()
    _require(0 <= dropped <= M, f"expected dropped to be between 0 and the {M} features, but got {dropped}")
    order = keys.flatten().sort(stable=True).indices  # (M), of equal keys the first first
    place = order.argsort()  # (M), where each feature stands in that order
    return (place >= dropped).view(keys.shape)


def drop_norm(input, keep=None, weight=None, bias=None, eps=1e-5, rescale=True):
    """Drops the same features of every row and normalises each row over the features that are kept.

    y[n, i] = s * (weight[i] * (x[n, i] - mu[n]) / sqrt(var[n] + eps) + bias[i])  for i in K,  y[n, i] = 0 otherwise,
    mu[n] = mean of x[n, i] over i in K,  var[n] = mean of (x[n, i] - mu[n])**2 over i in K,  s = M/|K| or 1.

    Args:
        input: (..., *shape), float64, float32, bfloat16 or float16. The trailing dimensions `shape` are the features,
            shape being keep's shape, else weight's, else bias's, else the last dimension.
        keep: (*shape) bool, True = kept, or None: all are kept, which is torch.nn.functional.layer_norm.
        weight, bias: (*shape) or None, the input's dtype; for 16-bit input also float32.
        eps: added to the variance, in the input's units squared.
        rescale: whether s = M/|K|, as dropout does, or s = 1.

    Returns:
        input's shape and dtype. bfloat16 and float16 are computed in float32 and rounded once. Without a single kept
        feature: zeros.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together.

    Source: Ba, Kiros and Hinton, "Layer normalization", 2016, arXiv:1607.06450; Srivastava et al., "Dropout", 2014.

    Example:
        >>> keep = torch.tensor([True, True, False, True])
        >>> drop_norm(torch.tensor([[1.0, 2.0, 9.0, 3.0]]), keep, rescale=False)
        tensor([[-1.2247,  0.0000,  0.0000,  1.2247]])
    """
    rows = _rows(input, keep, weight, bias, rescale)
    y, _ = _normalise(rows, input, eps)
    if weight is not None:
        y = y * rows.as_row(weight)
    if bias is not None:
        y = y + rows.as_row(bias)
    return rows.kept(y * rows.s).reshape(input.shape).to(input.dtype)


# With z = (x - mu) / sqrt(var + eps) and r = 1 / sqrt(var + eps), the output is y = s * (weight * z + bias) in K. Let
# g = s * dL/dy in K and 0 elsewhere (y is constant there), h = g * weight = dL/dz, and mean() over the features in K.
#   dL/dweight = sum over rows of g * z,     dL/dbias = sum over rows of g.
# x[j] reaches every z[i] of its row, once itself, once through mu and once through var:
#   dmu/dx[j] = 1/|K|,  dvar/dx[j] = 2 (x[j] - mu)/|K|,  dr/dvar = -r^3/2,  so
#   dz[i]/dx[j] = r * ((i = j) - 1/|K| - z[i] * z[j]/|K|),  and summed with h[i] over i in K:
#   dL/dx[j] = r * (h[j] - mean(h) - z[j] * mean(h * z)).
def drop_norm_backward(grad, input, keep=None, weight=None, bias=None, eps=1e-5, rescale=True):
    """Gradients of `drop_norm` with respect to its first four arguments, written out; differentiable itself.

    grad_input = r * (h - mean(h) - z * mean(h * z)), grad_weight = sum of g * z over rows, grad_bias = sum of g over
    rows, with z, r, g, h and mean as in the derivation above; all are 0 at dropped features.

    Args:
        grad: (..., *shape), gradient of the output, the input's dtype.
        input, keep, weight, bias, eps, rescale: as given to `drop_norm`. Of bias only its shape and dtype matter.

    Returns:
        grad_input (..., *shape); None, for keep; grad_weight (*shape) or None; grad_bias (*shape) or None; each in
        the dtype of what it belongs to.

    Raises:
        RuntimeError: as `drop_norm`, and for a grad that has not the output's shape.

    Source: Ba, Kiros and Hinton, 2016, arXiv:1607.06450; the derivation stands above this function.

    Example:
        >>> keep = torch.tensor([True, True, False, True])
        >>> grads = drop_norm_backward(torch.ones(2, 4), torch.randn(2, 4), keep, weight=torch.ones(4))
        >>> [None if g is None else tuple(g.shape) for g in grads]
        [(2, 4), None, (4,), None]
    """
    rows = _rows(input, keep, weight, bias, rescale)
    _require(grad.shape == input.shape, f"expected grad of size {list(input.shape)}, but got {list(grad.shape)}")
    z, r = _normalise(rows, input, eps)
    g = rows.kept(rows.as_rows(grad) * rows.s)  # (N, M)
    h = g if weight is None else rows.kept(g * rows.as_row(weight))
    grad_input = rows.kept(r * (h - rows.mean(h) - z * rows.mean(h * z)))
    grad_weight = None if weight is None else (g * z).sum(0).reshape(weight.shape).to(weight.dtype)
    grad_bias = None if bias is None else g.sum(0).reshape(bias.shape).to(bias.dtype)
    return grad_input.reshape(input.shape).to(input.dtype), None, grad_weight, grad_bias


class _Rows(NamedTuple):
    """How tensors become rows, and what K means for them."""

    N: int
    M: int
    dtype: torch.dtype  # that is computed in
    keep: Tensor | None  # (M)
    number: Tensor | int  # |K|, or 1 where K is empty
    s: Tensor | float

    def as_rows(self, tensor) -> Tensor:
        return tensor.to(self.dtype).reshape(self.N, self.M)

    def as_row(self, tensor) -> Tensor:
        return tensor.to(self.dtype).reshape(self.M)

    def kept(self, x) -> Tensor:
        """x (N, M) with 0 at dropped features, whatever was there."""
        return x if self.keep is None else x.where(self.keep, 0)

    def mean(self, x) -> Tensor:
        """(N, 1), the mean over K of an x (N, M) that is 0 elsewhere."""
        return x.sum(-1, keepdim=True) / self.number


def _rows(input, keep, weight, bias, rescale) -> _Rows:
    """Checks everything once, and counts."""
    shape = _normalized_shape(input, keep, weight, bias)
    M = math.prod(shape)
    N = math.prod(input.shape[: input.dim() - len(shape)])
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    if keep is None:
        return _Rows(N, M, dtype, None, max(M, 1), 1.0)
    number = keep.sum().clamp(min=1).to(dtype)
    return _Rows(N, M, dtype, keep.reshape(M), number, M / number if rescale else 1.0)


def _normalise(rows, input, eps) -> tuple:
    """z (N, M), 0 where dropped, and r = 1 / sqrt(var + eps) (N, 1)."""
    x = rows.kept(rows.as_rows(input))
    d = rows.kept(x - rows.mean(x))
    d = rows.kept(d - rows.mean(d))  # what the first mean was rounded by: a constant row is exactly 0 now
    # The square of 1e30 is no float32. In units of the largest difference all squares are at most 1, and rows with
    # differences below 1 keep 1 as their unit. The unit cancels in r, so it is a constant to autograd.
    unit = d.detach().abs().amax(-1, keepdim=True).clamp(min=1) if rows.M else d.new_ones(rows.N, 1)
    variance = rows.mean((d / unit).square()) + eps / unit / unit  # var + eps in units squared
    r = 1 / (unit * variance.sqrt())
    return rows.kept(d * r), r


def _normalized_shape(input, keep, weight, bias) -> tuple:
    """The dimensions of the features; everything else of the arguments must go with them."""
    _require(input.dtype in _DTYPES, f"expected input in float64, float32, bfloat16 or float16, not {input.dtype}")
    given = {name: x for name, x in (("keep", keep), ("weight", weight), ("bias", bias)) if x is not None}
    shape = next((tuple(x.shape) for x in given.values()), tuple(input.shape[-1:]))
    _require(input.dim() > 0, "expected input of at least one dimension, but got a number")
    _require(len(shape) > 0, f"expected {next(iter(given), 'input')} of at least one dimension, but got a number")
    if tuple(input.shape[-len(shape) :]) != shape:
        name = next(iter(given))
        raise RuntimeError(
            f"expected {name} to have the size of the last dimensions of input {list(input.shape)}, "
            f"but got {list(shape)}"
        )
    for name, x in given.items():
        _require(tuple(x.shape) == shape, f"expected {name} of size {list(shape)}, but got {list(x.shape)}")
        _require(x.device == input.device, f"expected {name} on {input.device}, but it is on {x.device}")
        allowed = (input.dtype, torch.float32) if input.dtype in _SIXTEEN_BITS else (input.dtype,)
        if name == "keep":
            allowed = (torch.bool,)
        wanted = " or ".join(str(dtype) for dtype in allowed)
        _require(x.dtype in allowed, f"expected {name} of dtype {wanted}, but got {x.dtype}")
    return shape


def _require(condition, text):
    if not condition:
        raise RuntimeError(text)
