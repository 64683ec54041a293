"""reset_gate_rnn, ResetGateRNN, ResetGateRNNCell: every test states one property, for all backends where it can.

Values are judged by the tolerance rule of dlkernels.testing. The yardsticks: nn.GRU with its update gate held at 0 for
the form "after", a loop over time written with torch's own operators for all three.
"""

import copy
import io
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import dlkernels
from dlkernels import reference
from dlkernels.testing import DTYPES, VIEWS, ResetGateRnnCase, compare, relative_error, reset_gate_rnn_cases

CASES = {case.name: case for case in reset_gate_rnn_cases()}
FORMS = ("after", "before", "output")
BACKENDS = ("native", "reference", "torch")
OURS = ("native", "reference")
NAMES = ("input", "h0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")

# Large enough to be divided among threads in one way or the other, and to be cut into chunks of time.
LARGE_CASES = tuple(
    case
    for reset in FORMS
    for case in (
        ResetGateRnnCase(f"{reset}_slices_of_the_batch", (7, 50, 20, 40), reset),
        ResetGateRnnCase(f"{reset}_columns_one_sequence", (6, 1, 30, 300), reset),
        ResetGateRnnCase(f"{reset}_columns_large_weights", (4, 9, 40, 400), reset),
        ResetGateRnnCase(f"{reset}_columns_packed", (5, 3, 20, 300), reset, (3, 3, 2, 2, 1)),
        ResetGateRnnCase(f"{reset}_columns_packed_reverse", (5, 3, 20, 300), reset, (3, 3, 2, 2, 1), reverse=True),
        ResetGateRnnCase(f"{reset}_columns_chunks", (30, 50, 8, 364), reset),
        ResetGateRnnCase(f"{reset}_chunks", (60, 600, 8, 16), reset),
        ResetGateRnnCase(f"{reset}_chunks_packed", (60, 600, 8, 16), reset, tuple(range(600, 0, -10)), reverse=True),
    )
)

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_of_ours = pytest.mark.parametrize("backend", OURS)
each_form = pytest.mark.parametrize("reset", FORMS)
each_direction = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def each_case(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def of_each_form(*suffixes):
    return [CASES[f"{reset}{suffix}"] for reset in FORMS for suffix in suffixes]


def loop_over_time(
    input, h0, weight_ih, weight_hh, bias_ih=None, bias_hh=None, reset="after", batch_sizes=None, reverse=False
):
    """The definition in torch's own operators, in the dtype of the input."""
    rows = [input.shape[1]] * len(input) if batch_sizes is None else batch_sizes.tolist()
    steps = list(input.flatten(0, -2).split(rows)) if rows else []
    W_ir, W_in = weight_ih.chunk(2)
    W_hr, W_hn = weight_hh.chunk(2)
    b_ir, b_in = (None, None) if bias_ih is None else bias_ih.chunk(2)
    b_hr, b_hn = (None, None) if bias_hh is None else bias_hh.chunk(2)
    outputs, h = [None] * len(rows), h0 + 0
    for t in reversed(range(len(rows))) if reverse else range(len(rows)):
        x, before, rest = steps[t], h[: rows[t]], h[rows[t] :]
        r = (F.linear(x, W_ir, b_ir) + F.linear(before, W_hr, b_hr)).sigmoid()
        if reset == "after":
            now = (F.linear(x, W_in, b_in) + r * F.linear(before, W_hn, b_hn)).tanh()
        elif reset == "before":
            now = (F.linear(x, W_in, b_in) + F.linear(r * before, W_hn, b_hn)).tanh()
        else:
            now = r * (F.linear(x, W_in, b_in) + F.linear(before, W_hn, b_hn)).tanh()
        outputs[t], h = now, torch.cat([now, rest])
    shape = (*input.shape[:-1], h0.shape[1])
    return (torch.cat(outputs) if rows else F.linear(input, W_ir)).reshape(shape), h


def results(function, case, inputs, grads=None):
    """output, h_n, and a gradient for each input that is there; grads default to ones."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    outputs = function(*leaves, **case.arguments)
    grads = [torch.ones_like(x) for x in outputs] if grads is None else grads
    wanted = {f"grad_{name}": t for name, t in zip(NAMES, leaves, strict=True) if t is not None}
    gradients = torch.autograd.grad(outputs, list(wanted.values()), grads, materialize_grads=True)
    values = dict(zip(("output", "h_n"), (x.detach() for x in outputs), strict=True))
    return values | dict(zip(wanted, gradients, strict=True))


def random_grads(inputs):
    """Gradients of output and h_n, in the inputs' dtype."""
    input, h0, *_ = inputs
    shapes = ((*input.shape[:-1], h0.shape[1]), h0.shape)
    return [torch.randn(shape, dtype=torch.float64).to(input.device, input.dtype) for shape in shapes]


def doubled(tensors):
    return [None if t is None else t.double() for t in tensors]


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_as_accurate_as_torchs(case, inputs, backend):
    """By the rule; of a single hidden feature only the results, its gradients may be nothing but rounding."""
    grads = random_grads(inputs)
    exact = results(loop_over_time, case, doubled(inputs), doubled(grads))
    theirs = results(loop_over_time, case, inputs, grads)
    with dlkernels.backend(backend):
        ours = results(dlkernels.reset_gate_rnn, case, inputs, grads)
    assert ours.keys() == exact.keys()
    for name in ("output", "h_n") if case.sizes[3] == 1 else exact:
        compare(ours[name], theirs[name], exact[name], inputs[0].dtype, gradient="grad" in name, name=name)


# ---- values ---------------------------------------------------------------------------------------


@each_dtype
@each_case(CASES.values())
def test_results_and_gradients_are_as_accurate_as_torchs(case, dtype, device):
    assert_as_accurate_as_torchs(case, case.make_inputs(dtype, device), "native")


@each_dtype
@each_case(of_each_form("", "_packed_reverse", "_no_bias", "_long"))
def test_reference_is_as_accurate_as_torch(case, dtype, device):
    assert_as_accurate_as_torchs(case, case.make_inputs(dtype, device), "reference")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@each_case(LARGE_CASES)
def test_large_ones_are_as_accurate_as_torchs(case, dtype, device):
    """With two threads; that their number does not change bits is another test's."""
    torch.set_num_threads(2)
    assert_as_accurate_as_torchs(case, case.make_inputs(dtype, device), "native")


@each_case(CASES.values())
def test_reference_backward_is_the_gradient(case):
    """The written-out backward equals what autograd derives from the forward and from torch's own operators."""
    inputs = case.make_inputs(torch.float64)
    grads = random_grads(inputs)
    exact = results(loop_over_time, case, inputs, grads)
    derived = results(reference.reset_gate_rnn, case, inputs, grads)
    written = reference.reset_gate_rnn_backward(grads, *inputs, **case.arguments)
    for name, ours in zip(NAMES, written, strict=True):
        if f"grad_{name}" in exact:
            torch.testing.assert_close(ours, exact[f"grad_{name}"])
            torch.testing.assert_close(ours, derived[f"grad_{name}"])
        else:
            assert ours is None


@each_case(CASES.values())
def test_backends_agree(case):
    inputs = case.make_inputs(torch.float64)
    grads = random_grads(inputs)
    made = {}
    for backend in BACKENDS:
        with dlkernels.backend(backend):
            made[backend] = results(dlkernels.reset_gate_rnn, case, inputs, grads)
    torch.testing.assert_close(made["native"], made["reference"])
    torch.testing.assert_close(made["native"], made["torch"])


# The forward's sigmoid and tanh alone: weights of 0 and 1, so that they are applied to the input itself.
def tanh_of(x):
    one = torch.ones(1, 1, dtype=x.dtype)
    weights = torch.cat([0 * one, one]), torch.zeros(2, 1, dtype=x.dtype)
    return dlkernels.reset_gate_rnn(x.view(1, -1, 1), x.new_zeros(len(x), 1), *weights)[1].flatten()


def sigmoid_of(x):
    one = torch.ones(1, 1, dtype=x.dtype)
    weights = torch.cat([one, 0 * one]), torch.zeros(2, 1, dtype=x.dtype)
    bias = torch.tensor([0.0, 50.0], dtype=x.dtype)  # tanh of it is 1
    return dlkernels.reset_gate_rnn(x.view(1, -1, 1), x.new_zeros(len(x), 1), *weights, bias, reset="output")[
        1
    ].flatten()


@pytest.mark.parametrize(("ours", "exact"), [(tanh_of, torch.tanh), (sigmoid_of, torch.sigmoid)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_activations_are_right_to_a_few_units_in_the_last_place(dtype, ours, exact):
    scales = [10.0**e for e in range(-30, 1)] + [2.0, 5.0, 10.0, 20.0, 80.0]
    x = torch.cat([scale * torch.linspace(-1, 1, 2001, dtype=torch.float64) for scale in scales]).to(dtype)
    y, right = ours(x), exact(x.double())
    if dtype == torch.float64:  # the yardstick is rounded itself
        assert ((y - right).abs() <= 8 * torch.finfo(dtype).eps * right.abs()).all()
    else:
        assert ((y.double() - right).abs() <= 3 * torch.finfo(dtype).eps * right.abs() + 1e-38).all()


@pytest.mark.parametrize("ours", [tanh_of, sigmoid_of])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_activations_saturate_and_keep_nan(dtype, ours):
    largest = torch.finfo(dtype).max
    x = torch.tensor([-largest, -1e4, -1e3, -0.0, 0.0, 1e3, 1e4, largest], dtype=dtype)
    exact = torch.tanh if ours is tanh_of else torch.sigmoid
    torch.testing.assert_close(ours(x), exact(x), rtol=0, atol=1e-38)
    assert ours(torch.tensor([float("nan")] * 3, dtype=dtype)).isnan().all()


# ---- the oracles -----------------------------------------------------------------------------------


def gru_without_update_gate(rnn):
    """nn.GRU with the parameters of `rnn`, its update gate z held at 0: h = (1 - z) * n + z * h_{t-1} = n."""
    options = {name: getattr(rnn, name) for name in ("num_layers", "bias", "batch_first", "dropout", "bidirectional")}
    gru = nn.GRU(rnn.input_size, rnn.hidden_size, **options).to(rnn.weight_ih_l0.dtype).train(rnn.training)
    with torch.no_grad():
        for (name, theirs), ours in zip(gru.named_parameters(), rnn.parameters(), strict=True):
            r, z, n = theirs.chunk(3)
            r.copy_(ours.chunk(2)[0])
            n.copy_(ours.chunk(2)[1])
            z.fill_(-1e9 if name.startswith("bias_ih") else 0.0)
    return gru


MODULES = {
    "plain": {},
    "two_layers": {"num_layers": 2},
    "batch_first": {"batch_first": True},
    "bidirectional": {"bidirectional": True},
    "everything": {"num_layers": 3, "batch_first": True, "bidirectional": True, "dropout": 0.3},
}


@each_backend
@pytest.mark.parametrize("given_hx", [False, True])
@pytest.mark.parametrize("kind", ["batched", "unbatched", "packed", "packed_unsorted"])
@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_after_is_nn_gru_whose_update_gate_is_held_at_0(options, kind, given_hx, backend):
    """Results and gradients in training, with the very same dropout masks."""
    rnn = dlkernels.ResetGateRNN(5, 7, dtype=torch.float64, **options)
    gru = gru_without_update_gate(rnn)
    sequences = [torch.randn(n, 5, dtype=torch.float64) for n in (4, 6, 1, 4)]
    if kind == "packed":
        sequences.sort(key=len, reverse=True)
    if kind.startswith("packed"):
        leaf = torch.cat(sequences).requires_grad_()
        input = pack_sequence(leaf.split([len(s) for s in sequences]), enforce_sorted=kind == "packed")
    else:
        shape = (6, 5) if kind == "unbatched" else (4, 6, 5) if rnn.batch_first else (6, 4, 5)
        input = leaf = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    hx = torch.randn(rnn.num_layers * (2 if rnn.bidirectional else 1), 4, 7, dtype=torch.float64, requires_grad=True)
    hx = hx.detach()[:, 0].requires_grad_() if kind == "unbatched" else hx
    made = []
    for module in rnn, gru:
        torch.manual_seed(1)
        with dlkernels.backend(backend):
            output, h_n = module(input, hx) if given_hx else module(input)
        data = output.data if isinstance(output, PackedSequence) else output
        loss = data.square().sum() + h_n.pow(3).sum()
        leaves = [leaf, *([hx] if given_hx else []), *module.parameters()]
        gradients = list(torch.autograd.grad(loss, leaves, retain_graph=True))
        if module is gru:  # without the update gate's
            first = 2 if given_hx else 1
            gradients[first:] = [g[torch.arange(3).ne(1).repeat_interleave(7)] for g in gradients[first:]]
        made.append([data, h_n, *gradients])
    if isinstance(output, PackedSequence):
        ours = rnn(input)[0]
        assert torch.equal(ours.batch_sizes, output.batch_sizes)
        for name in "sorted_indices", "unsorted_indices":
            a, b = getattr(ours, name), getattr(output, name)
            assert a is b is None or torch.equal(a, b)
    torch.testing.assert_close(*made)


@each_backend
def test_after_without_biases_is_nn_gru_where_the_update_gate_is_closed_by_its_input(backend):
    """Without biases to hold it, z is held by a feature that is always 1."""
    rnn = dlkernels.ResetGateRNN(5, 7, bias=False, dtype=torch.float64)
    gru = nn.GRU(6, 7, bias=False, dtype=torch.float64)
    with torch.no_grad():
        for theirs, ours in zip(gru.parameters(), rnn.parameters(), strict=True):
            theirs.zero_()
            for i, gate in (0, 0), (2, 1):
                theirs.chunk(3)[i][:, : ours.shape[1]] = ours.chunk(2)[gate]
        gru.weight_ih_l0.chunk(3)[1][:, 5] = -1e9
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    with dlkernels.backend(backend):
        ours = rnn(x)
    torch.testing.assert_close(ours, gru(torch.cat([x, torch.ones(6, 3, 1, dtype=torch.float64)], -1)))


@each_backend
@each_form
def test_a_layer_is_a_loop_of_its_cell(reset, backend):
    rnn = dlkernels.ResetGateRNN(5, 7, dtype=torch.float64, reset=reset)
    cell = dlkernels.ResetGateRNNCell(5, 7, dtype=torch.float64, reset=reset)
    cell.load_state_dict({name.removesuffix("_l0"): p for name, p in rnn.state_dict().items()})
    x, h = torch.randn(6, 3, 5, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    with dlkernels.backend(backend):
        output, h_n = rnn(x, h[None])
        for t in range(6):
            h = cell(x[t], h)
            torch.testing.assert_close(output[t], h)
        torch.testing.assert_close(h_n[0], h)
        gradients = [torch.autograd.grad(y.square().sum(), list(m.parameters())) for y, m in ((h_n, rnn), (h, cell))]
    torch.testing.assert_close(*gradients)


@each_of_ours
@each_dtype
@each_form
@pytest.mark.parametrize("cut", [1, 4, 8])
def test_carrying_h_over_a_cut_gives_the_bits_of_the_whole(cut, reset, dtype, backend):
    case = CASES[reset]
    input, h0, *parameters = case.make_inputs(dtype)
    with dlkernels.backend(backend):
        whole, last = dlkernels.reset_gate_rnn(input, h0, *parameters, reset=reset)
        first, h = dlkernels.reset_gate_rnn(input[:cut], h0, *parameters, reset=reset)
        second, h = dlkernels.reset_gate_rnn(input[cut:], h, *parameters, reset=reset)
    assert torch.equal(torch.cat([first, second]), whole)
    assert torch.equal(h, last)


@each_of_ours
@each_form
def test_gradients_flow_over_a_cut_unless_h_is_detached(reset, backend):
    """Truncated backpropagation through time: the second part's loss does not reach the first part's input."""
    case = CASES[reset]
    input, h0, *parameters = case.make_inputs(torch.float64)
    input.requires_grad_()
    with dlkernels.backend(backend):
        whole = dlkernels.reset_gate_rnn(input, h0, *parameters, reset=reset)[0]
        expected = torch.autograd.grad(whole[4:].square().sum(), input)[0]
        _, h = dlkernels.reset_gate_rnn(input[:4], h0, *parameters, reset=reset)
        for carried, begins in ((h, 0), (h.detach(), 4)):
            second, _ = dlkernels.reset_gate_rnn(input[4:], carried, *parameters, reset=reset)
            made = torch.autograd.grad(second.square().sum(), input, retain_graph=True)[0]
            torch.testing.assert_close(made[begins:], expected[begins:])
            assert (made[:begins] == 0).all()


@each_of_ours
@each_direction
@each_form
def test_packed_is_every_sequence_on_its_own(reset, reverse, backend):
    case = ResetGateRnnCase("packed", (9, 6, 10, 20), reset, (6, 6, 5, 3, 3, 3, 2, 1, 1), reverse=reverse)
    input, h0, *parameters = case.make_inputs(torch.float64)
    with dlkernels.backend(backend):
        output, h_n = dlkernels.reset_gate_rnn(input, h0, *parameters, **case.arguments)
        packed_input, packed_output = (PackedSequence(x, case.arguments["batch_sizes"]) for x in (input, output))
        padded_input, lengths = pad_packed_sequence(packed_input)
        padded_output, _ = pad_packed_sequence(packed_output)
        for b, length in enumerate(lengths):
            alone = padded_input[:length, b : b + 1]
            settings = {"reset": reset, "reverse": reverse}
            own, last = dlkernels.reset_gate_rnn(alone, h0[b : b + 1], *parameters, **settings)
            torch.testing.assert_close(padded_output[:length, b], own[:, 0])
            torch.testing.assert_close(h_n[b], last[0])


@each_backend
@each_form
@pytest.mark.parametrize("batch_first", [False, True])
def test_packed_is_padded_and_masked(batch_first, reset, backend):
    """The padding has no effect, and gets no gradient."""
    rnn = dlkernels.ResetGateRNN(5, 7, dtype=torch.float64, batch_first=batch_first, reset=reset)
    lengths = torch.tensor([3, 6, 1, 6])
    x = torch.randn((4, 6, 5) if batch_first else (6, 4, 5), dtype=torch.float64, requires_grad=True)
    inside = torch.arange(6)[:, None] < lengths
    inside = inside.T if batch_first else inside
    with dlkernels.backend(backend):
        packed, h_n = rnn(pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False))
        output, _ = pad_packed_sequence(packed, batch_first)
        whole, _ = rnn(x)
        gradient = torch.autograd.grad(output.square().sum(), x)[0]
        expected = torch.autograd.grad((whole * inside[..., None]).square().sum(), x)[0]
    torch.testing.assert_close(output, whole * inside[..., None])
    torch.testing.assert_close(gradient, expected)
    assert (gradient[~inside] == 0).all()
    last = [whole[i, n - 1] if batch_first else whole[n - 1, i] for i, n in enumerate(lengths)]
    torch.testing.assert_close(h_n[0], torch.stack(last))


@each_of_ours
@each_form
def test_reverse_is_the_forward_of_the_flipped_sequence(reset, backend):
    input, *others = CASES[reset].make_inputs(torch.float32)
    with dlkernels.backend(backend):
        output, h_n = dlkernels.reset_gate_rnn(input, *others, reset=reset, reverse=True)
        flipped, last = dlkernels.reset_gate_rnn(input.flip(0), *others, reset=reset)
    assert torch.equal(output, flipped.flip(0))
    assert torch.equal(h_n, last)


@each_backend
@each_form
def test_bidirectional_is_both_directions_side_by_side(reset, backend):
    both = dlkernels.ResetGateRNN(5, 7, bidirectional=True, dtype=torch.float64, reset=reset)
    one, other = (dlkernels.ResetGateRNN(5, 7, dtype=torch.float64, reset=reset) for _ in range(2))
    state = both.state_dict()
    one.load_state_dict({name: p for name, p in state.items() if "reverse" not in name})
    other.load_state_dict({name.removesuffix("_reverse"): p for name, p in state.items() if "reverse" in name})
    x, hx = torch.randn(6, 3, 5, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)
    with dlkernels.backend(backend):
        output, h_n = both(x, hx)
        ahead, last = one(x, hx[:1])
        back, first = other(x.flip(0), hx[1:])
    torch.testing.assert_close(output, torch.cat([ahead, back.flip(0)], -1))
    torch.testing.assert_close(h_n, torch.cat([last, first]))


@each_of_ours
@each_form
def test_sequences_do_not_know_each_other(reset, backend):
    """A batch in another order, or a part of it, has the same bits."""
    input, h0, *parameters = CASES[f"{reset}_17_sequences"].make_inputs(torch.float32)
    order = torch.randperm(17)
    with dlkernels.backend(backend):
        output, h_n = dlkernels.reset_gate_rnn(input, h0, *parameters, reset=reset)
        for some in order, order[:5], order[:1]:
            part, last = dlkernels.reset_gate_rnn(input[:, some], h0[some], *parameters, reset=reset)
            if backend == "native":
                assert torch.equal(part, output[:, some])
                assert torch.equal(last, h_n[some])
            else:  # torch's products choose their order of summation by size
                torch.testing.assert_close(part, output[:, some])


@each_of_ours
@each_form
def test_the_future_has_no_effect(reset, backend):
    input, *others = CASES[reset].make_inputs(torch.float32)
    later = input.clone()
    later[5:] = float("nan")
    with dlkernels.backend(backend):
        output = dlkernels.reset_gate_rnn(input, *others, reset=reset)[0]
        made = dlkernels.reset_gate_rnn(later, *others, reset=reset)[0]
    assert torch.equal(made[:5], output[:5])
    assert made[5:].isnan().all()


@each_of_ours
@each_dtype
@each_form
def test_states_stay_within_1(reset, dtype, backend):
    case = ResetGateRnnCase("large", (20, 3, 4, 10), reset)
    inputs = [100 * x for x in case.make_inputs(dtype)]
    with dlkernels.backend(backend):
        output = dlkernels.reset_gate_rnn(*inputs, reset=reset)[0]
    assert output.abs().max() <= 1


@each_backend
@each_direction
@pytest.mark.parametrize("batch_sizes", [None, ()], ids=["padded", "packed"])
def test_no_step_gives_a_copy_of_h0(batch_sizes, reverse, backend):
    case = ResetGateRnnCase("none", (0, 3, 4, 5), batch_sizes=batch_sizes, reverse=reverse)
    inputs = case.make_inputs(torch.float32)
    with dlkernels.backend(backend):
        made = results(dlkernels.reset_gate_rnn, case, inputs, [torch.ones(0), 2 * torch.ones(3, 5)][:0] or None)
    assert made["output"].shape == ((0, 5) if batch_sizes == () else (0, 3, 5))
    assert torch.equal(made["h_n"], inputs[1])
    assert made["h_n"].data_ptr() != inputs[1].data_ptr()
    assert torch.equal(made["grad_h0"], torch.ones(3, 5))
    for name in "weight_ih", "weight_hh", "bias_ih", "bias_hh":
        assert (made[f"grad_{name}"] == 0).all()


# ---- derivatives ----------------------------------------------------------------------------------

GRADCHECK_CASES = tuple(
    case
    for reset in FORMS
    for case in (
        ResetGateRnnCase(f"{reset}", (4, 2, 2, 3), reset),
        ResetGateRnnCase(f"{reset}_reverse_no_bias", (3, 2, 2, 3), reset, reverse=True, bias_ih=False, bias_hh=False),
        ResetGateRnnCase(f"{reset}_packed", (4, 3, 2, 2), reset, (3, 2, 2, 1), bias_ih=False),
        ResetGateRnnCase(f"{reset}_packed_reverse", (3, 3, 2, 2), reset, (3, 2, 1), reverse=True, bias_hh=False),
        ResetGateRnnCase(f"{reset}_one_step", (1, 1, 1, 1), reset),
    )
)


@each_of_ours
@each_case(GRADCHECK_CASES)
def test_first_and_second_derivatives_match_finite_differences(case, backend):
    present = {
        n: t.requires_grad_() for n, t in zip(NAMES, case.make_inputs(torch.float64), strict=True) if t is not None
    }

    def function(*tensors):
        with dlkernels.backend(backend):
            return dlkernels.reset_gate_rnn(**dict(zip(present, tensors, strict=True)), **case.arguments)

    assert torch.autograd.gradcheck(function, list(present.values()))
    assert torch.autograd.gradgradcheck(function, list(present.values()))


@pytest.mark.parametrize(
    "wanted", list(itertools.product([False, True], repeat=6)), ids=lambda w: "".join("01"[x] for x in w)
)
@each_of_ours
def test_every_subset_of_requires_grad(backend, wanted):
    """Gradients, and the gradients of their norm, equal torch's for exactly the tensors that ask."""
    case = CASES["after_packed"] if sum(wanted) % 2 else CASES["before_packed"]
    inputs = case.make_inputs(torch.float64)

    def derivatives(function):
        tensors = [t.detach().requires_grad_(asks) for t, asks in zip(inputs, wanted, strict=True)]
        output, h_n = function(*tensors, **case.arguments)
        assert output.requires_grad == h_n.requires_grad == any(wanted)
        asking = [t for t in tensors if t.requires_grad]
        if not asking:
            return [output, h_n]
        loss = output.square().sum() + h_n.pow(3).sum()
        first = torch.autograd.grad(loss, asking, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), asking)]

    with dlkernels.backend(backend):
        ours = derivatives(dlkernels.reset_gate_rnn)
    torch.testing.assert_close(ours, derivatives(loop_over_time))


@each_backend
@each_form
@pytest.mark.parametrize(
    "loss", [lambda y, h: y[3].sum(), lambda y, h: h.square().sum(), lambda y, h: y.sum() * 0 + h.sum()]
)
def test_only_one_result_may_be_used(loss, reset, backend):
    case = CASES[reset]

    def gradients(function):
        leaves = [
            t.requires_grad_() for t in case.make_inputs(torch.float64, generator=torch.Generator().manual_seed(1))
        ]
        first = torch.autograd.grad(loss(*function(*leaves, reset=reset)), leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]

    with dlkernels.backend(backend):
        ours = gradients(dlkernels.reset_gate_rnn)
    torch.testing.assert_close(ours, gradients(loop_over_time))


def test_gradients_accumulate_in_leaves():
    rnn, x = dlkernels.ResetGateRNN(5, 7), torch.randn(4, 3, 5)
    rnn(x)[0].square().sum().backward()
    once = rnn.weight_hh_l0.grad.clone()
    rnn(x)[0].square().sum().backward()
    assert torch.equal(rnn.weight_hh_l0.grad, once + once)


# ---- memory ---------------------------------------------------------------------------------------


VIEWS_OF_SEQUENCES = VIEWS | {
    "batch_first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 1 else t,
}


@pytest.mark.parametrize(
    ("backend", "argument"), [*(("native", name) for name in (*NAMES, "grad_output", "grad_h_n")), ("reference", "all")]
)
@pytest.mark.parametrize("view", VIEWS_OF_SEQUENCES)
@each_case([CASES["after"], CASES["before_packed_reverse"]])
def test_any_strides_give_the_same_values(case, view, backend, argument):
    inputs = case.make_inputs(torch.float64)
    tensors = dict(zip((*NAMES, "grad_output", "grad_h_n"), (*inputs, *random_grads(inputs)), strict=True))
    for name in tensors if argument == "all" else [argument]:
        tensors[name] = VIEWS_OF_SEQUENCES[view](tensors[name])
    *copies, copy_output, copy_h_n = (t.clone(memory_format=torch.contiguous_format) for t in tensors.values())
    exact = results(loop_over_time, case, copies, [copy_output, copy_h_n])
    *inputs, grad_output, grad_h_n = tensors.values()
    with dlkernels.backend(backend):
        ours = results(dlkernels.reset_gate_rnn, case, inputs, [grad_output, grad_h_n])
    torch.testing.assert_close(ours, exact)


@each_of_ours
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_case(of_each_form("", "_packed", "_one_step"))
def test_inputs_are_not_modified_and_not_aliased(case, dtype, backend):
    inputs = case.make_inputs(dtype)
    grads = random_grads(inputs)
    given = [*inputs, *grads]
    before = [(t.clone(), t._version) for t in given]
    with dlkernels.backend(backend):
        made = results(dlkernels.reset_gate_rnn, case, inputs, grads).values()
    for tensor, (bits, version) in zip(given, before, strict=True):
        assert torch.equal(tensor, bits)
        assert tensor._version == version
    pointers = [t.untyped_storage().data_ptr() for t in (*given, *made)]
    assert len(set(pointers)) == len(pointers)


@each_case(CASES.values())
def test_fake_kernel_tells_shape_strides_and_dtype(case):
    inputs = case.make_inputs(torch.bfloat16)
    fake = [None if t is None else t.to("meta") for t in inputs]
    real, told = results(dlkernels.reset_gate_rnn, case, inputs), results(dlkernels.reset_gate_rnn, case, fake)
    assert real.keys() == told.keys()
    for name in real:
        a, b = real[name], told[name]
        assert (a.shape, a.stride(), a.dtype, b.device.type) == (b.shape, b.stride(), b.dtype, "meta"), name


@each_backend
@each_form
def test_empty_batch(reset, backend):
    """An empty result of the right shape, and gradients of zeros."""
    rnn = dlkernels.ResetGateRNN(5, 7, 2, bidirectional=True, reset=reset)
    x = torch.randn(4, 0, 5, requires_grad=True)
    with dlkernels.backend(backend):
        output, h_n = rnn(x)
        output.sum().backward()
    assert (output.shape, h_n.shape, x.grad.shape) == ((4, 0, 14), (4, 0, 7), (4, 0, 5))
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in rnn.parameters())


# ---- errors ---------------------------------------------------------------------------------------

X, H0, W_X, W_H, B_X = torch.ones(3, 2, 4), torch.ones(2, 5), torch.ones(10, 4), torch.ones(10, 5), torch.ones(10)
SIZES = torch.tensor([2, 1])
BAD_CALLS = {
    "input of 2 dimensions": ((X[0], H0, W_X, W_H), {}, "input"),
    "input of 4 dimensions": ((X[None], H0, W_X, W_H), {}, "input"),
    "packed input of 3 dimensions": ((X, H0, W_X, W_H), {"batch_sizes": SIZES}, "input"),
    "input too narrow": ((X[..., :3], H0, W_X, W_H), {}, "weight_ih"),
    "integer input": ((X.long(), H0.long(), W_X.long(), W_H.long()), {}, "input"),
    "complex input": (tuple(t.to(torch.complex64) for t in (X, H0, W_X, W_H)), {}, "input"),
    "h0 of 3 dimensions": ((X, H0[None], W_X, W_H), {}, "h0"),
    "h0 of another batch": ((X, torch.ones(3, 5), W_X, W_H), {}, "h0"),
    "h0 too wide": ((X, torch.ones(2, 6), W_X, W_H), {}, "weight_ih|weight_hh"),
    "h0 of another dtype": ((X, H0.double(), W_X, W_H), {}, "h0"),
    "h0 on another device": ((X, H0.to("meta"), W_X, W_H), {}, "h0"),
    "weight_ih with three gates": ((X, H0, torch.ones(15, 4), W_H), {}, "weight_ih"),
    "weight_ih transposed": ((X, H0, W_X.T, W_H), {}, "weight_ih"),
    "weight_ih of another dtype": ((X, H0, W_X.double(), W_H), {}, "weight_ih"),
    "weight_ih on another device": ((X, H0, W_X.to("meta"), W_H), {}, "weight_ih"),
    "weight_hh too small": ((X, H0, W_X, W_H[:, :4]), {}, "weight_hh"),
    "weight_hh of another dtype": ((X, H0, W_X, W_H.bfloat16()), {}, "weight_hh"),
    "bias_ih too short": ((X, H0, W_X, W_H, B_X[:5]), {}, "bias_ih"),
    "bias_ih of another dtype": ((X, H0, W_X, W_H, B_X.half()), {}, "bias_ih"),
    "bias_hh too long": ((X, H0, W_X, W_H, None, torch.ones(15)), {}, "bias_hh"),
    "bias_hh on another device": ((X, H0, W_X, W_H, None, B_X.to("meta")), {}, "bias_hh"),
    "batch_sizes of int32": ((X[:, 0], H0, W_X, W_H), {"batch_sizes": SIZES.int()}, "batch_sizes"),
    "batch_sizes on another device": ((X[:, 0], H0, W_X, W_H), {"batch_sizes": SIZES.to("meta")}, "batch_sizes"),
    "batch_sizes of 2 dimensions": ((X[:, 0], H0, W_X, W_H), {"batch_sizes": SIZES[None]}, "batch_sizes"),
    "batch_sizes grow": ((X[:, 0], H0, W_X, W_H), {"batch_sizes": SIZES.flip(0)}, "batch_sizes"),
    "batch_sizes are not the rows": ((X[:, 0], H0, W_X, W_H), {"batch_sizes": torch.tensor([2, 2])}, "batch_sizes"),
    "batch_sizes do not begin with B": (
        (X[:, 0], H0, W_X, W_H),
        {"batch_sizes": torch.tensor([1, 1, 1])},
        "batch_sizes",
    ),
    "batch_sizes with a 0": ((X[:, 0], H0, W_X, W_H), {"batch_sizes": torch.tensor([2, 1, 0])}, "batch_sizes"),
    "batch_sizes below 0": ((X[:, 0], H0, W_X, W_H), {"batch_sizes": torch.tensor([2, 2, -1])}, "batch_sizes"),
}
NO_TENSORS = {
    "input is a list": (([[[1.0]]], H0, W_X, W_H), "input"),
    "no h0": ((X, None, W_X, W_H), "h0"),
    "weight_hh is a number": ((X, H0, W_X, 1.0), "weight_hh"),
    "bias_ih is a list": ((X, H0, W_X, W_H, [0.0] * 10), "bias_ih"),
    "batch_sizes are a list": ((X, H0, W_X, W_H, None, None, "after", [2, 1]), "batch_sizes"),
}


@pytest.mark.parametrize("call", BAD_CALLS)
@each_of_ours
def test_bad_calls_name_the_argument(backend, call):
    arguments, settings, names = BAD_CALLS[call]
    with dlkernels.backend(backend), pytest.raises(RuntimeError, match=rf"\b({names})\b"):
        dlkernels.reset_gate_rnn(*arguments, **settings)


@pytest.mark.parametrize("call", BAD_CALLS)
def test_bad_calls_fail_in_the_reference_itself(call):
    arguments, settings, names = BAD_CALLS[call]
    with pytest.raises(RuntimeError, match=rf"\b({names})\b"):
        reference.reset_gate_rnn(*arguments, **settings)
    with pytest.raises(RuntimeError, match=rf"\b({names})\b"):
        reference.reset_gate_rnn_backward((X[..., :1], H0), *arguments, **settings)


@pytest.mark.parametrize("grads", [(torch.ones(3, 2, 4), H0), (torch.ones(3, 2, 5), H0[:1])], ids=["output", "h_n"])
def test_gradients_of_another_shape_are_refused(grads):
    with pytest.raises(RuntimeError, match="grad_"):
        reference.reset_gate_rnn_backward(grads, X, H0, W_X, W_H)
    output, _, gates = torch.ops.dlkernels.reset_gate_rnn(X, H0, W_X, W_H, None, None, None, 0, False, True)
    settings = (None, None, output, gates, None, 0, False, [True] * 4 + [False] * 2)
    with pytest.raises(RuntimeError, match="grad_"):
        torch.ops.dlkernels.reset_gate_rnn_backward(*grads, X, H0, W_X, W_H, *settings)


@pytest.mark.parametrize("call", NO_TENSORS)
@each_backend
def test_what_is_no_tensor_names_the_argument(backend, call):
    arguments, name = NO_TENSORS[call]
    with dlkernels.backend(backend), pytest.raises(TypeError, match=rf"\b{name}\b"):
        dlkernels.reset_gate_rnn(*arguments)


def test_unknown_forms_are_refused():
    for make in (
        lambda: dlkernels.reset_gate_rnn(X, H0, W_X, W_H, reset="never"),
        lambda: reference.reset_gate_rnn(X, H0, W_X, W_H, reset="never"),
        lambda: dlkernels.ResetGateRNN(4, 5, reset=None),
        lambda: dlkernels.ResetGateRNNCell(4, 5, reset="After"),
    ):
        with pytest.raises(ValueError, match="'after', 'before'"):
            make()


def error_of(call):
    with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
        call()
    return type(caught.value), str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"input_size": 0},
        {"hidden_size": 0},
        {"hidden_size": 3.5},
        {"input_size": "5"},
        {"num_layers": 0},
        {"bias": 1},
        {"batch_first": "yes"},
        {"dropout": 1.5},
        {"dropout": -0.1},
        {"dropout": True},
    ],
    ids=str,
)
def test_bad_modules_fail_as_nn_grus(options):
    options = {"input_size": 5, "hidden_size": 7} | options
    assert error_of(lambda: dlkernels.ResetGateRNN(**options)) == error_of(lambda: nn.GRU(**options))


PACKED = pack_sequence([torch.ones(3, 5), torch.ones(2, 5)])
BAD_FORWARDS = {
    "one dimension": (torch.ones(5),),
    "four dimensions": (torch.ones(1, 2, 3, 5),),
    "other features": (torch.ones(3, 2, 4),),
    "another dtype": (torch.ones(3, 2, 5, dtype=torch.float64),),
    "no step": (torch.ones(0, 2, 5),),
    "2-D hx for batched input": (torch.ones(3, 2, 5), torch.ones(2, 7)),
    "3-D hx for unbatched input": (torch.ones(3, 5), torch.ones(1, 1, 7)),
    "hx of another batch": (torch.ones(3, 2, 5), torch.ones(1, 3, 7)),
    "hx of other layers": (torch.ones(3, 2, 5), torch.ones(2, 2, 7)),
    "hx of another width": (torch.ones(3, 2, 5), torch.ones(1, 2, 6)),
    "hx of another batch, packed": (PACKED, torch.ones(1, 3, 7)),
    "hx of 2 dimensions, packed": (PACKED, torch.ones(2, 7)),
    "other features, packed": (PACKED._replace(data=torch.ones(5, 4)),),
}


@pytest.mark.parametrize("call", BAD_FORWARDS)
@each_backend
def test_bad_forwards_fail_as_nn_grus(backend, call):
    arguments = BAD_FORWARDS[call]
    kind, text = error_of(lambda: nn.GRU(5, 7)(*arguments))
    with dlkernels.backend(backend):
        assert error_of(lambda: dlkernels.ResetGateRNN(5, 7)(*arguments)) == (
            kind,
            text.replace("GRU:", "ResetGateRNN:"),
        )


BAD_CELL_CALLS = {
    "no dimension": (torch.tensor(1.0),),
    "three dimensions": (torch.ones(1, 2, 5),),
    "hx of three dimensions": (torch.ones(2, 5), torch.ones(1, 2, 7)),
    "other features": (torch.ones(2, 4),),
    "hx of another batch": (torch.ones(2, 5), torch.ones(3, 7)),
    "hx of another width": (torch.ones(2, 5), torch.ones(2, 6)),
}


@pytest.mark.parametrize("call", BAD_CELL_CALLS)
def test_bad_cell_calls_fail_as_nn_gru_cells(call):
    arguments = BAD_CELL_CALLS[call]
    kind, text = error_of(lambda: nn.GRUCell(5, 7)(*arguments))
    ours = error_of(lambda: dlkernels.ResetGateRNNCell(5, 7)(*arguments))
    assert ours == (kind, text.replace("GRUCell:", "ResetGateRNNCell:"))


def test_dropout_of_a_single_layer_is_warned_about():
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last recurrent layer"):
        dlkernels.ResetGateRNN(5, 7, dropout=0.1)


# ---- numbers that are not ordinary -----------------------------------------------------------------


@each_of_ours
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_form
def test_nan_stays_in_its_sequence_and_after_its_step(reset, dtype, backend, device):
    case = CASES[reset]
    input, *others = case.make_inputs(dtype, device)
    spoiled = input.clone()
    spoiled[3, 1, 4] = float("nan")
    with dlkernels.backend(backend):
        clean = dlkernels.reset_gate_rnn(input, *others, reset=reset)[0]
        output = dlkernels.reset_gate_rnn(spoiled, *others, reset=reset)[0]
    rest = torch.arange(input.shape[1], device=device) != 1
    assert torch.equal(output[:, rest], clean[:, rest])
    assert torch.equal(output[:3, 1], clean[:3, 1])
    assert output[3:, 1].isnan().all()


@each_of_ours
@each_dtype
@each_form
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_saturated_gates_have_finite_gradients(size, reset, dtype, backend, device):
    case = CASES[reset]
    input, *others = case.make_inputs(dtype, device)
    with dlkernels.backend(backend):
        ours = results(dlkernels.reset_gate_rnn, case, (input * size, *others))
    assert all(value.isfinite().all() for value in ours.values())


@each_of_ours
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_form
def test_denormals_give_finite_results(reset, dtype, backend, device):
    """Read as they are or as 0: beside what else is added they are nothing."""
    case = CASES[f"{reset}_no_bias"]
    small = 1e-7 if dtype == torch.float16 else 1e-40
    inputs = [None if x is None else (x.double() * small).to(dtype) for x in case.make_inputs(dtype, device)]
    with dlkernels.backend(backend):
        ours = results(dlkernels.reset_gate_rnn, case, inputs)
    assert all(value.isfinite().all() for value in ours.values())
    assert ours["output"].abs().max() < (1e-3 if dtype == torch.float16 else 1e-30)


def test_denormals_are_as_before_after_a_call():
    """The processor's way with denormals belongs to the caller."""
    dlkernels.reset_gate_rnn(torch.randn(9, 20, 30), torch.zeros(20, 40), torch.randn(80, 30), torch.randn(80, 40))
    assert (torch.full((100,), 1e-40) * 0.5 != 0).all()


# ---- modules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_parameters_are_nn_grus_with_two_gates(options, bias):
    ours, theirs = dlkernels.ResetGateRNN(5, 7, bias=bias, **options), nn.GRU(5, 7, bias=bias, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [[p.shape for p in layer] for layer in ours.all_weights] == [
        [(2 * 7, *p.shape[1:]) for p in layer] for layer in theirs.all_weights
    ]
    assert [id(p) for layer in ours.all_weights for p in layer] == [id(p) for p in ours.parameters()]
    for name in "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional":
        assert getattr(ours, name) == getattr(theirs, name)
    assert isinstance(ours, nn.RNNBase)
    ours.flatten_parameters()


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_of_a_cell_are_nn_gru_cells_with_two_gates(bias):
    ours, theirs = dlkernels.ResetGateRNNCell(5, 7, bias), nn.GRUCell(5, 7, bias)
    assert {name: (14, *p.shape[1:]) for name, p in theirs.named_parameters()} == {
        name: tuple(p.shape) for name, p in ours.named_parameters()
    }
    assert (ours.bias_ih is None) == (theirs.bias_ih is None) == (not bias)


@pytest.mark.parametrize(
    "make", [lambda: dlkernels.ResetGateRNN(50, 64, 2), lambda: dlkernels.ResetGateRNNCell(50, 64)]
)
def test_parameters_are_uniform_within_1_over_root_of_h(make):
    module = make()
    for _ in range(2):
        for p in module.parameters():
            assert p.abs().max() <= 1 / 8
            assert abs(p.std().item() - (1 / 8) / 3**0.5) < 0.02
        before = [p.clone() for p in module.parameters()]
        module.reset_parameters()
        assert not any(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))


def test_options_may_come_by_position():
    rnn = dlkernels.ResetGateRNN(5, 7, 2, False, True, 0.25, True, "cpu", torch.float64, "before")
    assert (rnn.num_layers, rnn.bias, rnn.batch_first, rnn.dropout) == (2, False, True, 0.25)
    assert (rnn.bidirectional, rnn.weight_ih_l0.dtype, rnn.reset) == (True, torch.float64, "before")
    cell = dlkernels.ResetGateRNNCell(5, 7, False, "cpu", torch.float64, "output")
    assert (cell.bias, cell.weight_ih.dtype, cell.reset) == (False, torch.float64, "output")


def test_extra_repr():
    text = repr(dlkernels.ResetGateRNN(5, 7, 2, bias=False, batch_first=True, reset="before"))
    assert text == "ResetGateRNN(5, 7, num_layers=2, bias=False, batch_first=True, reset='before')"
    assert repr(dlkernels.ResetGateRNNCell(5, 7)) == "ResetGateRNNCell(5, 7, reset='after')"


def copied_by_pickle(module):
    return pickle.loads(pickle.dumps(module))


def copied_by_save(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, copied_by_pickle, copied_by_save])
@pytest.mark.parametrize(
    "make",
    [lambda: dlkernels.ResetGateRNN(5, 7, 2, reset="output"), lambda: dlkernels.ResetGateRNNCell(5, 7, reset="before")],
)
def test_modules_copy(make, copied):
    module, x = make(), torch.randn(4, 5)
    other = copied(module)
    assert type(other) is type(module)
    assert repr(other) == repr(module)
    torch.testing.assert_close(other(x), module(x), rtol=0, atol=0)
    assert next(other.parameters()).data_ptr() != next(module.parameters()).data_ptr()


def test_module_factory_arguments():
    assert dlkernels.ResetGateRNN(5, 7, device="meta").weight_hh_l0.device.type == "meta"
    assert dlkernels.ResetGateRNN(5, 7, dtype=torch.bfloat16).bias_hh_l0.dtype == torch.bfloat16
    materialised = dlkernels.ResetGateRNN(5, 7, device="meta").to_empty(device="cpu")
    materialised.reset_parameters()
    assert materialised(torch.randn(3, 2, 5))[0].isfinite().all()


def test_making_a_module_draws_only_its_own_parameters():
    """No random number goes to parameters that are thrown away."""
    torch.manual_seed(3)
    rnn = dlkernels.ResetGateRNN(5, 7)
    torch.manual_seed(3)
    for p in rnn.parameters():
        assert torch.equal(p, nn.init.uniform_(torch.empty_like(p), -(7**-0.5), 7**-0.5))


@each_dtype
def test_modules_move_to_dtype(dtype):
    output, h_n = dlkernels.ResetGateRNN(5, 7).to(dtype)(torch.randn(3, 2, 5).to(dtype))
    assert output.dtype == h_n.dtype == dtype
    assert dlkernels.ResetGateRNNCell(5, 7).to(dtype)(torch.randn(2, 5).to(dtype)).dtype == dtype


def test_assigned_and_functional_parameters_are_used():
    rnn, x = dlkernels.ResetGateRNN(5, 7), torch.randn(3, 2, 5)
    other = dlkernels.ResetGateRNN(5, 7)
    expected = other(x)
    called = torch.func.functional_call(rnn, dict(other.named_parameters()), (x,))
    torch.testing.assert_close(called, expected, rtol=0, atol=0)
    for name, p in other.named_parameters():
        setattr(rnn, name, p)
    torch.testing.assert_close(rnn(x), expected, rtol=0, atol=0)
    assert all(a is b for a, b in zip(rnn.all_weights[0], other.parameters(), strict=True))


@each_backend
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("given_hx", [False, True])
def test_cell_takes_batches_and_single_rows(given_hx, batched, backend):
    cell = dlkernels.ResetGateRNNCell(5, 7, dtype=torch.float64)
    x, h = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    state = h if given_hx else torch.zeros_like(h)
    expected = loop_over_time(x[None], state, *cell.parameters())[1]
    with dlkernels.backend(backend):
        if batched:
            torch.testing.assert_close(cell(x, h) if given_hx else cell(x), expected)
        else:
            torch.testing.assert_close(cell(x[0], h[0]) if given_hx else cell(x[0]), expected[0])


@each_backend
def test_dropout_works_between_layers_only_and_only_in_training(backend):
    rnn = dlkernels.ResetGateRNN(5, 7, 2, dropout=1.0)
    x = torch.randn(3, 2, 5)
    with dlkernels.backend(backend):
        blind, other = rnn(x)[0], rnn(torch.randn(3, 2, 5))[0]
        assert torch.equal(blind, other)  # the second layer sees zeros only
        assert (blind != 0).all()
        assert not torch.equal(rnn.eval()(x)[0], rnn(torch.randn(3, 2, 5))[0])


@each_form
def test_training_follows_torchs_operators_step_by_step(reset):
    """A sum over a sequence is learned, with the same losses on every backend."""
    x = torch.randn(12, 16, 3)
    target = x.sum(0)[:, :1] / 4
    losses = {}
    for backend in BACKENDS:
        torch.manual_seed(4)
        rnn, head = dlkernels.ResetGateRNN(3, 16, reset=reset), nn.Linear(16, 1)
        optimizer = torch.optim.Adam([*rnn.parameters(), *head.parameters()], lr=0.02)
        history = []
        for _ in range(15):
            with dlkernels.backend(backend):
                loss = (head(rnn(x)[1][0]) - target).square().mean()
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses[backend] = torch.tensor(history)
    assert losses["native"][-1] < losses["native"][0] / 2
    torch.testing.assert_close(losses["native"], losses["reference"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(losses["native"], losses["torch"], rtol=1e-3, atol=1e-4)


# ---- autocast, modes, checkpoint -------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_runs_in_its_dtype(dtype, backend, device):
    """The results are those of the cast arguments; gradients come back in the arguments' dtype."""
    case = CASES["after"]
    inputs = case.make_inputs(torch.float32, device)
    with dlkernels.backend(backend):
        expected = dlkernels.reset_gate_rnn(*(t.to(dtype) for t in inputs))
        with torch.autocast(device, dtype):
            ours = results(dlkernels.reset_gate_rnn, case, inputs)
    assert ours["output"].dtype == ours["h_n"].dtype == dtype
    torch.testing.assert_close((ours["output"], ours["h_n"]), expected)
    assert all(ours[f"grad_{name}"].dtype == torch.float32 for name in NAMES)


@each_backend
def test_autocast_leaves_float64_alone_and_takes_mixed_arguments(backend):
    inputs = CASES["after"].make_inputs(torch.float64)
    with dlkernels.backend(backend), torch.autocast("cpu", torch.bfloat16):
        assert dlkernels.reset_gate_rnn(*inputs)[0].dtype == torch.float64
        mixed = [t.to(dtype) for t, dtype in zip(inputs, [torch.bfloat16, *[torch.float32] * 5], strict=True)]
        assert dlkernels.reset_gate_rnn(*mixed)[0].dtype == torch.bfloat16
        rnn = dlkernels.ResetGateRNN(10, 20, 2)
        assert rnn(mixed[0])[1].dtype == torch.bfloat16


def test_direct_calls_of_the_operator_under_autocast():
    inputs = CASES["after"].make_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, *_ = torch.ops.dlkernels.reset_gate_rnn(*inputs, None, 0, False, False)
    assert output.dtype == torch.bfloat16


@each_backend
@each_form
def test_no_grad_and_inference_mode(reset, backend):
    rnn, x = dlkernels.ResetGateRNN(5, 7, reset=reset), torch.randn(4, 3, 5)
    with dlkernels.backend(backend):
        expected = rnn(x)
        assert expected[0].requires_grad
        for mode in torch.no_grad, torch.inference_mode:
            with mode():
                output = rnn(x)
            assert not output[0].requires_grad
            assert output[0].is_inference() == (mode is torch.inference_mode)
            torch.testing.assert_close(output, expected, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
@each_of_ours
def test_checkpoint(backend, reentrant):
    rnn, x = dlkernels.ResetGateRNN(5, 7, 2), torch.randn(4, 3, 5, requires_grad=True)
    with dlkernels.backend(backend):
        expected = torch.autograd.grad(rnn(x)[0].square().sum(), x)
        checkpoint(rnn, x, use_reentrant=reentrant)[0].square().sum().backward()
    assert torch.equal(x.grad, expected[0])


# ---- dispatcher, compile, export --------------------------------------------------------------------

OPERATORS = torch.ops.dlkernels


def internal_arguments(case, dtype=torch.float32, save=True):
    inputs = [None if t is None else t.requires_grad_() for t in case.make_inputs(dtype)]
    return *inputs, case.arguments["batch_sizes"], FORMS.index(case.reset), case.reverse, save


INTERNAL_CASES = [
    *of_each_form("", "_packed_reverse"),
    *(CASES[name] for name in ("after_no_bias", "before_bias_hh", "output_no_step", "after_no_sequence")),
]


@each_case(INTERNAL_CASES)
def test_opcheck_forward(case):
    torch.library.opcheck(OPERATORS.reset_gate_rnn, internal_arguments(case))


@pytest.mark.parametrize(
    ("mask", "given"),
    [
        ([True] * 6, (True, True)),
        ([True, False, False, True, False, True], (True, False)),
        ([False, True, True, False, True, False], (False, True)),
    ],
    ids=["all", "output", "h_n"],
)
@each_case([CASES["after"], CASES["before_packed"], CASES["output"]])
def test_opcheck_backward(case, mask, given):
    """The second derivative is the reference's loop over batch_sizes: of packed sequences it cannot be traced."""
    *inputs, batch_sizes, reset, reverse, _ = internal_arguments(case)
    with torch.no_grad():
        output, _, gates = OPERATORS.reset_gate_rnn(*inputs, batch_sizes, reset, reverse, True)
    grads = [g.requires_grad_() if there else None for g, there in zip(random_grads(inputs), given, strict=True)]
    arguments = (*grads, *inputs, output, gates, batch_sizes, reset, reverse, mask)
    if batch_sizes is not None:
        arguments = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
    made = OPERATORS.reset_gate_rnn_backward(*arguments)
    assert [t is not None for t in made] == mask
    torch.library.opcheck(OPERATORS.reset_gate_rnn_backward, arguments)


class Network(nn.Module):
    def __init__(self, reset):
        super().__init__()
        torch.manual_seed(3)
        self.rnn = dlkernels.ResetGateRNN(5, 7, 2, bidirectional=True, batch_first=True, reset=reset)
        self.cell = dlkernels.ResetGateRNNCell(14, 3, reset=reset)

    def forward(self, x):
        output, h_n = self.rnn(x)
        return self.cell(output[:, -1]), h_n.sum()


def loss_and_gradients(model, x):
    x = x.detach().requires_grad_()
    h, total = model(x)
    loss = (h - 0.3).pow(3).sum() + total
    return [loss, *torch.autograd.grad(loss, [x, *model.parameters()])]


@pytest.mark.compile
@each_form
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic, reset):
    torch._dynamo.reset()
    model = Network(reset)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in [(4, 6, 5), (3, 6, 5), (3, 8, 5)] if dynamic else [(4, 6, 5)]:
        x = torch.randn(shape)
        torch.testing.assert_close(loss_and_gradients(compiled, x), loss_and_gradients(model, x))


@pytest.mark.compile
def test_reference_compiles_into_one_graph():
    """A loop over time is as many turns in the graph: two are enough."""
    torch._dynamo.reset()
    model, x = Network("before"), torch.randn(2, 2, 5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with dlkernels.backend("reference"):
        torch.testing.assert_close(loss_and_gradients(compiled, x), loss_and_gradients(model, x))


@pytest.mark.compile
@each_direction
def test_packed_sequences_compile(reverse):
    torch._dynamo.reset()
    case = ResetGateRnnCase("packed", (4, 3, 5, 7), batch_sizes=(3, 2, 2, 1), reverse=reverse)
    inputs = case.make_inputs(torch.float32)
    compiled = torch.compile(dlkernels.reset_gate_rnn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, case, inputs), results(dlkernels.reset_gate_rnn, case, inputs))


@pytest.mark.compile
def test_compiled_code_sees_the_operators():
    """Tracing keeps our operators instead of taking them apart."""
    torch._dynamo.reset()
    seen = []

    def recording(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(dlkernels.ResetGateRNN(5, 7), fullgraph=True, backend=aot_autograd(fw_compiler=recording))
    compiled(torch.randn(4, 3, 5))[0].square().sum().backward()
    assert {f"dlkernels.{name}.default" for name in ("reset_gate_rnn", "reset_gate_rnn_backward")} <= set(seen)


@pytest.mark.compile
@pytest.mark.slow
def test_compiles_with_inductor():
    torch._dynamo.reset()
    model, x = Network("before"), torch.randn(4, 6, 5)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(loss_and_gradients(compiled, x), loss_and_gradients(model, x))


@pytest.mark.compile
@pytest.mark.parametrize("strict", [False, True])
@each_form
def test_exports_with_dynamic_batch_and_time(reset, strict):
    model = Network(reset)
    dynamic = ({0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("time", min=2)},)
    program = torch.export.export(model, (torch.randn(4, 6, 5),), dynamic_shapes=dynamic, strict=strict)
    x = torch.randn(3, 9, 5)
    torch.testing.assert_close(program.module()(x), model(x))
    assert any("dlkernels.reset_gate_rnn" in str(node.target) for node in program.graph.nodes)


# ---- function transforms -----------------------------------------------------------------------------


@each_of_ours
@pytest.mark.parametrize(
    "in_dims",
    [
        (0, None, None, None, None, None),
        (None, 0, None, None, None, None),
        (None, None, 0, 1, None, None),
        (0, 0, None, None, None, 0),
        (2, 1, 0, 0, 1, 0),
    ],
    ids=str,
)
@each_form
def test_vmap_is_a_loop(reset, in_dims, backend):
    shapes = ((4, 2, 3), (2, 5), (10, 3), (10, 5), (10,), (10,))
    tensors = [
        torch.randn(shape if dim is None else (*shape[:dim], 3, *shape[dim:]), dtype=torch.float64)
        for shape, dim in zip(shapes, in_dims, strict=True)
    ]
    slices = [
        [t if dim is None else t.select(dim, i) for t, dim in zip(tensors, in_dims, strict=True)] for i in range(3)
    ]
    with dlkernels.backend(backend):
        mapped = torch.func.vmap(lambda *args: dlkernels.reset_gate_rnn(*args, reset=reset), in_dims)(*tensors)
    expected = [loop_over_time(*part, reset=reset) for part in slices]
    torch.testing.assert_close(mapped, tuple(torch.stack(parts) for parts in zip(*expected, strict=True)))


@each_of_ours
def test_vmap_of_packed_sequences(backend):
    case = CASES["before_packed_reverse"]
    input, *others = case.make_inputs(torch.float64)
    inputs = torch.stack([input, -input])
    with dlkernels.backend(backend):
        mapped = torch.func.vmap(lambda x: dlkernels.reset_gate_rnn(x, *others, **case.arguments)[0])(inputs)
    expected = [loop_over_time(x, *others, **case.arguments)[0] for x in inputs]
    torch.testing.assert_close(mapped, torch.stack(expected))


def loss_with(function, reset):
    def loss(w, h, x):
        output, h_n = function(x, h, w[:, :3], w[:, 3:8], w[:, 8], w[:, 9], reset=reset)
        return output.pow(3).sum() + h_n.square().sum()

    return loss


TRANSFORMS = {
    "grad": lambda loss, w, h, x: torch.func.grad(loss, (0, 1, 2))(w, h, x),
    "per_sample_gradients": lambda loss, w, h, x: torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), (None, None, 0))(
        w, h, torch.stack([x, 2 * x])
    ),
    "grad_of_grad": lambda loss, w, h, x: torch.func.grad(
        lambda v: sum(g.square().sum() for g in torch.func.grad(loss, (0, 2))(v, h, x))
    )(w),
    "grad_of_per_sample_norms": lambda loss, w, h, x: torch.func.grad(
        lambda v: torch.func.vmap(torch.func.grad(loss), (None, None, 0))(v, h, torch.stack([x, -x])).square().sum()
    )(w),
    "vjp": lambda loss, w, h, x: torch.func.vjp(loss, w, h, x)[1](torch.tensor(2.0, dtype=x.dtype)),
    "jacrev": lambda loss, w, h, x: torch.func.jacrev(lambda v: torch.func.grad(loss)(w, v, x))(h),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@each_of_ours
@each_form
def test_function_transforms_equal_torchs(reset, backend, transform):
    w, h, x = (torch.randn(shape, dtype=torch.float64) / 2 for shape in ((10, 10), (2, 5), (3, 2, 3)))
    theirs = TRANSFORMS[transform](loss_with(loop_over_time, reset), w, h, x)
    with dlkernels.backend(backend):
        ours = TRANSFORMS[transform](loss_with(dlkernels.reset_gate_rnn, reset), w, h, x)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dual", range(6))
def test_forward_mode_is_refused(dual):
    """With an error, never with a silent zero."""
    tensors = list(CASES["after"].make_inputs(torch.float32))
    with forward_ad.dual_level():
        tensors[dual] = forward_ad.make_dual(tensors[dual], torch.ones_like(tensors[dual]))
        with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)forward|jvp"):
            dlkernels.reset_gate_rnn(*tensors)


def test_jvp_is_refused():
    x, *others = CASES["after"].make_inputs(torch.float32)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)forward|jvp"):
        torch.func.jvp(lambda v: dlkernels.reset_gate_rnn(v, *others)[0], (x,), (x,))


# ---- the same bits -----------------------------------------------------------------------------------


@each_case([*LARGE_CASES, *of_each_form("", "_packed", "_hidden_33", "_17_sequences", "_one_sequence")])
def test_threads_and_repetition_do_not_change_bits(case):
    inputs = case.make_inputs(torch.float32)
    grads = random_grads(inputs)
    runs = []
    for threads in (1, 2, 2, 3, 4):
        torch.set_num_threads(threads)
        runs.append(results(dlkernels.reset_gate_rnn, case, inputs, grads))
    assert all(same_bits(run, runs[0]) for run in runs)


@pytest.mark.parametrize("threads", [1, 2])
@each_form
def test_without_gradients_the_bits_are_the_same(reset, threads):
    torch.set_num_threads(threads)
    inputs = CASES[reset].make_inputs(torch.float32)
    with_gates = OPERATORS.reset_gate_rnn(*inputs, None, FORMS.index(reset), False, True)
    without = OPERATORS.reset_gate_rnn(*inputs, None, FORMS.index(reset), False, False)
    assert torch.equal(with_gates[0], without[0])
    assert len(without[2]) == 0


@each_case(of_each_form("", "_hidden_33"))
def test_alignment_does_not_change_bits(case):
    inputs = case.make_inputs(torch.float32)
    grads = random_grads(inputs)
    shifted = [torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view_as(t).copy_(t) for t in (*inputs, *grads)]
    ours = results(dlkernels.reset_gate_rnn, case, shifted[:-2], shifted[-2:])
    assert same_bits(ours, results(dlkernels.reset_gate_rnn, case, inputs, grads))


def test_several_python_threads_at_once():
    """Forward and backward of different shapes in four threads, each with the bits it has alone."""
    cases = [case for case in LARGE_CASES if "chunks" not in case.name] + of_each_form("", "_packed")
    work = [(case, case.make_inputs(torch.float32)) for case in cases]
    alone = [results(dlkernels.reset_gate_rnn, *item) for item in work]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda item: results(dlkernels.reset_gate_rnn, *item), work * 2))
    assert all(same_bits(a, b) for a, b in zip(together, alone * 2, strict=True))


def test_float32_is_as_accurate_on_a_long_sequence():
    """Errors of 200 steps, each fed by the one before."""
    case = ResetGateRnnCase("long", (200, 2, 8, 24))
    inputs = case.make_inputs(torch.float32)
    exact = loop_over_time(*doubled(inputs))
    ours, theirs = dlkernels.reset_gate_rnn(*inputs), loop_over_time(*inputs)
    for mine, other, right in zip(ours, theirs, exact, strict=True):
        assert relative_error(mine, right) <= 2 * relative_error(other, right) + 2e-7
