"""Convolution of images and the way back: `conv2d` and `conv_transpose2d`, and the modules that are torch.nn's on them.

Letters: N images, C H W input channels, height, width; K output channels, R S kernel height, width; P Q output height,
width; G groups. conv_transpose2d keeps the letters of the convolution whose direction it turns around: it takes
(N, K, P, Q) and returns (N, C, H, W). The kernels are csrc/cpu/conv2d and csrc/cuda/conv2d, their contract
csrc/conv2d.h.
"""

from collections.abc import Callable
from typing import Any

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
)

# ---- derivatives: input and weight are saved for the backward ----------------------------------------


def _with_derivatives(name, forward_op, backward_op):
    """`forward_op` and `backward_op` as functions that have derivatives of any order; `name` is what grad_fn shows.

    This holds for conv2d and for conv_transpose2d. With A * B for the operator, all that its backward returns are
    derivatives of one sum, S(grad, input, weight) = <grad, input * weight>, which is linear in each of its arguments:
        grad_input = dS/dinput,   grad_weight = dS/dweight.
    For cotangents u of grad_input, v of grad_weight and b of grad_bias, the scalar to differentiate again is
        <u, grad_input> + <v, grad_weight> + <b, grad_bias> = <grad, u * weight> + <grad, input * v> + <grad, b>,
    so that its gradients are the operator and its backward once more, to any order:
        to grad:  u * weight + input * v + b      to input:  grad_input with v for weight
                                                  to weight: grad_weight with u for input
    """

    class Forward(Function):
        """output = input * weight + bias."""

        generate_vmap_rule = True

        @staticmethod
        def forward(input, weight, bias, *geometry):
            return forward_op(input, weight, bias, *geometry)

        @staticmethod
        def setup_context(ctx, inputs, output):
            input, weight, _, *ctx.geometry = inputs
            ctx.save_for_backward(input, weight)

        @staticmethod
        def backward(ctx, grad):
            input, weight = ctx.saved_tensors
            grads = conv_backward(grad, input, weight, *ctx.geometry, ctx.needs_input_grad[:3])
            return (*grads, *(None for _ in ctx.geometry))

    class Backward(Function):
        """grad_input, grad_weight, grad_bias; those that output_mask leaves out are None."""

        generate_vmap_rule = True

        @staticmethod
        def forward(grad, input, weight, *geometry_and_mask):
            return backward_op(grad, input, weight, *geometry_and_mask)

        @staticmethod
        def setup_context(ctx, inputs, output):
            grad, input, weight, *ctx.geometry, _ = inputs
            ctx.save_for_backward(grad, input, weight)
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx, u, v, b):
            grad, input, weight = ctx.saved_tensors
            needs_grad, needs_input, needs_weight = ctx.needs_input_grad[:3]
            to_grad = to_input = to_weight = None
            if needs_grad:
                terms = [] if u is None else [conv(u, weight, None, *ctx.geometry)]
                terms += [] if v is None else [conv(input, v, None, *ctx.geometry)]
                terms += [] if b is None else [b[:, None, None].expand_as(grad)]
                to_grad = sum(terms[1:], start=terms[0]) if terms else None
            if needs_input and v is not None:
                to_input = conv_backward(grad, input, v, *ctx.geometry, (True, False, False))[0]
            if needs_weight and u is not None:
                to_weight = conv_backward(grad, u, weight, *ctx.geometry, (False, True, False))[1]
            return (to_grad, to_input, to_weight, *(None for _ in ctx.geometry), None)

    Forward.__name__, Backward.__name__ = f"{name}Function", f"{name}BackwardFunction"
    conv, conv_backward = differentiable(Forward, forward_op), differentiable(Backward, backward_op)
    return conv, conv_backward


_OPS = torch.ops.dlkernels
_OPERATORS = (  # each with its backward
    (_OPS.conv2d.default, _OPS.conv2d_backward.default),
    (_OPS.conv_transpose2d.default, _OPS.conv_transpose2d_backward.default),
)
_conv2d, _ = _with_derivatives("Conv2d", *_OPERATORS[0])
_conv_transpose2d, _ = _with_derivatives("ConvTranspose2d", *_OPERATORS[1])
_reference_conv2d = from_reference(reference.conv2d, reference.conv2d_backward)
_reference_conv_transpose2d = from_reference(reference.conv_transpose2d, reference.conv_transpose2d_backward)
for _forward, _ in _OPERATORS:
    register_autocast(_forward)


# ---- shapes without data (torch.compile, torch.export, meta tensors) and batches of calls (vmap) ------


@torch.library.register_fake("dlkernels::conv2d")
def _conv2d_fake(input, weight, bias, stride, padding, dilation, groups):
    check_devices("conv2d", input, weight=weight, bias=bias)
    torch._check(
        input.size(1) == weight.size(1) * groups,
        lambda: f"conv2d: input must have {weight.size(1) * groups} channels, got {list(input.shape)}",
    )
    size = [input.size(0), weight.size(0)]
    for i in range(2):
        room = input.size(2 + i) + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (weight.size(2 + i) - 1) - 1
        size.append(room // stride[i] + 1)
    return _empty(input, size, _memory_format(input, weight))


@torch.library.register_fake("dlkernels::conv_transpose2d")
def _conv_transpose2d_fake(input, weight, bias, stride, padding, output_padding, dilation, groups):
    check_devices("conv_transpose2d", input, weight=weight, bias=bias)
    torch._check(
        input.size(1) == weight.size(0),
        lambda: f"conv_transpose2d: input must have {weight.size(0)} channels, got {list(input.shape)}",
    )
    size = [input.size(0), weight.size(1) * groups]
    for i in range(2):
        reach = dilation[i] * (weight.size(2 + i) - 1) + 1
        size.append((input.size(2 + i) - 1) * stride[i] - 2 * padding[i] + reach + output_padding[i])
    return _empty(input, size, _memory_format(input, weight))


@torch.library.register_fake("dlkernels::conv2d_backward")
@torch.library.register_fake("dlkernels::conv_transpose2d_backward")
def _backward_fake(grad, input, weight, *geometry_and_mask):
    output_mask, layout = geometry_and_mask[-1], _memory_format(input, weight)
    return (
        _empty(input, input.shape, layout) if output_mask[0] else None,
        _empty(weight, weight.shape, layout) if output_mask[1] else None,
        weight.new_empty(grad.size(1)) if output_mask[2] else None,
    )


def _empty(like: Tensor, size, layout: torch.memory_format) -> Tensor:
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)


def _memory_format(*tensors: Tensor) -> torch.memory_format:
    """The output's: channels_last when input or weight is."""
    return torch.channels_last if any(map(_is_channels_last, tensors)) else torch.contiguous_format


def _is_channels_last(x: Tensor) -> bool:
    """As csrc/conv2d.h judges it: strides ascend in the order C, W, H, N."""
    if x.stride(1) == 0:
        return False
    smallest = 0
    for dim in (1, 3, 2, 0):
        if x.size(dim) == 0 or x.stride(dim) < smallest or (dim == 0 and smallest == x.stride(1)):
            return False
        smallest = x.stride(dim) * max(x.size(dim), 1)
    return True


def _into_channels(x: Tensor, dim: int | None, batch: int, channel: int) -> Tensor:
    """x with its vmapped dimension folded into dimension `channel`: (..., C, ...) becomes (..., batch*C, ...)."""
    x = (
        x.unsqueeze(channel).expand(*x.shape[:channel], batch, *x.shape[channel:])
        if dim is None
        else x.movedim(dim, channel)
    )
    return x.flatten(channel, channel + 1)


def _out_of_channels(x: Tensor, batch: int, channel: int) -> Tensor:
    return x.unflatten(channel, (batch, -1))


def _register_vmap(forward_op, backward_op):
    """A batch of convolutions is one convolution with batch times as many groups."""

    def forward_rule(info, in_dims, input, weight, bias, *geometry):
        batch, (*steps, groups) = info.batch_size, geometry
        if in_dims[1] is None and (bias is None or in_dims[2] is None):  # the same weights: more images
            images = input.movedim(in_dims[0], 0).flatten(0, 1)
            return forward_op(images, weight, bias, *geometry).unflatten(0, (batch, -1)), 0
        output = forward_op(
            _into_channels(input, in_dims[0], batch, 1),
            _into_channels(weight, in_dims[1], batch, 0),
            None if bias is None else _into_channels(bias, in_dims[2], batch, 0),
            *(*steps, groups * batch),
        )
        return _out_of_channels(output, batch, 1), 1

    def backward_rule(info, in_dims, grad, input, weight, *geometry_and_mask):
        batch, (*steps, groups, output_mask) = info.batch_size, geometry_and_mask
        grads = backward_op(
            _into_channels(grad, in_dims[0], batch, 1),
            _into_channels(input, in_dims[1], batch, 1),
            _into_channels(weight, in_dims[2], batch, 0),
            *(*steps, groups * batch, output_mask),
        )
        channels = (1, 0, 0)
        outputs = [None if x is None else _out_of_channels(x, batch, c) for x, c in zip(grads, channels, strict=True)]
        return tuple(outputs), tuple(None if x is None else c for x, c in zip(grads, channels, strict=True))

    torch.library.register_vmap(forward_op.name(), forward_rule)
    torch.library.register_vmap(backward_op.name(), backward_rule)


for _operators in _OPERATORS:
    _register_vmap(*_operators)


# ---- functions and modules ---------------------------------------------------------------------------

torch.fx.wrap("conv2d")  # symbolic tracing keeps our calls in the graph, as it keeps those of torch.nn.functional
torch.fx.wrap("conv_transpose2d")


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """Convolves images with a bank of kernels: torch.nn.functional.conv2d on our kernels.

    output[n, k, p, q] = bias[k] + sum over c, r, s of weight[k, c, r, s]
                         * input[n, g*C/G + c, p*stride - padding + r*dilation, q*stride - padding + s*dilation],
    g = k // (K/G) being the group of output channel k; input is zero outside its H x W.

    Args:
        input: (N, C, H, W) or (C, H, W); float64, float32, bfloat16 or float16; any strides.
        weight: (K, C/groups, R, S), input's dtype and device.
        bias: (K) or None.
        stride: step between windows in pixels, int or (height, width).
        padding: zeros around the input in pixels, int or (height, width), or "valid" (none) or "same" (P = H, Q = W;
            stride 1; an odd zero goes after the last pixel).
        dilation: distance between kernel elements in pixels, int or (height, width).
        groups: channels are cut into this many independent convolutions.

    Returns:
        (N, K, P, Q), or (K, P, Q) for unbatched input, with P = (H + 2*padding - dilation*(R-1) - 1) // stride + 1 and
        Q alike, in input's dtype; channels_last when input or weight is. 16-bit types are summed in float32.
        Saved for the backward: input and weight.

    Raises:
        RuntimeError, TypeError, ValueError: what torch.nn.functional.conv2d raises for the same call; RuntimeError for
            other dtypes and for devices without kernels.

    Source:
        LeCun et al., Gradient-based learning applied to document recognition, 1998.

    Example:
        >>> images, kernels = torch.randn(8, 3, 32, 32), torch.randn(16, 3, 3, 3)
        >>> dlkernels.conv2d(images, kernels, padding=1).shape
        torch.Size([8, 16, 32, 32])
    """
    arguments = (input, weight, bias, stride, padding, dilation, groups)
    run = _CONV2D[current_backend()]
    if torch.compiler.is_compiling():
        return run(*arguments)
    try:
        return run(*arguments)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        problem = explain(error, "conv2d", arguments[:3], lambda: F.conv2d(*arguments))
    raise problem from None


def _with_kernels(input, weight, bias, stride, padding, dilation, groups):
    if isinstance(groups, bool):
        raise TypeError("conv2d: groups must be an int, got a bool")
    input, weight, bias = cast((input, weight, bias), autocast_dtype(input.device.type))
    stride, dilation = _pair(stride), _pair(dilation)
    padding = _four_sides(padding, weight, stride, dilation)
    if input.dim() == 3:
        return _conv2d(input.unsqueeze(0), weight, bias, stride, padding, dilation, groups).squeeze(0)
    return _conv2d(input, weight, bias, stride, padding, dilation, groups)


def _by_definition(input, weight, bias, *geometry):
    return _reference_conv2d(*cast((input, weight, bias), autocast_dtype(input.device.type)), *geometry)


_CONV2D: dict[str, Callable] = {"native": _with_kernels, "reference": _by_definition, "torch": F.conv2d}


def _pair(value):
    """(height, width) from an int, a 1-tuple or a pair."""
    if not isinstance(value, (tuple, list)):
        return (value, value)
    return value * 2 if len(value) == 1 else value


def _four_sides(padding, weight, stride, dilation):
    """padding as (top, bottom, left, right)."""
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding == "same":
        if any(step != 1 for step in stride):
            raise ValueError("conv2d: padding 'same' needs stride 1")
        total_h, total_w = (d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True))
        return (total_h // 2, total_h - total_h // 2, total_w // 2, total_w - total_w // 2)
    height, width = _pair(padding)
    return (height, height, width, width)


def conv_transpose2d(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """Goes the way of a convolution back, to larger images: torch.nn.functional.conv_transpose2d on our kernels.

    output[n, c, h, w] = bias[c] + sum over k, r, s with h = p*stride - padding + r*dilation (w alike) of
                                   weight[k, c, r, s] * input[n, k, p, q],
    k running over the group of c. Every input pixel thus lays a kernel, scaled by its value, onto the output, `stride`
    apart, and where kernels overlap they add. It is the gradient of conv2d with respect to its input, not its inverse.

    Args:
        input: (N, K, P, Q) or (K, P, Q); float64, float32, bfloat16 or float16; any strides.
        weight: (K, C/groups, R, S), input's dtype and device.
        bias: (C) or None.
        stride: distance between the kernels laid down, in pixels, int or (height, width).
        padding: pixels cut off each edge of the output, int or (height, width).
        output_padding: pixels that the output has more at the bottom and right, int or (height, width), smaller than
            stride or dilation: conv2d with this stride reaches the same (P, Q) from several (H, W).
        groups: channels are cut into this many independent convolutions.
        dilation: distance between kernel elements in pixels, int or (height, width).

    Returns:
        (N, C, H, W), or (C, H, W) for unbatched input, with H = (P-1)*stride - 2*padding + dilation*(R-1)
        + output_padding + 1 and W alike, in input's dtype; channels_last when input or weight is. 16-bit types are
        summed in float32. Saved for the backward: input and weight.

    Raises:
        RuntimeError, TypeError: what torch.nn.functional.conv_transpose2d raises for the same call; RuntimeError for
            other dtypes and for devices without kernels.

    Source:
        Zeiler et al., Deconvolutional networks, 2010. Dumoulin and Visin, A guide to convolution arithmetic for deep
        learning, 2016, chapter 4.

    Example:
        >>> codes, kernels = torch.randn(8, 16, 7, 7), torch.randn(16, 3, 4, 4)
        >>> dlkernels.conv_transpose2d(codes, kernels, stride=2, padding=1).shape
        torch.Size([8, 3, 14, 14])
    """
    arguments = (input, weight, bias, stride, padding, output_padding, groups, dilation)
    run = _CONV_TRANSPOSE2D[current_backend()]
    if torch.compiler.is_compiling():
        return run(*arguments)
    try:
        return run(*arguments)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        problem = explain(error, "conv_transpose2d", arguments[:3], lambda: F.conv_transpose2d(*arguments))
    raise problem from None


def _transposed_with_kernels(input, weight, bias, stride, padding, output_padding, groups, dilation):
    if isinstance(groups, bool):
        raise TypeError("conv_transpose2d: groups must be an int, got a bool")
    input, weight, bias = cast((input, weight, bias), autocast_dtype(input.device.type))
    steps = _pair(stride), _pair(padding), _pair(output_padding), _pair(dilation)
    if input.dim() == 3:
        return _conv_transpose2d(input.unsqueeze(0), weight, bias, *steps, groups).squeeze(0)
    return _conv_transpose2d(input, weight, bias, *steps, groups)


def _transposed_by_definition(input, weight, bias, *geometry):
    return _reference_conv_transpose2d(*cast((input, weight, bias), autocast_dtype(input.device.type)), *geometry)


_CONV_TRANSPOSE2D: dict[str, Callable] = {
    "native": _transposed_with_kernels,
    "reference": _transposed_by_definition,
    "torch": F.conv_transpose2d,
}


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d on our kernels: the same constructor, attributes, state_dict, initialisation and errors.

    output = conv2d(input, self.weight, self.bias, ...), after padding by `padding_mode` where that is not "zeros".

    Shapes: input (N, C, H, W) or (C, H, W) -> output (N, K, P, Q) or (K, P, Q); see `dlkernels.conv2d`.

    Example:
        >>> layer = dlkernels.Conv2d(3, 16, kernel_size=3, padding="same", padding_mode="reflect")
        >>> layer(torch.randn(8, 3, 32, 32)).shape
        torch.Size([8, 16, 32, 32])
    """

    def forward(self, input: Tensor) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        return conv2d(input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


class ConvTranspose2d(nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d on our kernels: the same constructor, attributes, state_dict, initialisation and errors.

    output = conv_transpose2d(input, self.weight, self.bias, ...). Where the stride leaves several output sizes, the
    call chooses one by `output_size`: (N, C, H, W), (C, H, W) or (H, W).

    Shapes: input (N, K, P, Q) or (K, P, Q) -> output (N, C, H, W) or (C, H, W); see `dlkernels.conv_transpose2d`.

    Example:
        >>> layer = dlkernels.ConvTranspose2d(16, 3, kernel_size=3, stride=2, padding=1)
        >>> layer(torch.randn(8, 16, 7, 7), output_size=(14, 14)).shape
        torch.Size([8, 3, 14, 14])
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if self.padding_mode != "zeros":  # set after construction
            raise ValueError("Only `zeros` padding mode is supported for ConvTranspose2d")
        numbers: Any = self.stride, self.padding, self.kernel_size, 2, self.dilation
        output_padding = self._output_padding(input, output_size, *numbers)
        return conv_transpose2d(
            input, self.weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )
