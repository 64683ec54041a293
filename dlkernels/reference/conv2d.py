"""Conv2d and its transpose by definition: one shifted slice of the image for every tap of the kernel.

Letters: N batch; C, H, W input channels, rows, columns; K output channels; R, S kernel rows, columns; P, Q output
rows, columns; G groups. A tap is one position (r, s) of the kernel. conv_transpose2d turns a convolution around and
keeps its letters: input (N, K, P, Q), output (N, C, H, W).
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
        return _plus_bias(_collected(input, weight, geometry), bias).to(input.dtype)


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
        grad_input = _spread(grad, weight, geometry).to(input.dtype)
        grad_weight = _weight_gradient(grad, input, weight, geometry).to(weight.dtype)
        grad_bias = None if bias is None else _split(grad, 1, groups).sum((0, 3, 4)).flatten().to(bias.dtype)
    return grad_input, grad_weight, grad_bias


def conv_transpose2d(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """Lays a kernel onto the output for every input pixel, as `torch.nn.functional.conv_transpose2d` does.

    x[n, c, p*stride + r*dilation, q*stride + s*dilation] += weight[k, c, r, s] * y[n, k, p, q]
    for every k, r, s, p, q, where y is the input and k runs over the K/G channels of the group that c belongs to; the
    output is bias[c] + x[n, c] without its `padding` outermost rows and columns.

    Args:
        input: (N, K, P, Q) or (K, P, Q), float64, float32, bfloat16 or float16.
        weight: (K, C/G, R, S), the input's dtype.
        bias: (C) or None, the input's dtype.
        stride, dilation: int or (rows, columns), at least 1.
        padding: rows and columns taken away on each side of the output: int or (rows, columns).
        output_padding: rows and columns more at the end, below stride or dilation: int or (rows, columns).
        groups: G, divides C and K.

    Returns:
        (N, C, H, W) or (C, H, W), the input's dtype, with H = (P-1)*stride - 2*padding + dilation*(R-1)
        + output_padding + 1. bfloat16 and float16 are summed in float32 and rounded once.

    Raises:
        RuntimeError: shapes, dtypes or numbers that do not fit together.
        TypeError: a stride, padding, output_padding, dilation or groups that is no int or sequence of ints.

    Source: Dumoulin and Visin, 2016, arXiv:1603.07285, chapter 4.

    Example:
        >>> x, w = torch.randn(1, 6, 4, 4), torch.randn(6, 3, 4, 4)
        >>> conv_transpose2d(x, w, stride=2, padding=1).shape
        torch.Size([1, 3, 8, 8])
    """
    if input.dim() == 3:
        return conv_transpose2d(input[None], weight, bias, stride, padding, output_padding, groups, dilation)[0]
    geometry = _transposed_geometry(input, weight, bias, stride, padding, output_padding, groups, dilation)
    with _autocast_off(input.device.type):
        return _plus_bias(_spread(input, weight, geometry), bias).to(input.dtype)


# x = b + sum over taps of w[k,c,r,s] * y[n,k,p,q], put at x[rows, columns],  g = dL/dx.
# The forward is dL/dx of the convolution above, so its own gradients read the same slices the other way round: in tap
# (r, s) the input pixel (p, q) went to exactly one output pixel, g[rows, columns] holds what comes back from there, and
#   dL/dy[n,k,p,q]  = sum over taps and c of w[k,c,r,s] * g[n,c, rows, columns]          which is a convolution of g,
#   dL/dw[k,c,r,s] = sum_{n,p,q} y[n,k,p,q] * g[n,c, rows, columns]    the convolution's, y and g having changed places,
#   dL/db[c]       = sum_{n,h,w} g[n,c,h,w].
# Of the rows that padding took away nothing comes back: there g counts as zero.
def conv_transpose2d_backward(
    grad, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
):
    """Gradients of `conv_transpose2d` with respect to input, weight and bias, written out; differentiable itself.

    grad_input += weight[r, s] * grad[rows, columns];  grad_weight[r, s] = sum of input * grad[rows, columns];
    grad_bias = sum of grad, where rows and columns are what the tap (r, s) writes.

    Args:
        grad: (N, C, H, W) or (C, H, W), gradient of the output, the input's dtype.
        input, weight, bias, stride, padding, output_padding, groups, dilation: as given to `conv_transpose2d`. Of bias
            only None or not matters.

    Returns:
        grad_input (N, K, P, Q) or (K, P, Q), grad_weight (K, C/G, R, S), grad_bias (C) or None; the input's dtype.

    Raises:
        RuntimeError, TypeError: as `conv_transpose2d`; RuntimeError also for a grad that has not the output's shape.

    Source: Dumoulin and Visin, 2016, arXiv:1603.07285, chapter 4; the derivation stands above this function.

    Example:
        >>> x, w = torch.randn(1, 6, 4, 4), torch.randn(6, 3, 4, 4)
        >>> grads = conv_transpose2d_backward(torch.ones(1, 3, 8, 8), x, w, stride=2, padding=1)
        >>> [None if g is None else tuple(g.shape) for g in grads]
        [(1, 6, 4, 4), (6, 3, 4, 4), None]
    """
    numbers = stride, padding, output_padding, groups, dilation
    if input.dim() == 3:
        grad_input, *others = conv_transpose2d_backward(grad[None], input[None], weight, bias, *numbers)
        return grad_input[0], *others
    geometry = _transposed_geometry(input, weight, bias, *numbers)
    expected = (input.shape[0], weight.shape[1] * groups, geometry.H, geometry.W)
    _require(tuple(grad.shape) == expected, f"expected grad of size {list(expected)}, but got {list(grad.shape)}")
    with _autocast_off(input.device.type):
        grad_input = _collected(grad, weight, geometry).to(input.dtype)
        grad_weight = _weight_gradient(input, grad, weight, geometry).to(weight.dtype)
        grad_bias = None if bias is None else _split(grad, 1, groups).sum((0, 3, 4)).flatten().to(bias.dtype)
    return grad_input, grad_weight, grad_bias


# ---- the sums, of an image x (N, C, H, W), a kernel (K, C/G, R, S) and an image y (N, K, P, Q) -----------------------


def _collected(x, weight, geometry):
    """(N, K, P, Q), where every tap reads a slice of x with zeros around it."""
    x = _padded(x, geometry)  # (N, G, C/G, H + top + bottom, W + left + right)
    w = _split(weight, 0, geometry.groups)  # (G, K/G, C/G, R, S)
    y = _sum(  # (N, G, K/G, P, Q)
        torch.einsum("ngcpq,gkc->ngkpq", x[..., rows, columns], w[..., r, s])
        for r, s, rows, columns in _taps(weight, geometry)
    )
    return y.flatten(1, 2)


def _spread(y, weight, geometry):
    """(N, C, H, W), where every tap adds to a slice; what lands in the padding is lost."""
    top, bottom, left, right = geometry.padding
    H, W = geometry.H, geometry.W
    y, w = _split(y, 1, geometry.groups), _split(weight, 0, geometry.groups)
    x = _sum(  # (N, G, C/G, H + top + bottom, W + left + right)
        _put_back(torch.einsum("ngkpq,gkc->ngcpq", y, w[..., r, s]), rows, columns, H + top + bottom, W + left + right)
        for r, s, rows, columns in _taps(weight, geometry)
    )
    return x.flatten(1, 2)[..., top : top + H, left : left + W]


def _weight_gradient(y, x, weight, geometry):
    y, x = _split(y, 1, geometry.groups), _padded(x, geometry)
    taps = [  # a sum for each line of each image, then their sum: one long sum would round more
        torch.einsum("ngkpq,ngcpq->ngpkc", y, x[..., rows, columns]).sum((0, 2))
        for _, _, rows, columns in _taps(weight, geometry)
    ]
    return torch.stack(taps, -1).reshape(weight.shape)


def _plus_bias(image, bias):
    return image if bias is None else image + bias.to(image.dtype)[:, None, None]


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


def _padded(x, geometry):
    top, bottom, left, right = geometry.padding
    return F.pad(_split(x, 1, geometry.groups), (left, right, top, bottom))


# ---- checks and sizes ------------------------------------------------------------------------------------------------


class _Geometry(NamedTuple):
    stride: tuple  # rows, columns
    padding: tuple  # top, bottom, left, right
    dilation: tuple  # rows, columns
    groups: int | torch.SymInt
    H: int
    W: int
    P: int
    Q: int


def _geometry(input, weight, bias, stride, padding, dilation, groups) -> _Geometry:
    """Checks everything once and returns the arguments in full, with the size of the output."""
    stride, dilation = _checked_steps(stride, dilation, groups)
    K, C = _checked_channels(weight, groups)
    _check_tensors(input, C, weight, bias, K)
    (H, W), (R, S) = input.shape[2:], weight.shape[2:]
    padding = _sides(padding, stride, dilation, R, S)
    _require(min(padding) >= 0, "negative padding is not supported")
    rows = H + padding[0] + padding[1] - dilation[0] * (R - 1)
    columns = W + padding[2] + padding[3] - dilation[1] * (S - 1)
    _require(rows > 0 and columns > 0, f"kernel of size ({R} x {S}) is larger than the padded input")
    P, Q = (rows - 1) // stride[0] + 1, (columns - 1) // stride[1] + 1
    return _Geometry(stride, padding, dilation, groups, H, W, P, Q)


def _transposed_geometry(input, weight, bias, stride, padding, output_padding, groups, dilation) -> _Geometry:
    """That of the convolution which conv_transpose2d with these arguments turns around."""
    stride, dilation = _checked_steps(stride, dilation, groups)
    K, C = _checked_channels(weight, groups)
    _check_tensors(input, K, weight, bias, C)
    (P, Q), (R, S) = input.shape[2:], weight.shape[2:]
    _require(P > 0 and Q > 0, f"expected input with rows and columns, but got size {list(input.shape)}")
    padding, output_padding = _ints("padding", padding), _ints("output_padding", output_padding)
    _require(min(padding) >= 0, "negative padding is not supported")
    _require(min(output_padding) >= 0, "negative output_padding is not supported")
    for extra, step, apart in zip(output_padding, stride, dilation, strict=True):
        _require(extra < max(step, apart), f"output padding must be smaller than stride or dilation: {output_padding}")
    H = (P - 1) * stride[0] - 2 * padding[0] + dilation[0] * (R - 1) + output_padding[0] + 1
    W = (Q - 1) * stride[1] - 2 * padding[1] + dilation[1] * (S - 1) + output_padding[1] + 1
    _require(H > 0 and W > 0, f"padding {padding} takes away the whole output: its size would be ({H} x {W})")
    return _Geometry(stride, (padding[0], padding[0], padding[1], padding[1]), dilation, groups, H, W, P, Q)


def _checked_steps(stride, dilation, groups):
    stride, dilation = _ints("stride", stride), _ints("dilation", dilation)
    if not isinstance(groups, int | torch.SymInt):
        raise TypeError(f"groups must be an int, not {type(groups).__name__}")
    _require(min(stride) > 0, "non-positive stride is not supported")
    _require(min(dilation) > 0, "non-positive dilation is not supported")
    _require(groups > 0, "non-positive groups is not supported")
    return stride, dilation


def _checked_channels(weight, groups):
    """K and C."""
    _require(weight.dim() == 4, f"expected weight (K, C/G, R, S), but got size {list(weight.shape)}")
    _require(weight.numel() > 0, f"expected weight to have elements, but got size {list(weight.shape)}")
    K = weight.shape[0]
    _require(K % groups == 0, f"expected weight to be divisible by {groups} at dimension 0, but got {K}")
    return K, weight.shape[1] * groups


def _check_tensors(input, channels, weight, bias, output_channels):
    _require(input.dim() == 4, f"expected input with 4 or 3 dimensions, but got size {list(input.shape)}")
    got = input.shape[1]
    _require(got == channels, f"expected input to have {channels} channels, but got {got} channels instead")
    _require(input.dtype in _DTYPES, f"expected input in float64, float32, bfloat16 or float16, not {input.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            _require(tensor.dtype == input.dtype, f"expected {name} of dtype {input.dtype}, but got {tensor.dtype}")
            _require(tensor.device == input.device, f"expected {name} on {input.device}, but it is on {tensor.device}")
    if bias is not None:
        expected = [output_channels]
        _require(list(bias.shape) == expected, f"expected bias of size {expected}, but got {list(bias.shape)}")


def _ints(name, value, counts=(2,)) -> tuple:
    """An int, or one or more ints, as (rows, columns) or more numbers where `counts` allows for them."""
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    if not all(isinstance(v, int | torch.SymInt) for v in values):
        raise TypeError(f"{name} must be an int or a sequence of ints, not {value!r}")
    values = values * 2 if len(values) == 1 else values
    _require(len(values) in counts, f"expected {name} (rows, columns): {value}")
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
    padding = _ints("padding", padding, (2, 4))
    return padding if len(padding) == 4 else (padding[0], padding[0], padding[1], padding[1])


def _require(condition, text):
    if not condition:
        raise RuntimeError(text)
