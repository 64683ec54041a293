"""conv_transpose2d and ConvTranspose2d, which live in conv2d's room: their kernels are conv2d's backward.

As in test_conv2d: values are judged by the rule of dlkernels.testing, or are small integers, for which only one answer
is right.
"""

import functools
import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conv2d import (
    BACKENDS,
    FORMATS,
    GRADIENTS,
    OURS,
    TRANSFORMS,
    VIEWS_OF_IMAGES,
    Recorder,
    assert_same_pattern,
    boxed,
    copied_by_pickle,
    copied_by_save,
    doubled,
    each_case,
    internal_arguments,
    loss_and_gradients,
    loss_with,
    losses_of_training,
    random_grad,
    results,
    same_bits,
)
from torch import nn
from torch.autograd import forward_ad

import dlkernels
from dlkernels import reference
from dlkernels.testing import DTYPES, ConvTranspose2dCase, compare, conv_transpose2d_cases, relative_error

CASES = {case.name: case for case in conv_transpose2d_cases()}
random_grad = functools.partial(random_grad, function=F.conv_transpose2d)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

# Large enough to be divided among threads.
LARGE_CASES = (
    ConvTranspose2dCase("large_4x4_stride_2", (3, 64, 12, 13), (64, 32, 4, 4), stride=2, padding=1),
    ConvTranspose2dCase("large_2x2_stride_2", (2, 64, 20, 20), (64, 32, 2, 2), stride=2),
    ConvTranspose2dCase("large_3x3", (2, 32, 29, 30), (32, 48, 3, 3), padding=1),
    ConvTranspose2dCase("large_1x1", (2, 64, 28, 28), (64, 48, 1, 1)),
    ConvTranspose2dCase("large_depthwise", (2, 48, 40, 40), (48, 1, 3, 3), padding=1, groups=48),
    ConvTranspose2dCase("large_to_one_channel", (2, 64, 24, 24), (64, 1, 4, 4), stride=2, padding=1),
)


def named(*names):
    return [CASES[name] for name in names]


SOME_CASES = named("4x4_stride_2", "asymmetric_all", "depthwise", "1x1", "3x3_stride_2")


def twins(*arguments, **options):
    """Our module and torch's, built under the same seed."""
    torch.manual_seed(1)
    ours = dlkernels.ConvTranspose2d(*arguments, **options)
    torch.manual_seed(1)
    return ours, nn.ConvTranspose2d(*arguments, **options)


# ---- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("memory_format", FORMATS)
@each_dtype
@each_case(CASES.values())
def test_output_and_gradients_are_as_accurate_as_torchs(case, dtype, memory_format, backend, device):
    inputs = case.make_inputs(dtype, device, FORMATS[memory_format])
    grad = random_grad(case, inputs)
    exact = results(F.conv_transpose2d, case, doubled(inputs), grad.double())
    theirs = results(F.conv_transpose2d, case, inputs, grad)
    with dlkernels.backend(backend):
        ours = results(dlkernels.conv_transpose2d, case, inputs, grad)
    for name in exact:
        compare(ours[name], theirs[name], exact[name], dtype, gradient=name != "output", name=name)


@pytest.mark.parametrize("backend", OURS)
@each_dtype
@each_case([*CASES.values(), *LARGE_CASES])
def test_small_integers_are_exact(case, dtype, backend):
    inputs = case.make_inputs(dtype, integers=True)
    grad = random_grad(case, inputs, integers=True)
    exact = results(F.conv_transpose2d, case, doubled(inputs), grad.double())
    with dlkernels.backend(backend):
        ours = results(dlkernels.conv_transpose2d, case, inputs, grad)
    for name in exact:
        assert torch.equal(ours[name], exact[name].to(dtype)), name


@pytest.mark.parametrize("precision", ["high", "medium"])
@each_case([*CASES.values(), *LARGE_CASES])
def test_lower_float32_precision_keeps_its_promise(case, precision):
    """ "high": 1e-5 of the result or 1e-6 of the result without cancellation; "medium": 1e-2."""
    torch.set_float32_matmul_precision(precision)
    inputs = case.make_inputs(torch.float32)
    grad = random_grad(case, inputs)
    exact = results(F.conv_transpose2d, case, doubled(inputs), grad.double())
    absolute = [None if t is None else t.abs() for t in doubled(inputs)]
    without_cancellation = results(F.conv_transpose2d, case, absolute, grad.double().abs())
    ours = results(dlkernels.conv_transpose2d, case, inputs, grad)
    for name, value in exact.items():
        if precision == "high":
            bound = max(1e-5 * value.norm().item(), 1e-6 * without_cancellation[name].norm().item())
        else:
            bound = 1e-2 * value.norm().item()
        assert (ours[name].double() - value).norm().item() <= bound, name


@each_case(CASES.values())
def test_reference_backward_is_the_gradient(case):
    """The written-out backward equals what autograd derives, on its own as a function."""
    inputs = case.make_inputs(torch.float64)
    grad = random_grad(case, inputs)
    exact = results(F.conv_transpose2d, case, inputs, grad)
    written_out = reference.conv_transpose2d_backward(grad, *inputs, **case.arguments)
    for name, ours in zip(GRADIENTS, written_out, strict=True):
        if name in exact:
            assert relative_error(ours, exact[name]) < 1e-14, name
        else:
            assert ours is None


def test_reference_backward_unbatched():
    case = CASES["asymmetric_all"]
    inputs = case.make_inputs(torch.float64)
    grad = random_grad(case, inputs)[0]
    batched = reference.conv_transpose2d_backward(grad[None], inputs[0][:1], *inputs[1:], **case.arguments)
    unbatched = reference.conv_transpose2d_backward(grad, inputs[0][0], *inputs[1:], **case.arguments)
    assert torch.equal(unbatched[0], batched[0][0])
    assert torch.equal(unbatched[1], batched[1])


def test_reference_has_the_functions_arguments():
    ours = list(inspect.signature(dlkernels.conv_transpose2d).parameters.values())
    assert list(inspect.signature(reference.conv_transpose2d).parameters.values()) == ours
    assert list(inspect.signature(reference.conv_transpose2d_backward).parameters.values())[1:] == ours


@pytest.mark.parametrize("backend", BACKENDS)
@each_case(named("3x3_stride_2", "asymmetric_all"))
def test_unbatched_input_is_a_batch_of_one(case, backend):
    input, weight, bias = case.make_inputs(torch.float64)
    with dlkernels.backend(backend):
        one = dlkernels.conv_transpose2d(input[0], weight, bias, **case.arguments)
        batch = dlkernels.conv_transpose2d(input[:1], weight, bias, **case.arguments)
    assert one.dim() == 3
    torch.testing.assert_close(one, batch[0])


@each_case(CASES.values())
def test_backends_agree(case):
    inputs = case.make_inputs(torch.float64)
    made = {}
    for backend in BACKENDS:
        with dlkernels.backend(backend):
            made[backend] = results(dlkernels.conv_transpose2d, case, inputs)
    torch.testing.assert_close(made["native"], made["reference"])
    torch.testing.assert_close(made["native"], made["torch"])


@pytest.mark.parametrize(("backend", "called"), [("native", "dlkernels::conv_transpose2d"), ("torch", "aten::conv")])
def test_each_backend_calls_its_own(backend, called):
    with dlkernels.backend(backend), Recorder() as recorder:
        dlkernels.conv_transpose2d(torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3))
    assert any(name.startswith(called) for name in recorder.names)


small = st.integers(1, 3)
PAIR = st.tuples(small, small)


@st.composite
def problems(draw):
    """A valid transposed convolution with every argument free, as a case."""
    groups, stride, dilation = draw(small), draw(PAIR), draw(PAIR)
    R, S, P, Q = (draw(st.integers(1, 5)) for _ in range(4))
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    full = [
        (size - 1) * s + d * (k - 1) + e + 1
        for size, k, s, d, e in zip((P, Q), (R, S), stride, dilation, extra, strict=True)
    ]
    padding = tuple(draw(st.integers(0, min(4, (size - 1) // 2))) for size in full)
    K, C = groups * draw(st.integers(1, 9)), draw(st.integers(1, 9))
    return ConvTranspose2dCase(
        *("fuzz", (draw(small), K, P, Q), (K, C, R, S), stride, padding, dilation, groups, draw(st.booleans()), extra)
    )


@given(problems(), st.sampled_from(["nchw", "channels_last"]), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_any_problem_equals_torch(case, memory_format, dtype):
    inputs = case.make_inputs(dtype, memory_format=FORMATS[memory_format], integers=True)
    grad = random_grad(case, inputs, integers=True)
    exact = results(F.conv_transpose2d, case, doubled(inputs), grad.double())
    ours = results(dlkernels.conv_transpose2d, case, inputs, grad)
    assert same_bits(ours, {name: value.to(dtype) for name, value in exact.items()})


# ---- identities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", OURS)
@each_case([case for case in CASES.values() if case.input[0] and not case.output_padding])
def test_it_is_the_transpose_of_conv2d(case, backend):
    """<conv_transpose2d(y, w), x> = <y, conv2d(x, w)> for any x: what "transpose" means."""
    y, w, _ = case.make_inputs(torch.float64)
    geometry = {name: value for name, value in case.arguments.items() if name != "output_padding"}
    with dlkernels.backend(backend):
        there = dlkernels.conv_transpose2d(y, w, **geometry)
        x = torch.randn_like(there)
        back = dlkernels.conv2d(x, w, **geometry)
    assert back.shape == y.shape
    assert abs((there * x).sum() - (y * back).sum()) < 1e-13 * there.norm() * x.norm()


@each_case([case for case in CASES.values() if case.input[0]])
def test_backward_is_the_adjoint(case):
    """<output, g> = <input, grad_input> = <weight, grad_weight>: wrong gradients cannot satisfy it."""
    input, weight, _ = case.make_inputs(torch.float64)
    grad = random_grad(case, (input, weight, None))
    ours = results(dlkernels.conv_transpose2d, case, (input, weight, None), grad)
    expected, scale = (ours["output"] * grad).sum(), ours["output"].norm() * grad.norm()
    assert abs((input * ours["grad_input"]).sum() - expected) < 1e-13 * scale
    assert abs((weight * ours["grad_weight"]).sum() - expected) < 1e-13 * scale


def test_stride_as_large_as_the_kernel_lays_kernels_side_by_side():
    y, w = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(3, 6, 2, 3, dtype=torch.float64)
    tiles = torch.einsum("nkpq,kcrs->ncprqs", y, w)
    torch.testing.assert_close(dlkernels.conv_transpose2d(y, w, stride=(2, 3)), tiles.flatten(4, 5).flatten(2, 3))


def test_output_padding_only_adds_at_the_end():
    y, w, b = torch.randn(2, 3, 4, 5), torch.randn(3, 6, 3, 3), torch.randn(6)
    smaller = dlkernels.conv_transpose2d(y, w, b, stride=3, padding=1)
    larger = dlkernels.conv_transpose2d(y, w, b, stride=3, padding=1, output_padding=(2, 1))
    assert larger.shape[2:] == (smaller.shape[2] + 2, smaller.shape[3] + 1)
    assert torch.equal(larger[..., : smaller.shape[2], : smaller.shape[3]], smaller)


# ---- derivatives ----------------------------------------------------------------------------------

GRADCHECK_CASES = (
    ConvTranspose2dCase("plain", (2, 2, 3, 4), (2, 2, 3, 3), padding=1),
    ConvTranspose2dCase("groups", (1, 4, 3, 3), (4, 2, 2, 2), groups=2),
    ConvTranspose2dCase("stride", (1, 2, 3, 2), (2, 2, 2, 3), stride=(2, 3), bias=False),
    ConvTranspose2dCase("dilation", (1, 2, 3, 2), (2, 2, 2, 2), dilation=(3, 2), padding=(1, 0), output_padding=(2, 1)),
    ConvTranspose2dCase("all", (1, 2, 4, 4), (2, 1, 3, 2), (2, 1), (1, 2), (1, 3), groups=2, output_padding=(1, 2)),
    ConvTranspose2dCase("one_by_one", (2, 3, 2, 2), (3, 2, 1, 1), bias=False),
)


@pytest.mark.parametrize("backend", OURS)
@each_case(GRADCHECK_CASES)
def test_first_and_second_derivatives_match_finite_differences(case, backend):
    inputs = [t.requires_grad_() for t in case.make_inputs(torch.float64) if t is not None]

    def function(*tensors):
        with dlkernels.backend(backend):
            return dlkernels.conv_transpose2d(*tensors, **case.arguments)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_third_derivatives_equal_torchs():
    """Without output_padding, with which torch's own end at the second."""
    case = CASES["groups_odd"]
    inputs = case.make_inputs(torch.float64)

    def third(function):
        leaves = [t.detach().requires_grad_() for t in inputs]
        made = function(*leaves, **case.arguments).pow(3).mean()
        for _ in range(3):
            made = sum(g.square().mean() for g in torch.autograd.grad(made, leaves, create_graph=True))
        return made.detach()

    torch.testing.assert_close(third(dlkernels.conv_transpose2d), third(F.conv_transpose2d))


@each_case(GRADCHECK_CASES[:4])
def test_reference_backward_is_differentiable(case):
    inputs = case.make_inputs(torch.float64)
    tensors = [random_grad(case, inputs).requires_grad_(), *(t.requires_grad_() for t in inputs[:2])]

    def backward(grad, input, weight):
        made = reference.conv_transpose2d_backward(grad, input, weight, inputs[2], **case.arguments)
        return made[: 3 if case.bias else 2]

    assert torch.autograd.gradcheck(backward, tensors)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_subset_of_requires_grad(backend, wanted, create_graph):
    """Gradients, and with create_graph the gradients of their norm, equal torch's for exactly the tensors that ask."""
    case = CASES["asymmetric_all"]
    inputs = case.make_inputs(torch.float64)

    def derivatives(conv):
        leaves = [t.detach().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
        output = conv(*leaves, **case.arguments)
        assert output.requires_grad == any(wanted)
        asking = [t for t in leaves if t.requires_grad]
        if not asking:
            return [output]
        first = torch.autograd.grad(output.square().sum(), asking, create_graph=create_graph)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), asking) if create_graph else ()
        return [*first, *second]

    with dlkernels.backend(backend):
        ours = derivatives(dlkernels.conv_transpose2d)
    torch.testing.assert_close(ours, derivatives(F.conv_transpose2d))


@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d"])
def test_grad_fn_shows_which_operator_it_is(name):
    output = getattr(dlkernels, name)(2, 2, 3)(torch.randn(1, 2, 4, 4, requires_grad=True))
    assert output.grad_fn.name() == f"{name}FunctionBackward"
    (grad,) = torch.autograd.grad(output.sum(), output.grad_fn.saved_tensors[1], create_graph=True)
    assert grad.grad_fn.name() == f"{name}BackwardFunctionBackward"


# ---- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["input", "weight", "bias", "grad", "all"])
@pytest.mark.parametrize("view", VIEWS_OF_IMAGES)
@pytest.mark.parametrize("backend", OURS)
@each_case(SOME_CASES)
def test_any_strides_give_the_same_values(case, backend, view, argument):
    inputs = case.make_inputs(torch.float32, integers=True)
    tensors = dict(
        zip(("input", "weight", "bias", "grad"), (*inputs, random_grad(case, inputs, integers=True)), strict=True)
    )
    for name in tensors if argument == "all" else [argument]:
        tensors[name] = VIEWS_OF_IMAGES[view](tensors[name])
    *inputs, grad = tensors.values()
    contiguous = [t.clone(memory_format=torch.contiguous_format) for t in inputs]
    exact = results(F.conv_transpose2d, case, contiguous, grad.contiguous())
    with dlkernels.backend(backend):
        ours = results(dlkernels.conv_transpose2d, case, inputs, grad)
    assert same_bits(ours, exact)


@each_dtype
@each_case(SOME_CASES)
def test_inputs_are_not_modified_and_not_aliased(case, dtype):
    inputs = case.make_inputs(dtype)
    given = [*inputs, random_grad(case, inputs)]
    before = [(t.clone(), t._version) for t in given]
    made = results(dlkernels.conv_transpose2d, case, inputs, given[-1]).values()
    for tensor, (bits, version) in zip(given, before, strict=True):
        assert torch.equal(tensor, bits)
        assert tensor._version == version
    pointers = [t.untyped_storage().data_ptr() for t in (*given, *made)]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("input_format", FORMATS)
@pytest.mark.parametrize("backend", ["native", "torch"])
@each_case(named("4x4_stride_2", "1x1", "asymmetric_all", "17_to_23_channels", "depthwise_stride_2"))
def test_output_has_the_memory_format_that_torch_gives(case, backend, input_format, weight_format):
    x, w, b = case.make_inputs(torch.float32)
    x = x.contiguous(memory_format=FORMATS[input_format])
    w = w.contiguous(memory_format=FORMATS[weight_format])
    with dlkernels.backend(backend):
        ours = dlkernels.conv_transpose2d(x, w, b, **case.arguments)
    assert ours.stride() == F.conv_transpose2d(x, w, b, **case.arguments).stride()


@pytest.mark.parametrize("memory_format", FORMATS)
@each_dtype
@each_case(CASES.values())
def test_fake_kernel_tells_shape_strides_and_dtype(case, dtype, memory_format):
    inputs = case.make_inputs(dtype, memory_format=FORMATS[memory_format])
    fake = [None if t is None else t.to("meta") for t in inputs]
    real, told = results(dlkernels.conv_transpose2d, case, inputs), results(dlkernels.conv_transpose2d, case, fake)
    for name in real:
        a, b = real[name], told[name]
        assert (a.shape, a.stride(), a.dtype, b.device.type) == (b.shape, b.stride(), b.dtype, "meta"), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    """An empty result of the right shape, and a gradient of zeros for what there is."""
    conv, x = dlkernels.ConvTranspose2d(3, 4, 3, stride=2), torch.randn(0, 3, 5, 4, requires_grad=True)
    with dlkernels.backend(backend):
        output = conv(x)
        output.sum().backward()
    assert output.shape == (0, 4, 11, 9)
    assert x.grad.shape == x.shape
    assert torch.equal(conv.weight.grad, torch.zeros_like(conv.weight))
    assert torch.equal(conv.bias.grad, torch.zeros_like(conv.bias))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_case([*LARGE_CASES, *SOME_CASES])
def test_threads_and_repetition_do_not_change_bits(case, dtype, memory_format):
    inputs = case.make_inputs(dtype, memory_format=FORMATS[memory_format])
    grad = random_grad(case, inputs)
    runs = []
    for threads in (1, 1, 2, 4):
        torch.set_num_threads(threads)
        runs.append(results(dlkernels.conv_transpose2d, case, inputs, grad))
    assert all(same_bits(run, runs[0]) for run in runs)


# ---- errors ---------------------------------------------------------------------------------------

X, W, B = torch.ones(2, 4, 5, 5), torch.ones(4, 6, 3, 3), torch.ones(6)
BAD_CALLS = {
    "too few channels": ((X[:, :3], W), {}),
    "too few channels, unbatched": ((X[0, :3], W), {}),
    "too few channels, empty batch": ((X[:0, :3], W), {}),
    "2-D input": ((X[0, 0], W), {}),
    "5-D input": ((X[None], W), {}),
    "2-D weight": ((X, W[0, 0]), {}),
    "3-D weight": ((X, W[0]), {}),
    "5-D weight": ((X, W[None]), {}),
    "no input channels": ((X[:, :0], W[:0]), {}),
    "input without rows": ((X[:, :, :0], W), {}),
    "negative padding": ((X, W), {"padding": -1}),
    "negative padding in columns": ((X, W), {"padding": (1, -1)}),
    "negative output_padding": ((X, W), {"output_padding": -1}),
    "output_padding of stride 1": ((X, W), {"output_padding": 1}),
    "output_padding as large as stride": ((X, W), {"stride": 2, "output_padding": 2}),
    "output_padding too large in columns": ((X, W), {"stride": (3, 1), "output_padding": (1, 1)}),
    "zero stride": ((X, W), {"stride": 0}),
    "negative stride": ((X, W), {"stride": (1, -2)}),
    "groups that do not divide the input channels": ((X, W), {"groups": 3}),
    "zero groups": ((X, W), {"groups": 0}),
    "negative groups": ((X, W), {"groups": -1}),
    "short bias": ((X, W, B[:5]), {}),
    "bias of one group": ((X, W[:, :3], B[:3]), {"groups": 2}),
    "2-D bias": ((X, W, B[None]), {}),
    "0-D bias": ((X, W, B[0]), {}),
    "weight of another dtype": ((X, W.double()), {}),
    "input of another dtype": ((X.double(), W), {}),
    "bias of another dtype": ((X, W, B.double()), {}),
    "low precision input, float32 weight": ((X.bfloat16(), W), {}),
    "three strides": ((X, W), {"stride": (1, 1, 1)}),
    "no strides": ((X, W), {"stride": ()}),
    "three paddings": ((X, W), {"padding": (1, 1, 1)}),
    "four paddings": ((X, W), {"padding": (1, 1, 1, 1)}),
    "three output_paddings": ((X, W), {"output_padding": (0, 0, 0)}),
    "three dilations": ((X, W), {"dilation": (1, 1, 1)}),
    "stride is a float": ((X, W), {"stride": 1.5}),
    "stride is None": ((X, W), {"stride": None}),
    "padding is a string": ((X, W), {"padding": "same"}),
    "output_padding is a float": ((X, W), {"output_padding": 0.5}),
    "groups is a float": ((X, W), {"groups": 1.0}),
    "groups is a bool": ((X, W), {"groups": True}),
    "no weight": ((X, None), {}),
    "no input": ((None, W), {}),
    "input is an array": ((X.numpy(), W), {}),
    "bias is a number": ((X, W, 1.0), {}),
}


@pytest.mark.parametrize("call", BAD_CALLS)
def test_bad_calls_fail_as_in_torch(call):
    """The same exception type with the same text; a TypeError lists the arguments as torch's parser saw them."""
    arguments, options = BAD_CALLS[call]
    with pytest.raises(Exception) as theirs:
        F.conv_transpose2d(*arguments, **options)
    with pytest.raises(theirs.type) as ours:
        dlkernels.conv_transpose2d(*arguments, **options)
    assert ours.type is theirs.type
    if ours.type is TypeError:
        assert str(ours.value).startswith("conv_transpose2d()")
    else:
        assert str(ours.value) == str(theirs.value)


ONEDNN_REFUSES = {  # in words that name no argument
    "zero dilation": ((X, W), {"dilation": 0}, "dilation"),
    "padding as large as the output": ((X, W), {"padding": 4}, "padding"),
    "no output channels": ((X, W[:, :0]), {}, "weight"),
    "no kernel rows": ((X, W[:, :, :0]), {}, "weight"),
}


@pytest.mark.parametrize("call", ONEDNN_REFUSES)
def test_what_onednn_refuses_is_explained(call):
    arguments, options, name = ONEDNN_REFUSES[call]
    with pytest.raises(RuntimeError):
        F.conv_transpose2d(*arguments, **options)
    with pytest.raises(RuntimeError, match=f"conv_transpose2d: {name} must .* got"):
        dlkernels.conv_transpose2d(*arguments, **options)
    with pytest.raises(RuntimeError):
        reference.conv_transpose2d(*arguments, **options)


@pytest.mark.parametrize("call", [name for name in BAD_CALLS if name != "groups is a bool"])  # a bool is an int
def test_bad_calls_fail_in_the_reference_too(call):
    arguments, options = BAD_CALLS[call]
    with pytest.raises((RuntimeError, TypeError, AttributeError)):
        reference.conv_transpose2d(*arguments, **options)


@pytest.mark.parametrize(
    "options", [{"stride": (2,)}, {"padding": [1]}, {"dilation": (2,)}, {"stride": 2, "output_padding": [1]}], ids=str
)
def test_one_number_in_a_sequence_stands_for_both(options):
    expected = F.conv_transpose2d(X, W, **options)
    assert torch.equal(dlkernels.conv_transpose2d(X, W, **options), expected)
    assert torch.equal(reference.conv_transpose2d(X, W, **options), expected)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.uint8, torch.bool])
def test_unsupported_dtypes_name_the_argument(dtype):
    with pytest.raises((RuntimeError, TypeError, NotImplementedError), match=r"(?s)input.*(got|not|but)"):
        dlkernels.conv_transpose2d(X.to(dtype), W.to(dtype))


@pytest.mark.parametrize("moved", ["input", "weight", "bias"])
def test_mixed_devices_name_the_argument(moved):
    tensors = {"input": X, "weight": W, "bias": B}
    tensors[moved] = tensors[moved].to("meta")
    with pytest.raises(RuntimeError, match=r"(input|weight|bias).*(cpu.*meta|meta.*cpu)"):
        dlkernels.conv_transpose2d(*tensors.values())


# ---- module ---------------------------------------------------------------------------------------

MODULE_OPTIONS = (
    {},
    {"bias": False},
    {"stride": 2, "padding": 1, "output_padding": 1},
    {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2), "output_padding": (1, 0)},
    {"groups": 2},
)


@pytest.mark.parametrize("options", MODULE_OPTIONS, ids=str)
def test_module_is_nns_in_every_attribute(options):
    ours, theirs = twins(4, 6, 3, **options)
    assert isinstance(ours, nn.ConvTranspose2d)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name in nn.ConvTranspose2d.__constants__:
        assert getattr(ours, name) == getattr(theirs, name), name
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", MODULE_OPTIONS, ids=str)
def test_module_computes_what_nn_does(options, backend):
    ours, theirs = twins(4, 6, (2, 3), **options, dtype=torch.float64)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    with dlkernels.backend(backend):
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours(x[0]), theirs(x[0]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(11, 13), [12, 14], torch.Size([2, 6, 11, 14]), (6, 12, 13)], ids=str)
def test_output_size_chooses_the_output_padding(size, backend):
    ours, theirs = twins(4, 6, 3, stride=2, output_padding=1)
    x = torch.randn(2, 4, 5, 6)
    x = x[0] if len(size) == 3 else x
    with dlkernels.backend(backend):
        output = ours(x, size)
    assert output.shape[-2:] == tuple(size[-2:])
    torch.testing.assert_close(output, theirs(x, output_size=size))


@pytest.mark.parametrize("size", [(10, 13), (11, 15), (11,), (2, 6, 11), (2, 6, 1, 11, 13)], ids=str)
def test_wrong_output_size_fails_as_in_nn(size):
    ours, theirs = twins(4, 6, 3, stride=2)
    x = torch.randn(2, 4, 5, 6)
    with pytest.raises(ValueError) as expected:
        theirs(x, size)
    with pytest.raises(ValueError) as error:
        ours(x, size)
    assert str(error.value) == str(expected.value)


@pytest.mark.parametrize("options", [{"padding_mode": "reflect"}, {"groups": 3}, {"groups": 0}, {"bad": 1}], ids=str)
def test_module_refuses_what_nn_refuses(options):
    with pytest.raises(Exception) as theirs:
        nn.ConvTranspose2d(4, 6, 3, **options)
    with pytest.raises(theirs.type) as ours:
        dlkernels.ConvTranspose2d(4, 6, 3, **options)
    assert str(ours.value) == str(theirs.value)


def test_module_refuses_another_padding_mode_later_too():
    errors = []
    for module in twins(4, 6, 3):
        module.padding_mode = "circular"
        with pytest.raises(ValueError) as error:
            module(X)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("shape", [(2, 3, 5, 5), (5, 5), (1, 2, 4, 5, 5)], ids=str)
def test_module_forward_fails_as_in_nn(shape):
    ours, theirs = twins(4, 6, 3)
    with pytest.raises(RuntimeError) as expected:
        theirs(torch.ones(shape))
    with pytest.raises(RuntimeError) as error:
        ours(torch.ones(shape))
    assert str(error.value) == str(expected.value)


@pytest.mark.parametrize("copied", [copied_by_pickle, copied_by_save])
def test_module_copies(copied):
    conv, x = dlkernels.ConvTranspose2d(3, 4, 3, stride=2), torch.randn(2, 3, 6, 6)
    other = copied(conv)
    assert type(other) is dlkernels.ConvTranspose2d
    assert torch.equal(other(x), conv(x))


def test_state_dicts_interchange():
    ours, theirs = dlkernels.ConvTranspose2d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight, theirs.weight)
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.weight, theirs.weight)


def decoder(conv):
    torch.manual_seed(3)
    return nn.Sequential(
        conv(4, 8, 2), nn.ReLU(), conv(8, 6, (2, 1), stride=2, padding=(1, 0), output_padding=(1, 0), groups=2)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_follows_nn_step_by_step(backend):
    images, labels = torch.randn(16, 4, 4, 4), torch.randint(0, 6, (16,))

    def model(conv):
        return nn.Sequential(decoder(conv), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    theirs = losses_of_training(model(nn.ConvTranspose2d), images, labels)
    with dlkernels.backend(backend):
        ours = losses_of_training(model(dlkernels.ConvTranspose2d), images, labels)
    assert theirs[-1] < theirs[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# ---- autocast, dispatcher, compile, export ----------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_computes_in_its_dtype(dtype, backend):
    """The output is what a call on rounded tensors gives; gradients come back in the parameters' dtype."""
    conv, x = dlkernels.ConvTranspose2d(8, 8, 3, stride=2), torch.randn(2, 8, 5, 5, requires_grad=True)
    with dlkernels.backend(backend):
        with torch.autocast("cpu", dtype):
            output = conv(x)
            assert dlkernels.conv_transpose2d(x.double(), conv.weight.double()).dtype == torch.float64
        expected = dlkernels.conv_transpose2d(x.to(dtype), conv.weight.to(dtype), conv.bias.to(dtype), stride=2)
        output.float().square().sum().backward()
    assert output.dtype == dtype
    assert torch.equal(output, expected)
    assert x.grad.dtype == conv.weight.grad.dtype == conv.bias.grad.dtype == torch.float32


def test_a_direct_call_of_the_operator_runs_in_autocasts_dtype():
    numbers = ([2, 2], [0, 0], [1, 0], [1, 1], 1)
    arguments = internal_arguments("conv_transpose2d", X, W, None, *numbers)
    rounded = internal_arguments("conv_transpose2d", X.bfloat16(), W.bfloat16(), None, *numbers)
    expected = torch.ops.dlkernels.conv_transpose2d(*rounded)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.ops.dlkernels.conv_transpose2d(*arguments), expected)
    assert torch.ops.dlkernels.conv_transpose2d(*arguments).dtype == torch.float32


# Internal form: input, weight, stride, padding, output_padding, dilation, groups.
INTERNAL = {
    "plain": ((2, 6, 4, 5), (6, 4, 3, 3), [1, 1], [1, 1], [0, 0], [1, 1], 1),
    "asymmetric": ((2, 6, 4, 3), (6, 2, 2, 3), [2, 1], [0, 1], [1, 1], [1, 2], 2),
    "depthwise": ((1, 5, 4, 4), (5, 1, 3, 3), [2, 2], [1, 1], [1, 1], [1, 1], 5),
    "empty_batch": ((0, 4, 3, 3), (4, 3, 3, 3), [1, 1], [0, 0], [0, 0], [1, 1], 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("problem", INTERNAL)
def test_opcheck_forward(problem, bias, memory_format, dtype):
    input, weight, *numbers = INTERNAL[problem]
    x = torch.randn(input, dtype=dtype).to(memory_format=FORMATS[memory_format]).requires_grad_()
    w = torch.randn(weight, dtype=dtype).requires_grad_()
    b = torch.randn(weight[1] * numbers[-1], dtype=dtype).requires_grad_() if bias else None
    arguments = internal_arguments("conv_transpose2d", x, w, b, *numbers)
    torch.library.opcheck(torch.ops.dlkernels.conv_transpose2d, arguments)


@pytest.mark.parametrize("mask", [[True, True, True], [True, False, False], [False, True, True], [False, False, True]])
@pytest.mark.parametrize("problem", INTERNAL)
def test_opcheck_backward(problem, mask):
    input, weight, *numbers = INTERNAL[problem]
    x, w = torch.randn(input, requires_grad=True), torch.randn(weight, requires_grad=True)
    arguments = internal_arguments("conv_transpose2d", x, w, None, *numbers)
    grad = torch.randn_like(torch.ops.dlkernels.conv_transpose2d(*arguments)).requires_grad_()
    arguments = internal_arguments("conv_transpose2d_backward", grad, x, w, *numbers, mask)
    made = torch.ops.dlkernels.conv_transpose2d_backward(*arguments)
    assert [t is not None for t in made] == mask
    torch.library.opcheck(torch.ops.dlkernels.conv_transpose2d_backward, arguments)


@pytest.mark.compile
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic, backend):
    torch._dynamo.reset()
    model = decoder(dlkernels.ConvTranspose2d)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with dlkernels.backend(backend):
        for shape in [(2, 4, 5, 6), (3, 4, 7, 4)] if dynamic else [(2, 4, 5, 6)]:
            x = torch.randn(shape)
            torch.testing.assert_close(loss_and_gradients(compiled, x), loss_and_gradients(model, x))


@pytest.mark.compile
def test_compiles_with_an_output_size():
    torch._dynamo.reset()
    conv, x = dlkernels.ConvTranspose2d(4, 6, 3, stride=2), torch.randn(2, 4, 5, 6)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, (12, 13)), conv(x, (12, 13)))


@pytest.mark.compile
def test_compiled_code_sees_the_operator():
    torch._dynamo.reset()
    seen = []

    def recording(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(
        decoder(dlkernels.ConvTranspose2d), fullgraph=True, backend=aot_autograd(fw_compiler=boxed(recording))
    )
    loss_and_gradients(compiled, torch.randn(2, 4, 5, 5))
    assert {"dlkernels.conv_transpose2d.default", "dlkernels.conv_transpose2d_backward.default"} <= set(seen)


@pytest.mark.compile
@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_a_dynamic_batch(strict):
    model = decoder(dlkernels.ConvTranspose2d).eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (torch.randn(4, 4, 5, 6),), dynamic_shapes=({0: batch},), strict=strict)
    x = torch.randn(7, 4, 5, 6)
    torch.testing.assert_close(program.module()(x), model(x))
    assert any("dlkernels.conv_transpose2d" in str(node.target) for node in program.graph.nodes)


def test_symbolic_tracing_keeps_the_call():
    model = decoder(dlkernels.ConvTranspose2d)
    traced = torch.fx.symbolic_trace(model)
    assert dlkernels.conv_transpose2d in [node.target for node in traced.graph.nodes]
    x = torch.randn(2, 4, 5, 6)
    assert torch.equal(traced(x), model(x))


# ---- function transforms -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("in_dims", "shapes"),
    [
        ((0, None, None), ((3, 2, 6, 4, 5), (6, 2, 3, 2), (4,))),
        ((None, 0, None), ((2, 6, 4, 5), (3, 6, 2, 3, 2), (4,))),
        ((0, 0, None), ((3, 2, 6, 4, 5), (3, 6, 2, 3, 2), (4,))),
        ((0, 0, 0), ((3, 2, 6, 4, 5), (3, 6, 2, 3, 2), (3, 4))),
        ((None, None, 0), ((2, 6, 4, 5), (6, 2, 3, 2), (3, 4))),
        ((1, 4, 1), ((2, 3, 6, 4, 5), (6, 2, 3, 2, 3), (4, 3))),
        ((0, None, None), ((3, 6, 4, 5), (6, 2, 3, 2), (4,))),
    ],
    ids=["input", "weight", "input_weight", "all", "bias", "other_dimensions", "unbatched"],
)
def test_vmap_is_a_loop(in_dims, shapes, backend):
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    conv = functools.partial(dlkernels.conv_transpose2d, stride=(2, 1), padding=1, output_padding=(1, 0), groups=2)
    slices = [
        [t if dim is None else t.select(dim, i) for t, dim in zip(tensors, in_dims, strict=True)] for i in range(3)
    ]
    with dlkernels.backend(backend):
        mapped = torch.func.vmap(conv, in_dims)(*tensors)
        expected = torch.stack([conv(*part) for part in slices])
    torch.testing.assert_close(mapped, expected)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backend", BACKENDS)
@each_case(GRADCHECK_CASES[:2])
def test_function_transforms_equal_torchs(case, backend, transform):
    x, w, b = case.make_inputs(torch.float64)
    x = torch.cat([x, 2 * x])
    theirs = TRANSFORMS[transform](loss_with(F.conv_transpose2d, case), w, b, x)
    with dlkernels.backend(backend):
        ours = TRANSFORMS[transform](loss_with(dlkernels.conv_transpose2d, case), w, b, x)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dual", [0, 1])
def test_forward_mode_is_refused(dual):
    """With an error, never with a silent zero."""
    tensors = [torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3)]
    with forward_ad.dual_level():
        tensors[dual] = forward_ad.make_dual(tensors[dual], torch.ones_like(tensors[dual]))
        with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)forward|jvp"):
            dlkernels.conv_transpose2d(*tensors)


# ---- numbers that are not ordinary -------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_case([*LARGE_CASES, *named("4x4_stride_2", "asymmetric_all")])
def test_one_value_that_is_not_finite_spreads_no_further_than_the_formula(case, dtype, value, precision):
    torch.set_float32_matmul_precision(precision)
    inputs = case.make_inputs(dtype)
    inputs[0][1, 2, 3, 4] = value
    exact = reference.conv_transpose2d(*doubled(inputs), **case.arguments)
    ours = dlkernels.conv_transpose2d(*inputs, **case.arguments)
    assert not exact.isfinite().all()
    assert_same_pattern(ours, exact)
    assert ours[0].isfinite().all()


@each_case(LARGE_CASES)
def test_denormals_give_finite_results(case):
    tiny = [t * 1e-40 for t in case.make_inputs(torch.float32)]
    for value in results(dlkernels.conv_transpose2d, case, tiny, random_grad(case, tiny) * 1e-40).values():
        assert value.isfinite().all()
        assert value.abs().max() < 1e-30
