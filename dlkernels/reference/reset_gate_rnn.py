"""A recurrent layer with a reset gate and no update gate, by definition: one time step after the other.

Letters: T time steps, B sequences, I input features, H hidden features. Parameters hold two gates, r above n.
"""

from contextlib import nullcontext
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FORMS = ("after", "before", "output")


def reset_gate_rnn(
    input, h0, weight_ih, weight_hh, bias_ih=None, bias_hh=None, reset="after", batch_sizes=None, reverse=False
):
    """Runs one layer of the reset-gate RNN over a sequence, in one direction.

    r_t = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr), and then, by `reset`,
    "after":   h_t = tanh(W_in x_t + b_in + r_t * (W_hn h_{t-1} + b_hn)),
    "before":  h_t = tanh(W_in x_t + b_in + W_hn (r_t * h_{t-1}) + b_hn),
    "output":  h_t = r_t * tanh(W_in x_t + b_in + W_hn h_{t-1} + b_hn).

    Args:
        input: (T, B, I), float64, float32, bfloat16 or float16; with batch_sizes (sum of batch_sizes, I).
        h0: (B, H), the input's dtype; with batch_sizes in sorted order, longest sequence first.
        weight_ih: (2H, I), W_ir above W_in; weight_hh: (2H, H), W_hr above W_hn. The input's dtype.
        bias_ih, bias_hh: (2H) or None.
        reset: "after", "before" or "output".
        batch_sizes: (T) int64 on the CPU, how many sequences have a step t, as in PackedSequence; None: all have.
        reverse: whether time runs backwards, from each sequence's own last step to its first.

    Returns:
        output (T, B, H) or (sum of batch_sizes, H), every h_t at its own t; and h_n (B, H), each sequence's last h.
        T = 0: h_n is a copy of h0. bfloat16 and float16: a step is computed in float32, and its h_t rounded.

    Raises:
        ValueError: an unknown `reset`.
        RuntimeError: shapes, dtypes, devices or batch_sizes that do not fit together.

    Source: "before" is Cho et al., 2014, arXiv:1406.1078, with the update gate left out; "after" is the form that cuDNN
    and torch.nn.GRU compute.

    Example:
        >>> x, h, w_x, w_h = torch.ones(5, 1, 3), torch.zeros(1, 2), torch.ones(4, 3), torch.ones(4, 2)
        >>> [tuple(y.shape) for y in reset_gate_rnn(x, h, w_x, w_h)]
        [(5, 1, 2), (1, 2)]
    """
    layer = _layer(input, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset, batch_sizes)
    with _autocast_off(input.device.type):
        steps, h = _run(layer, input, h0, reverse)
        output = (
            torch.cat([step.h for step in steps]) if steps else _wide(input).flatten(0, -2) @ layer.W_x[: h.shape[1]].T
        )
    shape = output.shape if batch_sizes is not None else (*input.shape[:2], h0.shape[1])
    return output.reshape(shape).to(input.dtype), h.to(input.dtype)


# Backpropagation through time, in words. Walk the steps from the last to the first with dh = dL/dh_t in hand: it is
# what the loss asks of h_t itself (grad_output), plus what step t+1, which was computed from h_t, asks of it. Write u_r
# and u_n for the gradients of what goes into sigmoid and tanh; sigmoid' = r (1 - r) and tanh' = 1 - n^2.
#
# "after", h = n = tanh(a + r g) with g = W_hn h' + b_hn (h' for h_{t-1}):
#   u_n = dh (1 - n^2);  r is multiplied with g: u_r = u_n g * r (1 - r);  g is multiplied with r: u_g = u_n r.
#   h' went into r and into g:  dh' = W_hr^T u_r + W_hn^T u_g.
# "before", h = n = tanh(a + W_hn q + b_hn) with q = r h':
#   u_n = dh (1 - n^2);  dq = W_hn^T u_n;  u_r = dq h' * r (1 - r).
#   h' went into r, and into q directly:  dh' = W_hr^T u_r + dq r.
# "output", h = r n:
#   u_n = dh r * (1 - n^2);  u_r = dh n * r (1 - r);  dh' = W_hr^T u_r + W_hn^T u_n.
#
# dh' is dh of the step before, and at the first step the gradient of h0. All parameters are used in every step, so
# their gradients are sums over steps: what came out of the product (u) times what went in (x; h', or q for W_hn in
# "before"). Biases are products with 1. Only the chain dh -> dh' is serial; all else is one product over all rows.
def reset_gate_rnn_backward(
    grad, input, h0, weight_ih, weight_hh, bias_ih=None, bias_hh=None, reset="after", batch_sizes=None, reverse=False
):
    """Gradients of `reset_gate_rnn` with respect to its first six arguments, written out; differentiable itself.

    Backpropagation through time, step by step as derived above: dh -> (u_r, u_n) -> dh', and
    grad_input = [u_r | u_n] weight_ih, grad_weight_ih = sum [u_r | u_n]' x, grad_weight_hh = sum [u_r | u_h]' h'.

    Args:
        grad: pair of grad_output, of output's shape, and grad_h_n (B, H), the gradients of the two results.
        input, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset, batch_sizes, reverse: as given to `reset_gate_rnn`.

    Returns:
        grad_input, grad_h0, grad_weight_ih, grad_weight_hh, grad_bias_ih or None, grad_bias_hh or None; each of the
        shape and dtype of what it belongs to.

    Raises:
        ValueError, RuntimeError: as `reset_gate_rnn`; RuntimeError also for grads that have not the results' shapes.

    Source: Werbos, "Backpropagation through time", 1990; the derivation above this function.

    Example:
        >>> x, h, w_x, w_h = torch.ones(5, 1, 3), torch.zeros(1, 2), torch.ones(4, 3), torch.ones(4, 2)
        >>> grads = reset_gate_rnn_backward((torch.ones(5, 1, 2), torch.ones(1, 2)), x, h, w_x, w_h)
        >>> [None if g is None else tuple(g.shape) for g in grads]
        [(5, 1, 3), (1, 2), (4, 3), (4, 2), None, None]
    """
    layer = _layer(input, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset, batch_sizes)
    grad_output, dh = grad
    shape = input.shape[:-1] + h0.shape[1:]
    _require(
        grad_output.shape == shape, f"expected grad_output of size {list(shape)}, but got {list(grad_output.shape)}"
    )
    _require(dh.shape == h0.shape, f"expected grad_h_n of size {list(h0.shape)}, but got {list(dh.shape)}")
    grad_rows = _wide(grad_output).flatten(0, -2)
    with _autocast_off(input.device.type):
        steps, _ = _run(layer, input, h0, reverse)
        dh, grad_x = _wide(dh), [_wide(input).flatten(0, -2)[:0]] * len(steps)
        grad_ih, grad_hh = torch.zeros_like(layer.W_x), torch.zeros_like(layer.W_h)
        grad_b_ih, grad_b_hh = (layer.W_x.new_zeros(len(layer.W_x)) for _ in range(2))
        for t in _times(len(steps), not reverse):
            step = steps[t]
            rows = len(step.x)
            dh_t = dh[:rows] + grad_rows[step.first : step.first + rows]
            u_x, u_h, q, dh_before = _step_backward(layer, step, dh_t)  # u_x = [u_r | u_n]
            dh = torch.cat([dh_before, dh[rows:]])
            grad_x[t] = u_x @ layer.W_x
            grad_ih, grad_b_ih = grad_ih + u_x.T @ step.x, grad_b_ih + u_x.sum(0)
            products = [u.T @ h for u, h in zip(u_h.chunk(2, 1), (step.h_before, q), strict=True)]
            grad_hh, grad_b_hh = grad_hh + torch.cat(products), grad_b_hh + u_h.sum(0)
        grad_input = torch.cat(grad_x) if steps else torch.zeros_like(input)
    grads = (grad_input.reshape(input.shape), dh, grad_ih, grad_hh)
    biases = (None if b is None else g for b, g in ((bias_ih, grad_b_ih), (bias_hh, grad_b_hh)))
    return tuple(None if g is None else g.to(input.dtype) for g in (*grads, *biases))


class _Layer(NamedTuple):
    """The parameters in the dtype that sums are made in, and the number of rows of every step."""

    form: str
    W_x: Tensor  # (2H, I)
    W_h: Tensor  # (2H, H)
    b_x: Tensor  # (2H), zeros where there is no bias
    b_h: Tensor  # (2H)
    rows: list  # (T) ints


class _Step(NamedTuple):
    """What happened at one time step, for the sequences that have it: b of them."""

    first: int  # where its rows begin among all rows
    x: Tensor  # (b, I)
    h_before: Tensor  # (b, H)
    r: Tensor  # (b, H)
    n: Tensor  # (b, H)
    g: Tensor  # (b, H): W_hn h_before + b_hn in "after", r * h_before in "before"
    h: Tensor  # (b, H)


def _layer(input, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset, batch_sizes) -> _Layer:
    """Checks everything once."""
    if reset not in _FORMS:
        raise ValueError(f"expected reset to be one of {', '.join(map(repr, _FORMS))}, but got {reset!r}")
    _require(input.dtype in _DTYPES, f"expected input in float64, float32, bfloat16 or float16, not {input.dtype}")
    dim = 3 if batch_sizes is None else 2
    _require(input.dim() == dim, f"expected input of {dim} dimensions, but got {list(input.shape)}")
    _require(h0.dim() == 2, f"expected h0 of 2 dimensions, but got {list(h0.shape)}")
    H = h0.shape[1]
    given = {"h0": h0, "weight_ih": weight_ih, "weight_hh": weight_hh, "bias_ih": bias_ih, "bias_hh": bias_hh}
    sizes = (
        [h0.shape[0] if batch_sizes is not None else input.shape[1], H],
        [2 * H, input.shape[-1]],
        [2 * H, H],
        [2 * H],
        [2 * H],
    )
    for (name, x), size in zip(given.items(), sizes, strict=True):
        if x is not None:
            _require(list(x.shape) == size, f"expected {name} of size {size}, but got {list(x.shape)}")
            _require(x.dtype == input.dtype, f"expected {name} of dtype {input.dtype}, but got {x.dtype}")
            _require(x.device == input.device, f"expected {name} on {input.device}, but it is on {x.device}")
    zeros = torch.zeros_like(_wide(weight_hh)[:, 0]) if H else _wide(weight_hh).new_zeros(0)
    b_x, b_h = (zeros if b is None else _wide(b) for b in (bias_ih, bias_hh))
    rows = [input.shape[1]] * input.shape[0] if batch_sizes is None else _rows(batch_sizes, input, h0)
    return _Layer(reset, _wide(weight_ih), _wide(weight_hh), b_x, b_h, rows)


def _rows(batch_sizes, input, h0) -> list:
    wanted = batch_sizes.dtype == torch.int64 and batch_sizes.dim() == 1 and batch_sizes.device.type == "cpu"
    _require(
        wanted,
        f"expected batch_sizes to be 1-D int64 on the CPU, but got {batch_sizes.dtype} on "
        f"{batch_sizes.device} of size {list(batch_sizes.shape)}",
    )
    rows = batch_sizes.tolist()
    descending = all(a >= b > 0 for a, b in zip([h0.shape[0], *rows], rows, strict=False))
    _require(
        sum(rows) == input.shape[0] and descending and (not rows or rows[0] == h0.shape[0]),
        f"expected batch_sizes to descend from the {h0.shape[0]} rows of h0 and to sum up to the {input.shape[0]} rows "
        f"of input, but got {rows}",
    )
    return rows


def _run(layer, input, h0, reverse) -> tuple:
    """Every step in order of t, and the last h of every sequence (B, H)."""
    firsts = list(accumulate(layer.rows[:-1], initial=0))[: len(layer.rows)]
    x_rows = _wide(input).flatten(0, -2)
    steps: list = [None] * len(firsts)
    h = _wide(h0).clone()
    for t in _times(len(firsts), reverse):
        first, rows = firsts[t], layer.rows[t]
        step = _step(layer, first, x_rows[first : first + rows], h[:rows])
        steps[t] = step._replace(h=step.h.to(input.dtype).to(step.h.dtype))
        h = torch.cat([steps[t].h, h[rows:]])  # sequences without this step keep theirs
    return steps, h


def _times(T, reverse):
    return range(T - 1, -1, -1) if reverse else range(T)


def _step(layer, first, x, h) -> _Step:
    """h_t from x_t and h_{t-1}: the three formulas."""
    W_hr, W_hn = layer.W_h.chunk(2)
    b_hr, b_hn = layer.b_h.chunk(2)
    x_r, x_n = (x @ layer.W_x.T + layer.b_x).chunk(2, 1)
    r = torch.sigmoid(x_r + h @ W_hr.T + b_hr)
    if layer.form == "after":
        g = h @ W_hn.T + b_hn
        n = torch.tanh(x_n + r * g)
        return _Step(first, x, h, r, n, g, n)
    if layer.form == "before":
        q = r * h
        n = torch.tanh(x_n + q @ W_hn.T + b_hn)
        return _Step(first, x, h, r, n, q, n)
    n = torch.tanh(x_n + h @ W_hn.T + b_hn)
    return _Step(first, x, h, r, n, h, r * n)


def _step_backward(layer, step, dh) -> tuple:
    """u_x = [u_r | u_n] (b, 2H) for what went into the gates from x, u_h (b, 2H) from h; q, what W_hn met; and dh'."""
    W_hr, W_hn = layer.W_h.chunk(2)
    r, n = step.r, step.n
    if layer.form == "after":
        u_n = dh * (1 - step.h.square())
        u_r = u_n * step.g * r * (1 - r)
        u_g = u_n * r
        return torch.cat([u_r, u_n], 1), torch.cat([u_r, u_g], 1), step.h_before, u_r @ W_hr + u_g @ W_hn
    if layer.form == "before":
        u_n = dh * (1 - step.h.square())
        dq = u_n @ W_hn
        u_r = dq * step.h_before * r * (1 - r)
        u = torch.cat([u_r, u_n], 1)
        return u, u, step.g, u_r @ W_hr + dq * r
    u_n = dh * r * (1 - n.square())
    u_r = dh * n * r * (1 - r)
    u = torch.cat([u_r, u_n], 1)
    return u, u, step.h_before, u @ layer.W_h


def _wide(tensor) -> Tensor:
    """In the dtype that sums are made in: float64 stays, else float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _autocast_off(device_type):
    """Sums stay in the dtype chosen here, inside an autocast region too. The meta device has no autocast."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


def _require(condition, text):
    if not condition:
        raise RuntimeError(text)
