"""Linear layers whose groups of features share their weights: `split_linear` and `SplitLinear`.

Letters: N rows (all leading dimensions of the input), I and O features in and out, G = splits groups of I/G and O/G.
A composite of torch's linear, with no kernels of its own: a group is a row like any other.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference
from .._backend import current_backend
from ._dispatch import autocast_dtype, cast, from_reference

_ACTIVATIONS = {  # in place where the derivative is computed from the result, and the linear layer's own needs none
    "relu": torch.relu_,
    "tanh": torch.tanh_,
    "sigmoid": torch.sigmoid_,
    "gelu": F.gelu,
    "none": lambda y: y,
}

_reference_split_linear = from_reference(reference.split_linear, reference.split_linear_backward)
torch.fx.wrap("split_linear")  # symbolic tracing keeps our call in the graph, as it keeps one of F.linear


def split_linear(input, weight, bias=None, splits=2, activation="relu"):
    """Puts every group of features through one and the same linear layer and activation.

    output[..., g*O/G + o] = f(bias[o] + sum over i of weight[o, i] * input[..., g*I/G + i]) for the groups g = 0..G-1.

    Args:
        input: (..., I), any floating-point dtype; any strides. Contiguous input is not copied.
        weight: (O/G, I/G), input's dtype and device.
        bias: (O/G) or None.
        splits: G, the number of groups; divides I.
        activation: f, "relu", "tanh", "sigmoid", "gelu" or "none".

    Returns:
        (..., O), O being G times the rows of weight, in input's dtype. Saved for the backward: input, weight and the
        output (for "gelu" what goes into it, for "none" nothing more).

    Raises:
        ValueError: features that splits does not divide, splits below 1, an unknown activation.
        RuntimeError: what torch.nn.functional.linear raises for tensors that do not fit together.

    Source:
        This package's own. It is a Linear with a block-diagonal weight of G equal blocks: 1/G**2 of the parameters,
        1/G of the multiplications.

    Example:
        >>> x, weight = torch.randn(8, 64), torch.randn(16, 32)
        >>> dlkernels.split_linear(x, weight, splits=2).shape
        torch.Size([8, 32])
    """
    _check(splits, activation)
    if current_backend() == "reference":
        input, weight, bias = cast((input, weight, bias), autocast_dtype(input.device.type))
        return _reference_split_linear(input, weight, bias, splits, activation)
    *leading, features = input.shape
    size = _group_size("input", features, splits)
    if weight.dim() != 2 or weight.shape[1] != size:
        raise RuntimeError(
            f"split_linear: expected weight (out/splits, {size}) for {features} features in {splits} groups, "
            f"got {list(weight.shape)}"
        )
    y = F.linear(input.reshape(math.prod(leading) * splits, size), weight, bias)  # (N*G, O/G)
    return _ACTIVATIONS[activation](y).reshape(*leading, splits * weight.shape[0])


def _check(splits, activation):
    if not isinstance(splits, int | torch.SymInt) or isinstance(splits, bool):
        raise TypeError(f"split_linear: expected splits to be an int, got {type(splits).__name__}")
    if splits < 1:
        raise ValueError(f"split_linear: expected splits to be at least 1, got {splits}")
    if activation not in _ACTIVATIONS:
        names = ", ".join(map(repr, _ACTIVATIONS))
        raise ValueError(f"split_linear: expected activation to be one of {names}, got {activation!r}")


def _group_size(name, features, splits):
    if features % splits != 0:
        raise ValueError(f"split_linear: expected {name} to be a multiple of splits ({splits}), got {features}")
    return features // splits


class SplitLinear(nn.Module):
    """A linear layer that cuts its features into groups and uses one small weight for all of them.

    output = split_linear(input, self.weight, self.bias, splits, activation): (out_features / splits) *
    (in_features / splits) weights and out_features / splits biases. They start as nn.Linear(in_features / splits,
    out_features / splits)'s do, uniform within 1 / sqrt(in_features / splits).

    Args:
        in_features, out_features: I and O.
        splits: number of groups; divides both.
        bias: whether to add one.
        activation: "relu", "tanh", "sigmoid", "gelu" or "none".
        device, dtype: of the parameters.

    Shapes: input (..., in_features) -> output (..., out_features); see `dlkernels.split_linear`.

    Raises:
        ValueError: features that splits does not divide, splits below 1, an unknown activation.

    Example:
        >>> layer = dlkernels.SplitLinear(64, 32, splits=4)
        >>> layer(torch.randn(8, 64)).shape, sum(p.numel() for p in layer.parameters())
        (torch.Size([8, 32]), 136)
    """

    __constants__ = ("activation", "in_features", "out_features", "splits")

    def __init__(self, in_features, out_features, splits=2, bias=True, activation="relu", device=None, dtype=None):
        super().__init__()
        _check(splits, activation)
        self.in_features, self.out_features = in_features, out_features
        self.splits, self.activation = splits, activation
        size = (
            _group_size("out_features", out_features, splits),
            _group_size("in_features", in_features, splits),
        )
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(size[0], device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters anew, as nn.Linear does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight.shape[1]) if self.weight.shape[1] else 0
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        return split_linear(input, self.weight, self.bias, self.splits, self.activation)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, splits={self.splits}, "
            f"bias={self.bias is not None}, activation={self.activation!r}"
        )
