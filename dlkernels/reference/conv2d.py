"""Conv2d by definition: one shifted slice of the input for every tap of the kernel.

Letters: N batch; C, H, W input channels, rows, columns; K output channels; R, S kernel rows, columns; P, Q output
rows, columns; G groups. A tap is one position (r, s) of the kernel.
"""

import functools
from contextlib import nullcontext
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """Cross-correlates images with kernels, as `torch.nn.functional.conv2d` does.

    y[n, k, p, q] = bias[k] + sum_{c, r, s} x[n, c, p*stride + r*dilation, q*stride + s*dilation] * weight[k, c, r, s]
    where x is the input with zeros around it, and c runs over the C/G channels of the group that k belongs to.

    Args:
        input: (N, C, H, W) or (C, H, W), float64, float32, bfloat16 or float16.
        weight: (K, C/G, R, S), the input's dtype.
        bias: (K) or None, the input's dtype.
        stride, dilation: int or (rows, columns), at least 1.
        padding: zeros added around the input: int, (rows, columns), "valid" (none), "same" (P, Q = H, W; of an odd
            number the extra zero goes to the end), or all four sides (top, bottom, left, right).
        groups: G, divides C and K.

    Returns:
        (N, K, P, Q) or (K, P, Q), the input's dtype, with P = (H + top + bottom - dilation*(R-1) - 1) // stride + 1.
        bfloat16 and float16 are summed in float32 and rounded once.

    Raises:
        RuntimeError: shapes, dtypes or numbers that do not fit together.
        TypeError: a stride, padding, dilation or groups that is no int or sequence of ints.

    Source: Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", 2016, arXiv:1603.07285.

    Example:
        >>> x = torch.randn(1, 3, 8, 8)
        >>> w = torch.randn(6, 3, 3, 3)
        >>> conv2d(x, w, padding=1).shape
        torch.Size([1, 6, 8, 8])
    """
    if input.dim() == 3:
        return conv2d(input[None], weight, bias, stride, padding, dilation, groups)[0]
    geometry = _geometry(input, weight, bias, stride, padding, dilation, groups)
    with _autocast_off(input.device.type):
        x = _padded(input, geometry)  # (N, G, C/G, H + top + bottom, W + left + right)
        w = _split(weight, 0, groups)  # (G, K/G, C/G, R, S)
        y = _sum(  # (N, G, K/G, P, Q)
            torch.einsum("ngcpq,gkc->ngkpq", x[..., rows, columns], w[..., r, s])
            for r, s, rows, columns in _taps(weight, geometry)
        )
        y = y.flatten(1, 2)
        if bias is not None:
            y = y + bias.to(y.dtype)[:, None, None]
        return y.to(input.dtype)


# y[n,k,p,q] = b[k] + sum_{c,r,s} x[n,c, p*stride + r*dilation, q*stride + s*dilation] * w[k,c,r,s],  g = dL/dy.
# y is a sum over taps, so every gradient is one too. In tap (r, s) output pixel (p, q) reads exactly one pixel of the
# padded input, and reads the same slice x[rows, columns] that the forward takes. By the chain rule
#   dL/dx[n,c, rows, columns] += sum_k    g[n,k,p,q] * w[k,c,r,s]             back to where the pixels came from,
#   dL/dw[k,c,r,s]             = sum_{n,p,q} g[n,k,p,q] * x[n,c, rows, columns],
#   dL/db[k]                   = sum_{n,p,q} g[n,k,p,q],
# and the gradient of the input is the inner part of dL/dx: the zeros around it are constants.
def conv2d_backward(grad, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """Gradients of `conv2d` with respect to input, weight and bias, written out; differentiable itself.

    grad_input[rows, columns] += grad * weight[r, s];  grad_weight[r, s] = sum of grad * input[rows, columns];
    grad_bias = sum of grad, where rows and columns are what the tap (r, s) reads.

    Args:
        grad: (N, K, P, Q) or (K, P, Q), gradient of the output, the input's dtype.
        input, weight, bias, stride, padding, dilation, groups: as given to `conv2d`. Of bias only None or not matters.

    Returns:
        grad_input (N, C, H, W) or (C, H, W), grad_weight (K, C/G, R, S), grad_bias (K) or None; the input's dtype.

    Raises:
        RuntimeError, TypeError: as `conv2d`; RuntimeError also for a grad that has not the output's shape.

    Source: Dumoulin and Visin, 2016, arXiv:1603.07285, chapter 4; the derivation stands above this function.

    Example:
        >>> x, w = torch.randn(1, 3, 8, 8), torch.randn(6, 3, 3, 3)
        >>> grads = conv2d_backward(torch.ones(1, 6, 6, 6), x, w)
        >>> [None if g is None else tuple(g.shape) for g in grads]
        [(1, 3, 8, 8), (6, 3, 3, 3), None]
    """
    if input.dim() == 3:
        grad_input, *others = conv2d_backward(grad[None], input[None], weight, bias, stride, padding, dilation, groups)
        return grad_input[0], *others
    geometry = _geometry(input, weight, bias, stride, padding, dilation, groups)
    expected = (input.shape[0], weight.shape[0], geometry.P, geometry.Q)
    _require(tuple(grad.shape) == expected, f"expected grad of size {list(expected)}, but got {list(grad.shape)}")
    with _autocast_off(input.device.type):
        g = _split(grad, 1, groups)  # (N, G, K/G, P, Q)
        grad_input = _input_gradient(g, input, weight, geometry).to(input.dtype)
        grad_weight = _weight_gradient(g, input, weight, geometry).to(weight.dtype)
        grad_bias = None if bias is None else g.sum((0, 3, 4)).flatten().to(bias.dtype)
    return grad_input, grad_weight, grad_bias


def _input_gradient(g, input, weight, geometry):
    top, bottom, left, right = geometry.padding
    H, W = input.shape[2:]
    w = _split(weight, 0, geometry.groups)
    x_grad = _sum(  # (N, G, C/G, H + top + bottom, W + left + right)
        _put_back(torch.einsum("ngkpq,gkc->ngcpq", g, w[..., r, s]), rows, columns, H + top + bottom, W + left + right)
        for r, s, rows, columns in _taps(weight, geometry)
    )
    return x_grad.flatten(1, 2)[..., top : top + H, left : left + W]


def _weight_gradient(g, input, weight, geometry):
    x = _padded(input, geometry)
    taps = [  # a sum for each line of each image, then their sum: one long sum would round more
        torch.einsum("ngkpq,ngcpq->ngpkc", g, x[..., rows, columns]).sum((0, 2))
        for _, _, rows, columns in _taps(weight, geometry)
    ]
    return torch.stack(taps, -1).reshape(weight.shape)


def _put_back(part, rows, columns, height, width):
    """Zeros (..., height, width) with `part` (..., P, Q) at [rows, columns]: the adjoint of taking that slice."""
    lines = part.new_zeros(*part.shape[:-1], width).slice_scatter(
        part, -1, columns.start, columns.stop, columns.step
    )  # (..., P, width)
    return part.new_zeros(*part.shape[:-2], height, width).slice_scatter(lines, -2, rows.start, rows.stop, rows.step)


def _sum(parts) -> Tensor:
    return functools.reduce(torch.add, parts)


def _taps(weight, geometry):
    """For every tap (r, s): the rows and columns of the padded input that the P x Q outputs read."""
    (stride_h, stride_w), (dilation_h, dilation_w) = geometry.stride, geometry.dilation
    for r, s in product(range(weight.shape[2]), range(weight.shape[3])):
        top, left = r * dilation_h, s * dilation_w
        rows = slice(top, top + (geometry.P - 1) * stride_h + 1, stride_h)
        columns = slice(left, left + (geometry.Q - 1) * stride_w + 1, stride_w)
        yield r, s, rows, columns


def _autocast_off(device_type):
    """Sums stay in the dtype chosen here, inside an autocast region too. The meta device has no autocast."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


def _split(tensor: Tensor, dim, groups) -> Tensor:
    """`dim` as (groups, channels of a group), in the dtype that sums are made in: float64 stays, else float32."""
    tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
    return tensor.unflatten(dim, (groups, tensor.shape[dim] // groups))


def _padded(input, geometry):
    top, bottom, left, right = geometry.padding
    return F.pad(_split(input, 1, geometry.groups), (left, right, top, bottom))


class _Geometry(NamedTuple):
    stride: tuple  # rows, columns
    padding: tuple  # top, bottom, left, right
    dilation: tuple  # rows, columns
    groups: int | torch.SymInt
    P: int
    Q: int


def _geometry(input, weight, bias, stride, padding, dilation, groups) -> _Geometry:
    """Checks everything once and returns the arguments in full, with the size of the output."""
    stride, dilation = _ints("stride", stride), _ints("dilation", dilation)
    if not isinstance(groups, int | torch.SymInt):
        raise TypeError(f"groups must be an int, not {type(groups).__name__}")
    _require(min(stride) > 0, "non-positive stride is not supported")
    _require(min(dilation) > 0, "non-positive dilation is not supported")
    _require(groups > 0, "non-positive groups is not supported")
    _check_tensors(input, weight, bias, groups)
    R, S = weight.shape[2:]
    padding = _sides(padding, stride, dilation, R, S)
    _require(min(padding) >= 0, "negative padding is not supported")
    rows = input.shape[2] + padding[0] + padding[1] - dilation[0] * (R - 1)
    columns = input.shape[3] + padding[2] + padding[3] - dilation[1] * (S - 1)
    _require(rows > 0 and columns > 0, f"kernel of size ({R} x {S}) is larger than the padded input")
    return _Geometry(stride, padding, dilation, groups, (rows - 1) // stride[0] + 1, (columns - 1) // stride[1] + 1)


def _check_tensors(input, weight, bias, groups):
    _require(input.dim() == 4, f"expected input (N, C, H, W) or (C, H, W), but got size {list(input.shape)}")
    _require(weight.dim() == 4, f"expected weight (K, C/G, R, S), but got size {list(weight.shape)}")
    _require(weight.numel() > 0, f"expected weight to have elements, but got size {list(weight.shape)}")
    K, C = weight.shape[0], weight.shape[1] * groups
    _require(K % groups == 0, f"expected weight to be divisible by {groups} at dimension 0, but got {K}")
    _require(input.shape[1] == C, f"expected input to have {C} channels, but got {input.shape[1]} channels instead")
    _require(input.dtype in _DTYPES, f"expected input in float64, float32, bfloat16 or float16, not {input.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            _require(tensor.dtype == input.dtype, f"expected {name} of dtype {input.dtype}, but got {tensor.dtype}")
            _require(tensor.device == input.device, f"expected {name} on {input.device}, but it is on {tensor.device}")
    if bias is not None:
        _require(tuple(bias.shape) == (K,), f"expected bias of size [{K}], but got {list(bias.shape)}")


def _ints(name, value) -> tuple:
    """An int, or one or more ints, as (rows, columns) or more numbers."""
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    if not all(isinstance(v, int | torch.SymInt) for v in values):
        raise TypeError(f"{name} must be an int or a sequence of ints, not {value!r}")
    values = values * 2 if len(values) == 1 else values
    _require(len(values) == 2 or (name == "padding" and len(values) == 4), f"expected {name} (rows, columns): {value}")
    return values


def _sides(padding, stride, dilation, R, S) -> tuple:
    """Any form of padding as (top, bottom, left, right)."""
    if isinstance(padding, str):
        _require(padding in ("same", "valid"), f"Invalid padding string: '{padding}'")
        if padding == "valid":
            return (0, 0, 0, 0)
        _require(max(stride) == 1, "padding='same' is not supported for strided convolutions")
        reach = dilation[0] * (R - 1), dilation[1] * (S - 1)
        return (reach[0] // 2, reach[0] - reach[0] // 2, reach[1] // 2, reach[1] - reach[1] // 2)
    padding = _ints("padding", padding)
    return padding if len(padding) == 4 else (padding[0], padding[0], padding[1], padding[1])


def _require(condition, text):
    if not condition:
        raise RuntimeError(text)
