"""Recurrent layers with a reset gate and no update gate: `reset_gate_rnn`, `ResetGateRNN` and `ResetGateRNNCell`.

Letters: T time steps, B sequences, I input features, H hidden features; gates r and n, in this order. The kernels are
csrc/cpu/reset_gate_rnn and csrc/cuda/reset_gate_rnn.cu, their contract csrc/reset_gate_rnn.h.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.utils.rnn import PackedSequence

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

_FORMS = ("after", "before", "output")  # numbered so in the operators
_TENSORS = ("input", "h0", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "batch_sizes")
_REQUIRED = 4  # the first of them; the others may be None

_forward = torch.ops.dlkernels.reset_gate_rnn.default
_backward = torch.ops.dlkernels.reset_gate_rnn_backward.default


# ---- derivatives: inputs, output and gates are saved for the backward ----------------------------------


class ResetGateRNNFunction(Function):
    """output, h_n, gates = reset_gate_rnn(input (T, B, I), h0 (B, H), weights, biases, batch_sizes, ...).

    gates (rows, H or 2H) are what the backward cannot take from the output; they have no gradient.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(input, h0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reset, reverse, save):
        return _forward(input, h0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reset, reverse, save)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, batch_sizes, ctx.reset, ctx.reverse, _ = inputs
        results, _, gates = output
        ctx.mark_non_differentiable(gates)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, results, gates, batch_sizes)

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, _grad_gates):
        if grad_output is None and grad_h_n is None:
            return (None,) * 10
        grads = _reset_gate_rnn_backward(
            grad_output, grad_h_n, *ctx.saved_tensors, ctx.reset, ctx.reverse, ctx.needs_input_grad[:6]
        )
        return (*grads, None, None, None, None)


class ResetGateRNNBackwardFunction(Function):
    """The gradients of input, h0, weights and biases = reset_gate_rnn_backward(grad_output, grad_h_n, ...).

    Its derivative is that of the reference's backward, which runs the sequence again from input and h0.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_output, grad_h_n, input, h0, weight_ih, weight_hh, bias_ih, bias_hh, output, gates, batch_sizes, *settings
    ):
        tensors = (input, h0, weight_ih, weight_hh, bias_ih, bias_hh, output, gates, batch_sizes)
        return _backward(grad_output, grad_h_n, *tensors, *settings)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, _, _, batch_sizes, ctx.reset, ctx.reverse, ctx.output_mask = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, batch_sizes)

    @staticmethod
    def backward(ctx, *cotangents):
        *given, batch_sizes = ctx.saved_tensors
        present = [x is not None for x in given]
        wanted = [asked and x is not None for asked, x in zip(ctx.output_mask, cotangents, strict=True)]

        def wanted_gradients(*tensors):
            rest = iter(tensors)
            tensors_or_none: list = [next(rest) if there else None for there in present]
            grad_output, grad_h_n, input, h0, *parameters = tensors_or_none
            if grad_output is None:
                grad_output = input.new_zeros((*input.shape[:-1], h0.shape[1]))
            grad_h_n = torch.zeros_like(h0) if grad_h_n is None else grad_h_n
            grads = _reference_backward(
                grad_output, grad_h_n, input, h0, *parameters, _FORMS[ctx.reset], batch_sizes, ctx.reverse
            )
            return tuple(x for x, is_wanted in zip(grads, wanted, strict=True) if is_wanted)

        if not any(wanted):
            return (None,) * 14
        pull_back = torch.func.vjp(wanted_gradients, *(x for x in given if x is not None))[1]
        results = iter(pull_back(tuple(x for x, is_wanted in zip(cotangents, wanted, strict=True) if is_wanted)))
        return (*(next(results) if there else None for there in present), *[None] * 6)


def _reference_backward(grad_output, grad_h_n, *args):
    return reference.reset_gate_rnn_backward((grad_output, grad_h_n), *args)


_reset_gate_rnn = differentiable(ResetGateRNNFunction, _forward)
_reset_gate_rnn_backward = differentiable(ResetGateRNNBackwardFunction, _backward)
_reference_reset_gate_rnn = from_reference(reference.reset_gate_rnn, _reference_backward)
register_autocast(_forward)


# ---- shapes without data, and batches of calls ---------------------------------------------------------


@torch.library.register_fake("dlkernels::reset_gate_rnn")
def _reset_gate_rnn_fake(input, h0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reset, reverse, save):
    check_devices(
        "reset_gate_rnn", input, h0=h0, weight_ih=weight_ih, weight_hh=weight_hh, bias_ih=bias_ih, bias_hh=bias_hh
    )
    torch._check(
        batch_sizes is None or batch_sizes.device.type == "cpu",
        lambda: f"reset_gate_rnn: batch_sizes must be 1-D int64 on the CPU, got it on {batch_sizes.device}",
    )
    H = h0.shape[1]
    torch._check(
        weight_ih.dim() == 2 and weight_ih.shape[1] == input.shape[-1],
        lambda: f"reset_gate_rnn: weight_ih must have shape [2H, {input.shape[-1]}], got {list(weight_ih.shape)}",
    )
    rows = input.shape[0] if batch_sizes is not None else input.shape[0] * input.shape[1]
    saved = H if reset == _FORMS.index("before") else 2 * H
    return (
        torch.empty((*input.shape[:-1], H), dtype=input.dtype, device=input.device),
        torch.empty(h0.shape, dtype=input.dtype, device=input.device),
        torch.empty((rows if save else 0, saved), dtype=input.dtype, device=input.device),
    )


@torch.library.register_fake("dlkernels::reset_gate_rnn_backward")
def _reset_gate_rnn_backward_fake(
    grad_output,
    grad_h_n,
    input,
    h0,
    weight_ih,
    weight_hh,
    bias_ih,
    bias_hh,
    output,
    gates,
    batch_sizes,
    reset,
    reverse,
    output_mask,
):
    shapes = (input.shape, h0.shape, weight_ih.shape, weight_hh.shape, weight_ih.shape[:1], weight_hh.shape[:1])
    return tuple(
        torch.empty(shape, dtype=input.dtype, device=input.device) if wanted else None
        for shape, wanted in zip(shapes, output_mask, strict=True)
    )


for _op in (_forward, _backward):
    register_vmap_by_loop(_op)


# ---- function --------------------------------------------------------------------------------------------


def reset_gate_rnn(
    input, h0, weight_ih, weight_hh, bias_ih=None, bias_hh=None, reset="after", batch_sizes=None, reverse=False
):
    """Runs one layer of the reset-gate RNN over whole sequences, in one direction.

    r_t = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr), and then, by `reset`,
    "after":   h_t = tanh(W_in x_t + b_in + r_t * (W_hn h_{t-1} + b_hn)),
    "before":  h_t = tanh(W_in x_t + b_in + W_hn (r_t * h_{t-1}) + b_hn),
    "output":  h_t = r_t * tanh(W_in x_t + b_in + W_hn h_{t-1} + b_hn).

    Args:
        input: (T, B, I) float64, float32, bfloat16 or float16, any strides; with batch_sizes (sum of batch_sizes, I).
        h0: (B, H), input's dtype, as all others; with batch_sizes in sorted order, longest sequence first.
        weight_ih: (2H, I), W_ir above W_in. weight_hh: (2H, H), W_hr above W_hn.
        bias_ih, bias_hh: (2H) or None.
        reset: "after" (torch.nn.GRU's and cuDNN's), "before" (Cho et al.) or "output" (r gates what comes out).
        batch_sizes: (T) int64 on the CPU, how many sequences have a step t, as in PackedSequence; None: all have.
        reverse: whether time runs backwards, each sequence beginning at its own last step.

    Returns:
        output (T, B, H), or (sum of batch_sizes, H): every h_t at its own t. h_n (B, H): each sequence's last h; a copy
        of h0 where T = 0. Sums are made in float32 (float64 for float64), and h_t is rounded to input's dtype. Carrying
        h_n.detach() into the next call is truncated backpropagation through time.
        Saved for the backward: the arguments, output, and r (and W_hn h_{t-1} + b_hn or tanh's result) of every step.

    Raises:
        ValueError: an unknown `reset`.
        RuntimeError: shapes, dtypes, devices or batch_sizes that do not fit together.

    Source:
        Cho et al., Learning phrase representations using RNN encoder-decoder, 2014, arXiv:1406.1078.

    Example:
        >>> x, h = torch.randn(20, 8, 32), torch.zeros(8, 64)
        >>> output, h_n = dlkernels.reset_gate_rnn(x, h, torch.randn(128, 32), torch.randn(128, 64))
        >>> output.shape, h_n.shape
        (torch.Size([20, 8, 64]), torch.Size([8, 64]))
    """
    _check_reset(reset)
    tensors = (input, h0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes)
    for i, x in enumerate(tensors):
        if not isinstance(x, Tensor) and (x is not None or i < _REQUIRED):
            raise TypeError(f"reset_gate_rnn: {_TENSORS[i]} must be a tensor, got {type(x).__name__}")
    return _over_time(tensors[:6], reset, batch_sizes, reverse)


def _over_time(tensors, reset, batch_sizes, reverse):
    """reset_gate_rnn of input, h0, weight_ih, weight_hh, bias_ih and bias_hh, each a tensor or None where it may be."""
    run = _BACKENDS[current_backend()]
    dtype = autocast_dtype(tensors[0].device.type)
    if dtype is not None:
        tensors = cast(tensors, dtype)
    if torch.compiler.is_compiling():
        return run(*tensors, reset, batch_sizes, reverse)
    try:
        return run(*tensors, reset, batch_sizes, reverse)
    except RuntimeError as error:
        problem = explain(error, "reset_gate_rnn", (*tensors, batch_sizes), lambda: None)
    raise problem from None


def _by_kernels(input, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset, batch_sizes, reverse):
    tensors = (input, h0, weight_ih, weight_hh, bias_ih, bias_hh)
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    output, h_n, _ = _reset_gate_rnn(*tensors, batch_sizes, _FORMS.index(reset), reverse, save or transformed)
    return output, h_n


def _with_stock_operators(input, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset, batch_sizes, reverse):
    """The input's part of all gates in one F.linear, then a loop: the fastest composition of torch's own operators."""
    H = weight_hh.shape[1]
    inner = None
    if reset == "after" and bias_hh is not None:  # r multiplies b_hn, too; all other biases can be added here
        inner, bias_hh = bias_hh[H:], torch.cat([bias_hh[:H], torch.zeros_like(bias_hh[H:])])
    bias = bias_ih if bias_hh is None else bias_hh if bias_ih is None else bias_ih + bias_hh
    x = F.linear(input, weight_ih, bias)
    steps = list(x.unbind() if batch_sizes is None else x.split(batch_sizes.tolist()))
    W, W_r, W_n = weight_hh.t(), weight_hh[:H].t(), weight_hh[H:].t()
    outputs, h = [x.new_zeros(0, H)] * len(steps), h0
    for t in range(len(steps) - 1, -1, -1) if reverse else range(len(steps)):
        x_t, rows = steps[t], len(steps[t])
        h_t = h if rows == len(h) else h[:rows]
        if reset == "before":
            r = torch.addmm(x_t[:, :H], h_t, W_r).sigmoid_()
            h_t = torch.addmm(x_t[:, H:], r * h_t, W_n).tanh_()
        elif reset == "output":
            r, n = torch.addmm(x_t, h_t, W).chunk(2, 1)
            h_t = r.sigmoid() * n.tanh()
        else:
            r = torch.addmm(x_t[:, :H], h_t, W_r).sigmoid_()
            g = h_t @ W_n if inner is None else torch.addmm(inner, h_t, W_n)
            h_t = torch.addcmul(x_t[:, H:], r, g).tanh_()
        outputs[t] = h_t
        h = h_t if rows == len(h) else torch.cat([h_t, h[rows:]])
    if not steps:
        return x[..., :H], h0.clone()
    return torch.stack(outputs) if batch_sizes is None else torch.cat(outputs), h if h is not h0 else h0.clone()


_BACKENDS: dict[str, Callable] = {
    "native": _by_kernels,
    "reference": _reference_reset_gate_rnn,
    "torch": _with_stock_operators,
}


def _check_reset(reset):
    if reset not in _FORMS:
        raise ValueError(f"reset must be one of {', '.join(map(repr, _FORMS))}, got {reset!r}")


# ---- modules ---------------------------------------------------------------------------------------------


class ResetGateRNN(nn.RNNBase):
    """Layers of the reset-gate RNN, in one direction or two; used like torch.nn.GRU.

    Every layer and direction is one `dlkernels.reset_gate_rnn`; the next layer's input are the outputs of all
    directions side by side. Parameters are torch.nn.GRU's with two gates in the order [r | n]: weight_ih_l{k}{_reverse}
    (2H, I or D*H), weight_hh_l{k} (2H, H), bias_ih_l{k}, bias_hh_l{k} (2H), uniform within 1 / sqrt(H) at first.

    Args:
        input_size, hidden_size: I and H.
        num_layers: how many layers stand on each other.
        bias: whether there are biases.
        batch_first: whether input and output are (B, T, features); hidden states are not.
        dropout: probability, of dropout between layers while training.
        bidirectional: whether every layer also runs backwards; D is 2 then, else 1.
        device, dtype: of the parameters.
        reset: "after", "before" or "output", see `dlkernels.reset_gate_rnn`.

    Shapes: input (T, B, I), (B, T, I), (T, I) or a PackedSequence, hx (D*num_layers, B, H), (D*num_layers, H) for
        unbatched input, or None for zeros -> output (T, B, D*H) like input, h_n like hx.

    Raises:
        ValueError, TypeError, RuntimeError: torch.nn.GRU's; ValueError for an unknown `reset`.

    Example:
        >>> rnn = dlkernels.ResetGateRNN(32, 64, num_layers=2, bidirectional=True)
        >>> output, h_n = rnn(torch.randn(20, 8, 32))
        >>> output.shape, h_n.shape
        (torch.Size([20, 8, 128]), torch.Size([4, 8, 64]))
    """

    __constants__ = [*nn.RNNBase.__constants__, "reset"]  # noqa: RUF012

    def __init__(
        self,
        input_size,
        hidden_size,
        num_layers=1,
        bias=True,
        batch_first=False,
        dropout=0.0,
        bidirectional=False,
        device=None,
        dtype=None,
        reset="after",
    ):
        _check_reset(reset)
        # RNNBase checks every argument and names the parameters, with three gates that take no memory on "meta"
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device="meta"
        )
        self.mode, self.reset = "RESET_GATE_RNN", reset
        for name in self._flat_weights_names:
            size = (2 * hidden_size, *getattr(self, name).shape[1:])
            setattr(self, name, nn.Parameter(torch.empty(size, device=device, dtype=dtype)))
        self._init_flat_weights()
        self.reset_parameters()

    def flatten_parameters(self) -> None:
        """Nothing to do: weights are packed inside every call."""

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """torch.nn.GRU's, but for its list of parameters, which functional calls and torch.export leave behind."""
        dtype, dim = self.weight_ih_l0.dtype, 3 if batch_sizes is None else 2
        if input.dtype != dtype and not torch._C._is_any_autocast_enabled():
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({dtype}). "
                f"Convert input: input.to({dtype}), or convert model: model.to({input.dtype})"
            )
        if input.dim() != dim:
            raise RuntimeError(f"input must have {dim} dimensions, got {input.dim()}")
        if self.input_size != input.size(-1):
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.size(-1)}"
            )

    def forward(self, input, hx=None):
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(f"{type(self).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched, batch_dim = input.dim() == 3, 0 if self.batch_first else 1
        if hx is not None and hx.dim() != input.dim():
            kind = "batched 3-D" if batched else "unbatched 2-D"
            raise RuntimeError(f"For {kind} input, hx should also be {input.dim()}-D but got {hx.dim()}-D tensor")
        if not batched:
            input, hx = input.unsqueeze(batch_dim), None if hx is None else hx.unsqueeze(1)
        self._check(input, hx, None)
        if self.batch_first:
            input = input.transpose(0, 1)
        if input.size(0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        output, h_n = self._layers(input, hx, None)
        if self.batch_first:
            output = output.transpose(0, 1)
        return (output, h_n) if batched else (output.squeeze(batch_dim), h_n.squeeze(1))

    def _forward_packed(self, packed, hx):
        input, batch_sizes, sorted_indices, unsorted_indices = packed
        hx = None if hx is None else self.permute_hidden(hx, sorted_indices)
        self._check(input, hx, batch_sizes)
        output, h_n = self._layers(input, hx, batch_sizes)
        output = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return output, self.permute_hidden(h_n, unsorted_indices)

    def _check(self, input, hx, batch_sizes):
        if hx is None:
            self.check_input(input, batch_sizes)
        else:
            self.check_forward_args(input, hx, batch_sizes)

    def _layers(self, input, hx, batch_sizes):
        """Output of the last layer and h_n (D*num_layers, B, H); input (T, B, I), or (rows, I) with batch_sizes."""
        h_n: list[Tensor] = []
        if hx is None:  # one h0 for all
            zeros = input.new_zeros(input.size(1) if batch_sizes is None else int(batch_sizes[0]), self.hidden_size)
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout > 0:
                input = F.dropout(input, self.dropout, self.training)
            outputs = []
            for reverse in (False, True) if self.bidirectional else (False,):
                h0 = zeros if hx is None else hx[len(h_n)]
                tensors = (input, h0, *self._parameters_of(len(h_n)))
                output, last = _over_time(tensors, self.reset, batch_sizes, reverse)
                outputs.append(output)
                h_n.append(last)
            input = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
        return input, torch.stack(h_n) if len(h_n) > 1 else h_n[0].unsqueeze(0)

    def _parameters_of(self, i):
        """weight_ih, weight_hh, bias_ih, bias_hh of the i-th layer and direction; None where there is no bias."""
        own, names = self._parameters, self._all_weights[i]  # getattr would take 0.6 us for each
        given = [own[name] if name in own else getattr(self, name) for name in names]
        return given if self.bias else (*given, None, None)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, reset={self.reset!r}"


class ResetGateRNNCell(nn.RNNCellBase):
    """One step of the reset-gate RNN; used like torch.nn.GRUCell.

    h' = dlkernels.reset_gate_rnn over a single step. Parameters are torch.nn.GRUCell's with two gates [r | n]:
    weight_ih (2H, I), weight_hh (2H, H), bias_ih, bias_hh (2H), uniform within 1 / sqrt(H) at first.

    Args:
        input_size, hidden_size: I and H.
        bias: whether there are biases.
        device, dtype: of the parameters.
        reset: "after", "before" or "output", see `dlkernels.reset_gate_rnn`.

    Shapes: input (B, I) or (I), hx (B, H), (H) or None for zeros -> (B, H) or (H).

    Raises:
        ValueError, RuntimeError: torch.nn.GRUCell's; ValueError for an unknown `reset`.

    Example:
        >>> cell, h = dlkernels.ResetGateRNNCell(32, 64), None
        >>> for x in torch.randn(20, 8, 32):
        ...     h = cell(x, h)
    """

    __constants__ = [*nn.RNNCellBase.__constants__, "reset"]  # noqa: RUF012

    def __init__(self, input_size, hidden_size, bias=True, device=None, dtype=None, reset="after"):
        _check_reset(reset)
        super().__init__(input_size, hidden_size, bias, num_chunks=2, device=device, dtype=dtype)
        self.reset = reset

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        for name, x in (("input", input), ("hidden", hx)):
            if x is not None and x.dim() not in (1, 2):
                raise ValueError(f"{type(self).__name__}: Expected {name} to be 1D or 2D, got {x.dim()}D instead")
        batched = input.dim() == 2
        x = input if batched else input.unsqueeze(0)
        if hx is None:
            hx = torch.zeros(x.size(0), self.hidden_size, dtype=x.dtype, device=x.device)
        elif not batched:
            hx = hx.unsqueeze(0)
        self._check_sizes(x, hx)
        h = reset_gate_rnn(
            x.unsqueeze(0), hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, reset=self.reset
        )[1]
        return h if batched else h.squeeze(0)

    def _check_sizes(self, x, hx):
        if x.size(1) != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {x.size(1)} expected {self.input_size}")
        if hx.size(-1) != self.hidden_size:
            raise RuntimeError(f"hidden0 has inconsistent hidden_size: got {hx.size(-1)}, expected {self.hidden_size}")
        if hx.size(0) != x.size(0):
            raise RuntimeError(f"Input batch size {x.size(0)} doesn't match hidden0 batch size {hx.size(0)}")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, reset={self.reset!r}"
