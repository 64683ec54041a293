"""SplitLinear by definition: the features are cut into groups, and every group goes through the same small Linear.

Letters: N rows (all leading dimensions of the input), I and O features in and out, G = splits groups of I/G and O/G.
"""

import math
from contextlib import nullcontext

import torch
from torch import Tensor

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def split_linear(input, weight, bias=None, splits=2, activation="relu"):
    """Puts every group of features through one and the same Linear and activation.

    y[n, g*O/G + o] = f(bias[o] + sum_i x[n, g*I/G + i] * weight[o, i]) for the groups g = 0..G-1.

    Args:
        input: (..., I), float64, float32, bfloat16 or float16.
        weight: (O/G, I/G), the input's dtype.
        bias: (O/G) or None, the input's dtype.
        splits: G, divides I.
        activation: f, "relu", "tanh", "sigmoid", "gelu" or "none".

    Returns:
        (..., O), the input's dtype. bfloat16 and float16 are computed in float32 and rounded once.

    Raises:
        ValueError: an I that `splits` does not divide, splits below 1, an unknown activation.
        RuntimeError: shapes, dtypes or devices that do not fit together.

    Source: this package's own; a grouped 1x1 convolution whose groups share their weights.

    Example:
        >>> split_linear(torch.tensor([1.0, 2.0, 3.0, -4.0]), torch.tensor([[1.0, 1.0]]), splits=2)
        tensor([3., 0.])
    """
    _check(input, weight, bias, splits, activation)
    with _autocast_off(input.device.type):
        outputs = [_ACTIVATIONS[activation](z) for z in _before_activation(input, weight, bias, splits)]
        return torch.cat(outputs, -1).reshape(*input.shape[:-1], weight.shape[0] * splits).to(input.dtype)


# In group g: z = x W' + b and y = f(z), x (N, I/G) and y (N, O/G) being its features. With u = dL/dz = dL/dy * f'(z),
#   dL/dx = u W,     dL/dW = u' x,     dL/db = sum of u over rows,
# as in any Linear. x belongs to one group, so its gradients stand side by side; W and b work in every group, so theirs
# are sums over the groups.
def split_linear_backward(grad, input, weight, bias=None, splits=2, activation="relu"):
    """Gradients of `split_linear` with respect to input, weight and bias, written out; differentiable itself.

    With u = grad * f'(z) in each group: grad_input = u W, side by side; grad_weight = sum over groups of u' x;
    grad_bias = sum over groups and rows of u.

    Args:
        grad: (..., O), gradient of the output, the input's dtype.
        input, weight, bias, splits, activation: as given to `split_linear`.

    Returns:
        grad_input (..., I), grad_weight (O/G, I/G), grad_bias (O/G) or None; the input's dtype.

    Raises:
        ValueError, RuntimeError: as `split_linear`; RuntimeError also for a grad that has not the output's shape.

    Source: the derivation above this function.

    Example:
        >>> grads = split_linear_backward(torch.ones(3, 6), torch.randn(3, 4), torch.randn(3, 2))
        >>> [None if g is None else tuple(g.shape) for g in grads]
        [(3, 4), (3, 2), None]
    """
    _check(input, weight, bias, splits, activation)
    expected = [*input.shape[:-1], weight.shape[0] * splits]
    _require(list(grad.shape) == expected, f"expected grad of size {expected}, but got {list(grad.shape)}")
    with _autocast_off(input.device.type):
        slopes = [_SLOPES[activation](z) for z in _before_activation(input, weight, bias, splits)]
        u = [g * slope for g, slope in zip(_groups(grad, splits), slopes, strict=True)]  # splits times (N, O/G)
        grad_input = torch.cat([group @ _wide(weight) for group in u], -1).reshape(input.shape)
        grad_weight = sum(group.T @ x for group, x in zip(u, _groups(input, splits), strict=True))
        grad_bias = None if bias is None else sum(group.sum(0) for group in u)
    grads = grad_input.to(input.dtype), grad_weight.to(weight.dtype)
    return *grads, None if grad_bias is None else grad_bias.to(bias.dtype)


def _gelu(z):
    return z * _normal_cdf(z)


def _normal_cdf(z):
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def _tanh_slope(z):
    return 1 - z.tanh().square()


def _sigmoid_slope(z):
    return z.sigmoid() * (-z).sigmoid()


def _gelu_slope(z):
    return _normal_cdf(z) + z * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)


_ACTIVATIONS = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": _gelu,
    "none": lambda z: z,
}
_SLOPES = {
    "relu": lambda z: (z > 0).to(z.dtype),
    "tanh": _tanh_slope,
    "sigmoid": _sigmoid_slope,
    "gelu": _gelu_slope,
    "none": torch.ones_like,
}


def _before_activation(input, weight, bias, splits) -> list:
    """For every group z = x W' + b: splits times (N, O/G)."""
    shift = 0 if bias is None else _wide(bias)
    return [x @ _wide(weight).T + shift for x in _groups(input, splits)]


def _groups(tensor, splits) -> tuple:
    """The features of every group, as rows: splits times (N, features / splits)."""
    rows = math.prod(tensor.shape[:-1])
    size = tensor.shape[-1] // splits
    return tuple(_wide(tensor).narrow(-1, g * size, size).reshape(rows, size) for g in range(splits))


def _wide(tensor) -> Tensor:
    """In the dtype that sums are made in: float64 stays, else float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _autocast_off(device_type):
    """Sums stay in the dtype chosen here, inside an autocast region too. The meta device has no autocast."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


def _check(input, weight, bias, splits, activation):
    if activation not in _ACTIVATIONS:
        names = ", ".join(map(repr, _ACTIVATIONS))
        raise ValueError(f"expected activation to be one of {names}, but got {activation!r}")
    if splits < 1:
        raise ValueError(f"expected splits of at least 1, but got {splits}")
    _require(input.dtype in _DTYPES, f"expected input in float64, float32, bfloat16 or float16, not {input.dtype}")
    _require(input.dim() > 0, "expected input of at least one dimension, but got a number")
    if input.shape[-1] % splits != 0:
        raise ValueError(f"expected input with a multiple of splits ({splits}) features, but got {input.shape[-1]}")
    size = input.shape[-1] // splits
    _require(
        weight.dim() == 2 and weight.shape[1] == size,
        f"expected weight of size [out/splits, {size}], but got {list(weight.shape)}",
    )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            _require(tensor.dtype == input.dtype, f"expected {name} of dtype {input.dtype}, but got {tensor.dtype}")
            _require(tensor.device == input.device, f"expected {name} on {input.device}, but it is on {tensor.device}")
    if bias is not None:
        expected = [weight.shape[0]]
        _require(list(bias.shape) == expected, f"expected bias of size {expected}, but got {list(bias.shape)}")


def _require(condition, text):
    if not condition:
        raise RuntimeError(text)
