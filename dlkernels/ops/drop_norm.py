"""Dropout and normalisation in one: `drop_mask`, `drop_norm` and `DropNorm`.

One mask is drawn per call and shared by all rows; statistics are those of the kept features. Letters: N rows, M
features. The kernels are csrc/cpu/drop_norm.cpp and csrc/cuda/drop_norm, their contract csrc/drop_norm.h.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from .. import reference
from .._backend import current_backend
from ._dispatch import (
    autocast_dtype,
    cast,
    check_devices,
    differentiable,
    explain,
    from_reference,
    register_autocast,
    register_vmap_by_loop,
)

_select = torch.ops.dlkernels.drop_mask.default
_forward = torch.ops.dlkernels.drop_norm.default
_backward = torch.ops.dlkernels.drop_norm_backward.default


# ---- derivatives: input, keep and weight are saved, a row's mean and variance taken from it again ------------


class DropNormFunction(Function):
    """output (..., M) = drop_norm(input (..., M), keep (M), weight (M), bias (M))."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input, keep, weight, bias, normalized_shape, eps, rescale):
        return _forward(input, keep, weight, bias, normalized_shape, eps, rescale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, keep, weight, _, *ctx.settings = inputs
        ctx.save_for_backward(input, keep, weight)

    @staticmethod
    def backward(ctx, grad):
        needs = ctx.needs_input_grad
        mask = (needs[0], needs[2], needs[3])
        grad_input, grad_weight, grad_bias = _drop_norm_backward(grad, *ctx.saved_tensors, *ctx.settings, mask)
        return (grad_input, None, grad_weight, grad_bias, None, None, None)


class DropNormBackwardFunction(Function):
    """grad_input, grad_weight, grad_bias = drop_norm_backward(grad (..., M), input (..., M), keep (M), weight (M)).

    Its derivative is that of the reference's backward.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(grad, input, keep, weight, normalized_shape, eps, rescale, output_mask):
        return _backward(grad, input, keep, weight, normalized_shape, eps, rescale, output_mask)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.normalized_shape, ctx.eps, ctx.rescale, ctx.output_mask = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        grad, input, keep, weight = ctx.saved_tensors
        mask, eps, rescale = ctx.output_mask, ctx.eps, ctx.rescale
        everywhere = input.new_ones(ctx.normalized_shape, dtype=torch.bool) if keep is None else keep

        def wanted_gradients(grad, input, *weight_if_any):
            weight = weight_if_any[0] if weight_if_any else None
            bias = torch.zeros_like(everywhere, dtype=input.dtype if weight is None else weight.dtype)
            scale = torch.ones_like(bias) if weight is None else weight
            grads = reference.drop_norm_backward(grad, input, everywhere, scale, bias, eps, rescale)
            return tuple(x for x, wanted in zip((grads[0], *grads[2:]), mask, strict=True) if wanted)

        primals = (grad, input) if weight is None else (grad, input, weight)
        pull_back = torch.func.vjp(wanted_gradients, *primals)[1]
        results = pull_back(tuple(x for x, wanted in zip(cotangents, mask, strict=True) if wanted))
        to_weight = results[2] if weight is not None else None
        return (results[0], results[1], None, to_weight, None, None, None, None)


_drop_norm = differentiable(DropNormFunction, _forward)
_drop_norm_backward = differentiable(DropNormBackwardFunction, _backward)
_reference_drop_norm = from_reference(reference.drop_norm, reference.drop_norm_backward)
register_autocast(_forward, torch.float32, ["cuda"])  # as layer_norm: on CUDA in float32, on the CPU as it comes


# ---- shapes without data, and batches of calls ---------------------------------------------------------


@torch.library.register_fake("dlkernels::drop_mask")
def _drop_mask_fake(keys, dropped):
    return torch.empty_like(keys, dtype=torch.bool)


@torch.library.register_fake("dlkernels::drop_norm")
def _drop_norm_fake(input, keep, weight, bias, normalized_shape, eps, rescale):
    check_devices("drop_norm", input, keep=keep, weight=weight, bias=bias)
    return torch.empty(input.shape, dtype=input.dtype, device=input.device)


@torch.library.register_fake("dlkernels::drop_norm_backward")
def _drop_norm_backward_fake(grad, input, keep, weight, normalized_shape, eps, rescale, output_mask):
    parameter = input if weight is None else weight
    return (
        torch.empty(input.shape, dtype=input.dtype, device=input.device) if output_mask[0] else None,
        torch.empty(normalized_shape, dtype=parameter.dtype, device=input.device) if output_mask[1] else None,
        torch.empty(normalized_shape, dtype=parameter.dtype, device=input.device) if output_mask[2] else None,
    )


for _op in (_select, _forward, _backward):
    register_vmap_by_loop(_op)


# ---- functions and module --------------------------------------------------------------------------------


def drop_mask(normalized_shape, p=0.5, *, generator=None, device=None):
    """Draws which features to keep: exactly int(p * M) of the M are dropped, every choice equally likely.

    Every feature gets a random 31-bit key; the features with the smallest keys are dropped, in O(M).

    Args:
        normalized_shape: int or ints, shape of the features; M is their product.
        p: the part to drop, in [0, 1).
        generator: torch.Generator to draw from; None: torch's own, which torch.manual_seed sets.
        device: of the mask; the CPU and CUDA draw differently.

    Returns:
        (normalized_shape) bool, True where the feature is kept.

    Raises:
        ValueError: p outside [0, 1).

    Source:
        Floyd and Rivest, Expected time bounds for selection, 1975.

    Example:
        >>> keep = dlkernels.drop_mask(8, p=0.25)
        >>> int(keep.sum())
        6
    """
    _check_p(p)
    shape = _as_shape(normalized_shape)
    features = math.prod(shape)
    keep = _select(_random_keys(features, generator, device), int(p * features))
    return keep if len(shape) == 1 else keep.view(shape)


def _random_keys(features, generator, device) -> Tensor:
    """(features) int32, uniform in [0, 2^31): the same numbers in every way but vmap's."""
    if torch.compiler.is_compiling():  # Dynamo takes the out-of-place form only, which is slow in eager code
        return torch.ops.aten.random(torch.empty(features, dtype=torch.int32, device=device), generator=generator)
    if torch._C._are_functorch_transforms_active():  # vmap knows randomness modes for randint only
        return torch.randint(2**31 - 1, (features,), generator=generator, dtype=torch.int32, device=device)
    return torch.empty(features, dtype=torch.int32, device=device).random_(generator=generator)


def drop_norm(input, keep=None, weight=None, bias=None, eps=1e-5, rescale=True):
    """Normalises every row over its kept features, and drops the others.

    With K the kept features, mu and var the mean and the (biased) variance of x over K:
    y_i = s * (weight_i * (x_i - mu) / sqrt(var + eps) + bias_i) for i in K and 0 otherwise; s = M/|K| when `rescale`,
    else 1. With keep=None it is layer normalisation.

    Args:
        input: (..., M) float64, float32, bfloat16 or float16. The trailing dimensions that keep, else weight, else bias
            has are the features (none of them given: the last one); all before are rows.
        keep: (M) bool, True where a feature counts, shared by all rows; or None.
        weight, bias: (M) or None, input's dtype, or float32 beside 16-bit input.
        eps: added to the variance.
        rescale: multiply by M/|K|, so that sums over features are expected to be the same with and without dropping.

    Returns:
        (..., M), input's dtype, contiguous. Sums are made in float32 (float64 for float64). No kept feature: zeros.
        Saved for the backward: input, keep and weight.

    Raises:
        RuntimeError, ValueError: shapes, dtypes or devices that do not fit; where torch.nn.functional.layer_norm
            refuses the same call, its error.

    Source:
        Srivastava et al., Dropout, 2014; Ba et al., Layer normalization, 2016, arXiv:1607.06450.

    Example:
        >>> x = torch.randn(32, 512)
        >>> y = dlkernels.drop_norm(x, dlkernels.drop_mask(512, p=0.5))
        >>> int((y[0] != 0).sum())
        256
    """
    for name, x in (("input", input), ("keep", keep), ("weight", weight), ("bias", bias)):
        if not isinstance(x, Tensor) and (x is not None or name == "input"):
            raise TypeError(f"drop_norm: {name} must be a tensor, got {type(x).__name__}")
    like = next((x for x in (keep, weight, bias) if x is not None), None)
    shape = tuple(input.shape[-1:] if like is None else like.shape)
    return _over_features(shape, input, keep, weight, bias, eps, rescale)


def _over_features(shape, input, keep, weight, bias, eps, rescale):
    """drop_norm with the features' shape given."""
    run = _BACKENDS[current_backend()]
    if input.is_cuda and autocast_dtype("cuda") is not None:
        input, weight, bias = cast((input, weight, bias), torch.float32)
    if torch.compiler.is_compiling():
        return run(input, keep, weight, bias, shape, eps, rescale)
    try:
        return run(input, keep, weight, bias, shape, eps, rescale)
    except (RuntimeError, TypeError, ValueError) as error:
        problem = explain(error, "drop_norm", (input, keep, weight, bias), lambda: _check_shape(input, shape))
    raise problem from None


def _check_shape(input, shape):
    """LayerNorm's own error where input does not end with `shape`."""
    F.layer_norm(torch.empty(input.shape, device="meta"), shape)


def _by_definition(input, keep, weight, bias, shape, eps, rescale):
    if keep is None and len(shape) > 1:  # or the reference would take the last dimension for the features
        keep = input.new_ones(shape, dtype=torch.bool)
    return _reference_drop_norm(input, keep, weight, bias, eps, rescale)


def _with_stock_operators(input, keep, weight, bias, shape, eps, rescale):
    """gather the kept features, F.layer_norm, scatter: the fastest composition of torch's own operators."""
    if keep is None:
        return F.layer_norm(input, shape, weight, bias, eps)
    _check_shape(input, shape)
    x = input.flatten(input.dim() - len(shape))
    index = keep.flatten().nonzero().squeeze(1)
    kept = x.index_select(-1, index)
    weight, bias = (None if t is None else t.flatten()[index] for t in (weight, bias))
    if index.numel() == 0:  # nothing to normalise; the graph stays, for zero gradients
        y = sum((t for t in (weight, bias) if t is not None), start=kept)
    else:
        y = F.layer_norm(kept, index.shape, weight, bias, eps) * (keep.numel() / index.numel() if rescale else 1.0)
    return torch.zeros_like(x).scatter(-1, index.expand_as(y), y).view(input.shape)


torch.fx.wrap("drop_mask")  # symbolic tracing keeps our calls in the graph, as it keeps one of F.layer_norm
torch.fx.wrap("drop_norm")
torch.fx.wrap("_over_features")

_BACKENDS = {"native": _drop_norm, "reference": _by_definition, "torch": _with_stock_operators}


def _as_shape(normalized_shape) -> tuple:
    return (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)


def _check_p(p):
    if not 0 <= p < 1:
        raise ValueError(f"p must lie in [0, 1), got {p}")


class DropNorm(nn.Module):
    """Layer normalisation that drops features while training: one mask per call, shared by all rows.

    Training: output = drop_norm(input, drop_mask(normalized_shape, p), weight, bias, eps, rescale).
    Evaluation, or p = 0: exactly torch.nn.LayerNorm.

    Args:
        normalized_shape: int or ints, the trailing dimensions of the input.
        p: the part of the features that is dropped, in [0, 1).
        eps: added to the variance.
        elementwise_affine: whether to learn `weight` (starts at 1) and `bias` (starts at 0).
        bias: whether to learn `bias`.
        rescale: multiply the kept features by M/|K|, as nn.Dropout does.

    Shapes: input (..., normalized_shape) -> output of the same shape.

    Raises:
        ValueError: p outside [0, 1).

    Example:
        >>> layer = dlkernels.DropNorm(512, p=0.5)
        >>> layer(torch.randn(32, 512)).shape
        torch.Size([32, 512])
    """

    __constants__ = ("elementwise_affine", "eps", "normalized_shape", "p", "rescale")

    def __init__(
        self,
        normalized_shape,
        p=0.5,
        *,
        eps=1e-5,
        elementwise_affine=True,
        bias=True,
        rescale=True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        _check_p(p)
        self.normalized_shape = _as_shape(normalized_shape)
        self.p, self.eps, self.elementwise_affine, self.rescale = p, eps, elementwise_affine, rescale
        for name, wanted in (("weight", elementwise_affine), ("bias", elementwise_affine and bias)):
            value = nn.Parameter(torch.empty(self.normalized_shape, device=device, dtype=dtype)) if wanted else None
            self.register_parameter(name, value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """weight to 1, bias to 0."""
        if isinstance(self.weight, Tensor):
            nn.init.ones_(self.weight)
        if isinstance(self.bias, Tensor):
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        keep = None
        if self.training and self.p > 0:
            keep = drop_mask(self.normalized_shape, self.p, device=input.device)
        return _over_features(self.normalized_shape, input, keep, self.weight, self.bias, self.eps, self.rescale)

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, p={self.p}, eps={self.eps}, elementwise_affine={self.elementwise_affine}, "
            f"bias={self.bias is not None}, rescale={self.rescale}"
        )
