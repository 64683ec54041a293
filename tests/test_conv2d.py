"""conv2d and Conv2d: every test states one property that holds for the native kernels and, where it can, every backend.

Values are judged by the tolerance rule of dlkernels.testing, or are small integers, for which only one answer is right.
"""

import copy
import functools
import io
import itertools
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import dlkernels
from dlkernels import reference
from dlkernels.testing import DTYPES, VIEWS, Conv2dCase, compare, conv2d_cases, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

CASES = {case.name: case for case in conv2d_cases()}
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
BACKENDS = ("native", "reference", "torch")
OURS = ("native", "reference")
GRADIENTS = ("grad_input", "grad_weight", "grad_bias")

# Large enough to be divided among threads, one for each way that a kernel may go about it.
LARGE_CASES = (
    Conv2dCase("large_3x3", (3, 32, 29, 30), (48, 32, 3, 3), padding=1),
    Conv2dCase("large_3x3_stride_2", (2, 24, 41, 39), (32, 24, 3, 3), stride=2, padding=1),
    Conv2dCase("large_1x1", (2, 64, 28, 28), (96, 64, 1, 1)),
    Conv2dCase("large_stem", (1, 3, 97, 96), (32, 3, 7, 7), stride=2, padding=3),
    Conv2dCase("large_depthwise", (2, 48, 40, 40), (48, 1, 3, 3), padding=1, groups=48),
    Conv2dCase("large_groups", (2, 32, 28, 28), (64, 8, 3, 3), padding=2, dilation=2, groups=4),
    Conv2dCase("large_batch_small_map", (33, 64, 4, 4), (64, 64, 3, 3), padding=1),
)


def each_case(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def named(*names):
    return [CASES[name] for name in names]


def results(function, case, inputs, grad=None):
    """output, grad_input, grad_weight, grad_bias of one call; grad defaults to ones."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    output = function(*leaves, **case.arguments)
    grad = torch.ones_like(output) if grad is None else grad
    wanted = [t for t in leaves if t is not None]
    gradients = torch.autograd.grad(output, wanted, grad)
    return dict(zip(("output", *GRADIENTS), (output.detach(), *gradients), strict=False))


def random_grad(case, inputs, integers=False, function=F.conv2d):
    """A gradient of the output's shape, in the inputs' dtype and memory format."""
    output = function(*inputs, **case.arguments)
    values = torch.randint(-2, 3, output.shape) if integers else torch.randn(output.shape, dtype=torch.float64)
    return torch.empty_like(output).copy_(values)


def doubled(tensors):
    return [None if t is None else t.double() for t in tensors]


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@each_case(CASES.values())
def test_output_and_gradients_are_as_accurate_as_torchs(case, dtype, memory_format, backend, device):
    inputs = case.make_inputs(dtype, device, FORMATS[memory_format])
    grad = random_grad(case, inputs)
    exact = results(F.conv2d, case, doubled(inputs), grad.double())
    theirs = results(F.conv2d, case, inputs, grad)
    with dlkernels.backend(backend):
        ours = results(dlkernels.conv2d, case, inputs, grad)
    for name in exact:
        compare(ours[name], theirs[name], exact[name], dtype, gradient=name != "output", name=name)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("precision", ["high", "medium"])
@each_case([*CASES.values(), *LARGE_CASES])
def test_lower_float32_precision_keeps_its_promise(case, precision, memory_format):
    """ "high": 1e-5 of the result or 1e-6 of the result without cancellation; "medium": 1e-2."""
    torch.set_float32_matmul_precision(precision)
    inputs = case.make_inputs(torch.float32, memory_format=FORMATS[memory_format])
    grad = random_grad(case, inputs)
    exact = results(F.conv2d, case, doubled(inputs), grad.double())
    absolute = [None if t is None else t.abs() for t in doubled(inputs)]
    without_cancellation = results(F.conv2d, case, absolute, grad.double().abs())
    ours = results(dlkernels.conv2d, case, inputs, grad)
    for name, value in exact.items():
        if precision == "high":
            bound = max(1e-5 * value.norm().item(), 1e-6 * without_cancellation[name].norm().item())
        else:
            bound = 1e-2 * value.norm().item()
        assert (ours[name].double() - value).norm().item() <= bound, name


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@each_case(CASES.values())
def test_small_integers_are_exact(case, dtype, backend):
    inputs = case.make_inputs(dtype, integers=True)
    grad = random_grad(case, inputs, integers=True)
    exact = results(F.conv2d, case, doubled(inputs), grad.double())
    with dlkernels.backend(backend):
        ours = results(dlkernels.conv2d, case, inputs, grad)
    for name in exact:
        assert torch.equal(ours[name], exact[name].to(dtype)), name


@each_case(CASES.values())
def test_reference_backward_is_the_gradient(case):
    """The written-out backward equals what autograd derives, on its own as a function."""
    inputs = case.make_inputs(torch.float64)
    grad = random_grad(case, inputs)
    exact = results(F.conv2d, case, inputs, grad)
    written_out = reference.conv2d_backward(grad, *inputs, **case.arguments)
    for name, ours in zip(GRADIENTS, written_out, strict=True):
        if name in exact:
            assert relative_error(ours, exact[name]) < 1e-14, name
        else:
            assert ours is None


@pytest.mark.parametrize("case", named("asymmetric_all", "same_even"), ids=lambda case: case.name)
def test_reference_backward_unbatched(case):
    inputs = case.make_inputs(torch.float64)
    grad = random_grad(case, inputs)[0]
    batched = reference.conv2d_backward(grad[None], inputs[0][:1], *inputs[1:], **case.arguments)
    unbatched = reference.conv2d_backward(grad, inputs[0][0], *inputs[1:], **case.arguments)
    assert torch.equal(unbatched[0], batched[0][0])
    assert torch.equal(unbatched[1], batched[1])


@pytest.mark.parametrize("backend", BACKENDS)
@each_case(named("3x3", "asymmetric_all", "same_even"))
def test_unbatched_input_is_a_batch_of_one(case, backend):
    input, weight, bias = case.make_inputs(torch.float64)
    with dlkernels.backend(backend):
        one = dlkernels.conv2d(input[0], weight, bias, **case.arguments)
        batch = dlkernels.conv2d(input[:1], weight, bias, **case.arguments)
    assert one.dim() == 3
    torch.testing.assert_close(one, batch[0])


# ---- identities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", OURS)
@each_case([case for case in CASES.values() if case.input[0]])
def test_backward_is_the_adjoint(case, backend):
    """<conv(x, w), g> = <x, grad_input> = <w, grad_weight>: wrong gradients cannot satisfy it for random tensors."""
    input, weight, _ = case.make_inputs(torch.float64)
    grad = random_grad(case, (input, weight, None))
    with dlkernels.backend(backend):
        ours = results(dlkernels.conv2d, case, (input, weight, None), grad)
    expected = (ours["output"] * grad).sum()
    scale = ours["output"].norm() * grad.norm()
    assert abs((input * ours["grad_input"]).sum() - expected) < 1e-13 * scale
    assert abs((weight * ours["grad_weight"]).sum() - expected) < 1e-13 * scale


@each_case(named("3x3", "asymmetric_all", "depthwise", "same_even", "64_channels"))
def test_linear_in_input_and_weight(case):
    conv = functools.partial(dlkernels.conv2d, **case.arguments)
    x, w, _ = case.make_inputs(torch.float64)
    x2, w2, _ = case.make_inputs(torch.float64)
    torch.testing.assert_close(conv(2 * x - 3 * x2, w), 2 * conv(x, w) - 3 * conv(x2, w))
    torch.testing.assert_close(conv(x, 2 * w - 3 * w2), 2 * conv(x, w) - 3 * conv(x, w2))


@each_case(named("groups_2", "groups_odd", "groups_1x1", "asymmetric_all", "depthwise_multiplier_3"))
def test_groups_are_separate_convolutions(case):
    x, w, b = case.make_inputs(torch.float32, integers=True)
    parts = zip(x.chunk(case.groups, 1), w.chunk(case.groups), b.chunk(case.groups), strict=True)
    each = {**case.arguments, "groups": 1}
    expected = torch.cat([dlkernels.conv2d(*part, **each) for part in parts], 1)
    assert torch.equal(dlkernels.conv2d(x, w, b, **case.arguments), expected)


def test_1x1_is_a_matrix_product():
    x, w = torch.randn(3, 7, 5, 6, dtype=torch.float64), torch.randn(4, 7, 1, 1, dtype=torch.float64)
    expected = (w.flatten(1) @ x.flatten(2)).unflatten(2, (5, 6))
    torch.testing.assert_close(dlkernels.conv2d(x, w), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_is_read_and_rounded_as_torch_does(dtype):
    """One channel of 1 x 1: each number of the output is one product, exact in float32 and rounded once."""
    patterns = torch.arange(-(2**15), 2**15).short().view(dtype)
    factors = torch.tensor([1.0, -1.5, 1.0078125, 3.0, 1 / 3]).to(dtype)
    output = dlkernels.conv2d(patterns.view(1, 1, 256, 256), factors.view(-1, 1, 1, 1))
    expected = (patterns.float() * factors.float()[:, None]).to(dtype)
    subnormal = 3 * torch.finfo(torch.float32).smallest_normal  # times a factor; the kernels take such floats for 0
    torch.testing.assert_close(output.view(5, -1), expected, rtol=0, atol=subnormal, equal_nan=True)


VIEWS_OF_GRADIENTS = {
    "nchw": lambda grad: grad.contiguous(),
    "channels_last": lambda grad: grad.contiguous(memory_format=torch.channels_last),
    "rows_apart": lambda grad: F.pad(grad, (1, 1, 0, 0))[..., 1:-1],
    "columns_apart": lambda grad: grad.repeat_interleave(2, 3)[..., ::2],
    "channels_last_rows_apart": lambda grad: F.pad(grad, (1, 1)).contiguous(memory_format=torch.channels_last)[
        ..., 1:-1
    ],
    "expanded": lambda grad: grad[:1, :, :1, :1].expand_as(grad),
}


@pytest.mark.parametrize("view", VIEWS_OF_GRADIENTS.values(), ids=VIEWS_OF_GRADIENTS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(5, 19, 7, 7), (2, 3, 33, 40), (20, 17, 1, 65), (3, 1, 5, 9), (1, 40, 14, 14), (9, 16, 3, 1)], ids=str
)
def test_bias_gradient_is_the_sum_over_images_and_pixels(shape, dtype, view):
    """Integers, whose sums are exact and rounded once; more pixels than a short sum has, channels beside a vector's."""
    grad = view(torch.randint(-3, 4, shape).to(dtype))
    input, weight = torch.zeros(shape[0], 1, *shape[2:], dtype=dtype), torch.zeros(shape[1], 1, 1, 1, dtype=dtype)
    geometry = ([1, 1], [0, 0, 0, 0], [1, 1], 1)
    bias_only = [False, False, True]
    ours = torch.ops.dlkernels.conv2d_backward(grad, input, weight, *geometry, bias_only)[2]
    assert torch.equal(ours, grad.double().sum((0, 2, 3)).to(dtype))


@pytest.mark.parametrize("dilation", [(2, 3), (3, 1)])
def test_dilation_is_a_kernel_stuffed_with_zeros(dilation):
    x = torch.randn(2, 3, 14, 13, dtype=torch.float64)
    w = torch.randn(4, 3, 3, 2, dtype=torch.float64)
    stuffed = w.new_zeros(4, 3, dilation[0] * 2 + 1, dilation[1] + 1)
    stuffed[:, :, :: dilation[0], :: dilation[1]] = w
    torch.testing.assert_close(dlkernels.conv2d(x, w, dilation=dilation), dlkernels.conv2d(x, stuffed))


def test_shifting_the_input_shifts_the_output():
    x, w = torch.randn(2, 3, 12, 12, dtype=torch.float64), torch.randn(4, 3, 3, 3, dtype=torch.float64)
    shifted = dlkernels.conv2d(x.roll((2, 1), (2, 3)), w)
    torch.testing.assert_close(shifted[..., 2:, 1:], dlkernels.conv2d(x, w)[..., :-2, :-1])


# ---- derivatives ----------------------------------------------------------------------------------

GRADCHECK_CASES = (
    Conv2dCase("plain", (2, 2, 4, 5), (2, 2, 3, 3), padding=1),
    Conv2dCase("groups", (1, 4, 3, 4), (4, 2, 2, 2), groups=2),
    Conv2dCase("stride", (1, 2, 5, 6), (2, 2, 2, 3), stride=(2, 3), bias=False),
    Conv2dCase("dilation", (1, 2, 5, 4), (2, 2, 2, 2), dilation=(3, 2), padding=(1, 0)),
    Conv2dCase("asymmetric", (1, 2, 6, 5), (2, 1, 3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 3), groups=2),
    Conv2dCase("same_even", (1, 2, 4, 3), (2, 2, 2, 4), padding="same"),
    Conv2dCase("one_by_one", (2, 3, 2, 2), (2, 3, 1, 1), bias=False),
)


@pytest.mark.parametrize("backend", OURS)
@each_case(GRADCHECK_CASES)
def test_first_and_second_derivatives_match_finite_differences(case, backend):
    inputs = [t.requires_grad_() for t in case.make_inputs(torch.float64) if t is not None]

    def function(*tensors):
        with dlkernels.backend(backend):
            return dlkernels.conv2d(*tensors, **case.arguments)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@each_case(GRADCHECK_CASES[:4])
def test_reference_backward_is_differentiable(case):
    inputs = case.make_inputs(torch.float64)
    tensors = [random_grad(case, inputs).requires_grad_(), *(t.requires_grad_() for t in inputs[:2])]

    def backward(grad, input, weight):
        return reference.conv2d_backward(grad, input, weight, inputs[2], **case.arguments)[: 3 if case.bias else 2]

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
        assert all(g.requires_grad == create_graph for g in first)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), asking) if create_graph else ()
        return [*first, *second]

    with dlkernels.backend(backend):
        ours = derivatives(dlkernels.conv2d)
    torch.testing.assert_close(ours, derivatives(F.conv2d))


def test_gradients_accumulate_in_leaves():
    conv, x = dlkernels.Conv2d(3, 4, 3), torch.randn(2, 3, 6, 6)
    conv(x).sum().backward()
    once = conv.weight.grad.clone()
    conv(x).sum().backward()
    assert torch.equal(conv.weight.grad, once + once)


# ---- memory ---------------------------------------------------------------------------------------


VIEWS_OF_IMAGES = VIEWS | {
    "flipped": lambda t: t.flip(-1),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "channels_last_sliced": lambda t: (
        torch.cat([t, t], 1).to(memory_format=torch.channels_last)[:, 1 : t.shape[1] + 1] if t.dim() == 4 else t
    ),
}
SOME_CASES = named("3x3", "asymmetric_all", "depthwise", "1x1", "3x3_stride_2")


@pytest.mark.parametrize("argument", ["input", "weight", "bias", "grad", "all"])
@pytest.mark.parametrize("view", VIEWS_OF_IMAGES)
@pytest.mark.parametrize("backend", OURS)
@each_case([replaced for case in SOME_CASES for replaced in [Conv2dCase(**{**vars(case), "bias": True})]])
def test_any_strides_give_the_same_values(case, backend, view, argument):
    inputs = case.make_inputs(torch.float32, integers=True)
    tensors = dict(
        zip(("input", "weight", "bias", "grad"), (*inputs, random_grad(case, inputs, integers=True)), strict=True)
    )
    for name in tensors if argument == "all" else [argument]:
        tensors[name] = VIEWS_OF_IMAGES[view](tensors[name])
    *inputs, grad = tensors.values()
    exact = results(F.conv2d, case, [t.clone(memory_format=torch.contiguous_format) for t in inputs], grad.contiguous())
    with dlkernels.backend(backend):
        ours = results(dlkernels.conv2d, case, inputs, grad)
    assert same_bits(ours, exact)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@each_case([*SOME_CASES, CASES["one_output_pixel"], CASES["same_even"]])
def test_inputs_are_not_modified_and_not_aliased(case, dtype, backend):
    inputs = [t for t in case.make_inputs(dtype) if t is not None]
    grad = random_grad(case, inputs)
    given = [*inputs, grad]
    before = [(t.clone(), t._version) for t in given]
    with dlkernels.backend(backend):
        made = results(dlkernels.conv2d, case, inputs, grad).values()
    for tensor, (bits, version) in zip(given, before, strict=True):
        assert torch.equal(tensor, bits)
        assert tensor._version == version
    pointers = [t.untyped_storage().data_ptr() for t in (*given, *made)]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("input_format", FORMATS)
@pytest.mark.parametrize("backend", ["native", "torch"])
@each_case(named("3x3", "1x1", "asymmetric_all", "17_to_23_channels", "depthwise_stride_2"))
def test_output_has_the_memory_format_that_torch_gives(case, backend, input_format, weight_format):
    x, w, b = case.make_inputs(torch.float32)
    x = x.contiguous(memory_format=FORMATS[input_format])
    w = w.contiguous(memory_format=FORMATS[weight_format])
    with dlkernels.backend(backend):
        ours = dlkernels.conv2d(x, w, b, **case.arguments)
    assert ours.stride() == F.conv2d(x, w, b, **case.arguments).stride()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@each_case(CASES.values())
def test_fake_kernel_tells_shape_strides_and_dtype(case, dtype, memory_format):
    inputs = case.make_inputs(dtype, memory_format=FORMATS[memory_format])
    fake = [None if t is None else t.to("meta") for t in inputs]
    real, told = results(dlkernels.conv2d, case, inputs), results(dlkernels.conv2d, case, fake)
    for name in real:
        a, b = real[name], told[name]
        assert (a.shape, a.stride(), a.dtype, b.device.type) == (b.shape, b.stride(), b.dtype, "meta"), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    """An empty result of the right shape, and a gradient of zeros for what there is."""
    conv, x = dlkernels.Conv2d(3, 4, 3, stride=2), torch.randn(0, 3, 9, 8, requires_grad=True)
    with dlkernels.backend(backend):
        output = conv(x)
        output.sum().backward()
    assert output.shape == (0, 4, 4, 3)
    assert x.grad.shape == x.shape
    assert torch.equal(conv.weight.grad, torch.zeros_like(conv.weight))
    assert torch.equal(conv.bias.grad, torch.zeros_like(conv.bias))


# ---- errors ---------------------------------------------------------------------------------------

X, W, B = torch.ones(2, 4, 5, 5), torch.ones(6, 4, 3, 3), torch.ones(6)
BAD_CALLS = {
    "too few channels": ((X[:, :3], W), {}),
    "too few channels, unbatched": ((X[0, :3], W), {}),
    "too few channels, empty batch": ((X[:0, :3], W), {}),
    "2-D input": ((X[0, 0], W), {}),
    "5-D input": ((X[None], W), {}),
    "2-D weight": ((X, W[0, 0]), {}),
    "3-D weight": ((X, W[0]), {}),
    "5-D weight": ((X, W[None]), {}),
    "no output channels": ((X, W[:0]), {}),
    "kernel larger than input": ((X[:, :, :2], W), {}),
    "dilated kernel larger than input": ((X, W), {"dilation": 3}),
    "input without rows": ((X[:, :, :0], W), {}),
    "negative padding": ((X, W), {"padding": -1}),
    "negative padding in columns": ((X, W), {"padding": (1, -1)}),
    "zero stride": ((X, W), {"stride": 0}),
    "negative stride": ((X, W), {"stride": (1, -2)}),
    "zero dilation": ((X, W), {"dilation": 0}),
    "zero dilation, same": ((X, W), {"dilation": 0, "padding": "same"}),
    "groups that do not fit the input": ((X, W), {"groups": 3}),
    "groups that do not divide the output channels": ((X, torch.ones(5, 2, 3, 3)), {"groups": 2}),
    "zero groups": ((X, W), {"groups": 0}),
    "negative groups": ((X, W), {"groups": -1}),
    "short bias": ((X, W, B[:5]), {}),
    "2-D bias": ((X, W, B[None]), {}),
    "0-D bias": ((X, W, B[0]), {}),
    "weight of another dtype": ((X, W.double()), {}),
    "input of another dtype": ((X.double(), W), {}),
    "bias of another dtype": ((X, W, B.double()), {}),
    "low precision input, float32 weight": ((X.bfloat16(), W), {}),
    "strided same": ((X, W), {"stride": 2, "padding": "same"}),
    "unknown padding string": ((X, W), {"padding": "full"}),
    "three strides": ((X, W), {"stride": (1, 1, 1)}),
    "no strides": ((X, W), {"stride": ()}),
    "three paddings": ((X, W), {"padding": (1, 1, 1)}),
    "four paddings": ((X, W), {"padding": (1, 1, 1, 1)}),
    "three dilations": ((X, W), {"dilation": (1, 1, 1)}),
    "stride is a float": ((X, W), {"stride": 1.5}),
    "stride is a string": ((X, W), {"stride": "2"}),
    "stride is None": ((X, W), {"stride": None}),
    "padding is a float": ((X, W), {"padding": 0.5}),
    "groups is a float": ((X, W), {"groups": 1.0}),
    "groups is a bool": ((X, W), {"groups": True}),
    "no weight": ((X, None), {}),
    "no input": ((None, W), {}),
    "input is an array": ((X.numpy(), W), {}),
    "input is a list": (([[1.0]], W), {}),
    "bias is a number": ((X, W, 1.0), {}),
}


@pytest.mark.parametrize("call", BAD_CALLS)
def test_bad_calls_fail_as_in_torch(call):
    """The same exception type with the same text; a TypeError lists the arguments as torch's parser saw them."""
    arguments, options = BAD_CALLS[call]
    with pytest.raises(Exception) as theirs:
        F.conv2d(*arguments, **options)
    with pytest.raises(theirs.type) as ours:
        dlkernels.conv2d(*arguments, **options)
    assert ours.type is theirs.type
    if ours.type is TypeError:
        assert str(ours.value).startswith("conv2d()")
    else:
        assert str(ours.value) == str(theirs.value)


LENIENT_IN_REFERENCE = ("four paddings", "groups is a bool")  # all four sides are taken; a bool is an int


@pytest.mark.parametrize("call", [name for name in BAD_CALLS if name not in LENIENT_IN_REFERENCE])
def test_bad_calls_fail_in_the_reference_too(call):
    arguments, options = BAD_CALLS[call]
    with pytest.raises((RuntimeError, TypeError, AttributeError)):
        reference.conv2d(*arguments, **options)


@pytest.mark.parametrize("options", [{"stride": (2,)}, {"padding": [1]}, {"dilation": (2,)}, {"padding": [1, 2]}, {}])
def test_one_number_in_a_sequence_stands_for_both(options):
    assert torch.equal(dlkernels.conv2d(X, W, **options), F.conv2d(X, W, **options))
    assert torch.equal(reference.conv2d(X, W, **options), F.conv2d(X, W, **options))


@pytest.mark.parametrize(
    "dtype", [torch.complex64, torch.complex128, torch.int64, torch.int32, torch.uint8, torch.bool]
)
def test_unsupported_dtypes_name_the_argument(dtype):
    with pytest.raises((RuntimeError, TypeError, NotImplementedError), match=r"(?s)input.*(got|not|but)"):
        dlkernels.conv2d(X.to(dtype), W.to(dtype))


@pytest.mark.parametrize("moved", ["input", "weight", "bias"])
def test_mixed_devices_name_the_argument(moved):
    tensors = {"input": X, "weight": W, "bias": B}
    tensors[moved] = tensors[moved].to("meta")
    with pytest.raises(RuntimeError, match=r"(input|weight|bias).*(cpu.*meta|meta.*cpu)"):
        dlkernels.conv2d(*tensors.values())


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "full"},
        {"padding": "same", "stride": 2},
        {"padding_mode": "mirror"},
        {"groups": 3},
        {"groups": 0},
        {"groups": 4},
        {"bad": 1},
    ],
    ids=str,
)
def test_module_refuses_what_nn_refuses(options):
    with pytest.raises(Exception) as theirs:
        nn.Conv2d(4, 6, 3, **options)
    with pytest.raises(theirs.type) as ours:
        dlkernels.Conv2d(4, 6, 3, **options)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("shape", [(2, 3, 5, 5), (5, 5), (1, 2, 4, 5, 5), (2, 4, 2, 2)], ids=str)
def test_module_forward_fails_as_in_nn(shape):
    with pytest.raises(RuntimeError) as theirs:
        nn.Conv2d(4, 6, 3)(torch.ones(shape))
    with pytest.raises(RuntimeError) as ours:
        dlkernels.Conv2d(4, 6, 3)(torch.ones(shape))
    assert str(ours.value) == str(theirs.value)


# ---- module ---------------------------------------------------------------------------------------

MODULE_OPTIONS = (
    {},
    {"bias": False},
    {"stride": 2, "padding": 1},
    {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    {"groups": 2, "padding": "same"},
    {"padding": "valid"},
    {"padding": 1, "padding_mode": "circular"},
)


def twins(*arguments, **options):
    """Our module and torch's, built under the same seed."""
    torch.manual_seed(1)
    ours = dlkernels.Conv2d(*arguments, **options)
    torch.manual_seed(1)
    return ours, nn.Conv2d(*arguments, **options)


@pytest.mark.parametrize("options", MODULE_OPTIONS, ids=str)
def test_module_is_nn_conv2d_in_every_attribute(options):
    ours, theirs = twins(4, 6, 3, **options)
    assert isinstance(ours, nn.Conv2d)
    assert ours.extra_repr() == theirs.extra_repr()
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name in nn.Conv2d.__constants__:
        assert getattr(ours, name) == getattr(theirs, name), name
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize("padding", ["same", "valid", 2, (1, 3), 0], ids=str)
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
def test_module_pads_as_nn(padding_mode, padding, unbatched, backend):
    ours, theirs = twins(3, 4, (2, 3), padding=padding, padding_mode=padding_mode, dilation=(3, 2), dtype=torch.float64)
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    x = x[0] if unbatched else x
    with dlkernels.backend(backend):
        torch.testing.assert_close(ours(x), theirs(x))


def test_state_dicts_interchange():
    ours, theirs = dlkernels.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight, theirs.weight)
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.weight, theirs.weight)


def copied_by_pickle(module):
    return pickle.loads(pickle.dumps(module))


def copied_by_save(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, copied_by_pickle, copied_by_save])
def test_module_copies(copied):
    conv, x = dlkernels.Conv2d(3, 4, 3, padding="same"), torch.randn(2, 3, 6, 6)
    other = copied(conv)
    assert type(other) is dlkernels.Conv2d
    assert torch.equal(other(x), conv(x))
    assert other.weight.data_ptr() != conv.weight.data_ptr()


def test_module_factory_arguments():
    assert dlkernels.Conv2d(3, 4, 3, device="meta").weight.device.type == "meta"
    assert dlkernels.Conv2d(3, 4, 3, dtype=torch.bfloat16).bias.dtype == torch.bfloat16
    materialised = dlkernels.Conv2d(3, 4, 3, device="meta").to_empty(device="cpu")
    materialised.reset_parameters()
    assert materialised(torch.randn(1, 3, 5, 5)).isfinite().all()


def test_module_moves_to_channels_last():
    conv = dlkernels.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert conv(torch.randn(2, 3, 6, 6)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_module_moves_to_dtype(dtype):
    conv = dlkernels.Conv2d(3, 4, 3).to(dtype)
    assert conv(torch.randn(2, 3, 6, 6, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(
    "parametrized", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm]
)
def test_module_with_parametrizations(parametrized):
    ours, theirs = twins(3, 4, 3, padding=1, dtype=torch.float64)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    outputs = []
    for module in ours, theirs:
        torch.manual_seed(2)
        outputs.append(parametrized(module)(x))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])


def test_functional_call():
    conv, x = dlkernels.Conv2d(3, 4, 3), torch.randn(2, 3, 6, 6)
    other = {"weight": torch.randn(4, 3, 3, 3), "bias": torch.randn(4)}
    expected = dlkernels.conv2d(x, other["weight"], other["bias"])
    assert torch.equal(torch.func.functional_call(conv, other, (x,)), expected)


# ---- autocast, modes, checkpoint -------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_computes_in_its_dtype(dtype, backend):
    """The output is what a call on rounded tensors gives; gradients come back in the parameters' dtype."""
    conv, x = dlkernels.Conv2d(8, 8, 3, padding=1), torch.randn(2, 8, 9, 9, requires_grad=True)
    with dlkernels.backend(backend):
        with torch.autocast("cpu", dtype):
            output = conv(x)
        expected = dlkernels.conv2d(x.to(dtype), conv.weight.to(dtype), conv.bias.to(dtype), padding=1)
        output.float().square().sum().backward()
    assert output.dtype == dtype
    assert torch.equal(output, expected)
    assert x.grad.dtype == conv.weight.grad.dtype == conv.bias.grad.dtype == torch.float32
    twin = nn.Conv2d(8, 8, 3, padding=1)
    twin.load_state_dict(conv.state_dict())
    twin(x.detach()).square().sum().backward()
    assert relative_error(conv.weight.grad, twin.weight.grad) < 2e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_mixed_dtypes_and_leaves_float64(backend):
    conv = dlkernels.Conv2d(3, 4, 3)
    x = torch.randn(2, 3, 6, 6)
    with dlkernels.backend(backend), torch.autocast("cpu", torch.bfloat16):
        assert conv(x.bfloat16()).dtype == torch.bfloat16
        assert dlkernels.conv2d(x.double(), conv.weight.double()).dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_grad_and_inference_mode(backend):
    conv, x = dlkernels.Conv2d(3, 4, 3), torch.randn(2, 3, 6, 6)
    with dlkernels.backend(backend):
        expected = conv(x)
        assert expected.requires_grad
        for mode in torch.no_grad, torch.inference_mode:
            with mode():
                output = conv(x)
            assert not output.requires_grad
            assert output.is_inference() == (mode is torch.inference_mode)
            assert torch.equal(output, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", OURS)
def test_checkpoint(backend, reentrant):
    model = nn.Sequential(dlkernels.Conv2d(3, 4, 3), nn.ReLU(), dlkernels.Conv2d(4, 4, 3))
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with dlkernels.backend(backend):
        expected = torch.autograd.grad(model(x).square().sum(), x)
        kept = checkpoint(model, x, use_reentrant=reentrant).square().sum()
        kept.backward()
    assert torch.equal(x.grad, expected[0])


# ---- dispatcher, compile, export --------------------------------------------------------------------

# Internal form: padding is (top, bottom, left, right).
INTERNAL = {
    "plain": ((2, 4, 6, 7), (6, 4, 3, 3), [1, 1], [1, 1, 1, 1], [1, 1], 1),
    "asymmetric": ((2, 4, 9, 8), (6, 2, 2, 3), [2, 1], [0, 1, 2, 0], [1, 2], 2),
    "depthwise": ((1, 5, 7, 7), (5, 1, 3, 3), [2, 2], [1, 1, 1, 1], [1, 1], 5),
    "empty_batch": ((0, 3, 5, 5), (4, 3, 3, 3), [1, 1], [0, 0, 0, 0], [1, 1], 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("problem", INTERNAL)
def test_opcheck_forward(problem, bias, memory_format, dtype):
    input, weight, *numbers = INTERNAL[problem]
    x = torch.randn(input, dtype=dtype).to(memory_format=FORMATS[memory_format]).requires_grad_()
    w = torch.randn(weight, dtype=dtype).requires_grad_()
    b = torch.randn(weight[0], dtype=dtype).requires_grad_() if bias else None
    torch.library.opcheck(torch.ops.dlkernels.conv2d, internal_arguments("conv2d", x, w, b, *numbers))


@pytest.mark.parametrize("mask", [[True, True, True], [True, False, False], [False, True, True], [False, False, True]])
@pytest.mark.parametrize("problem", INTERNAL)
def test_opcheck_backward(problem, mask):
    input, weight, *numbers = INTERNAL[problem]
    x, w = torch.randn(input, requires_grad=True), torch.randn(weight, requires_grad=True)
    arguments = internal_arguments("conv2d", x, w, None, *numbers)
    grad = torch.randn_like(torch.ops.dlkernels.conv2d(*arguments)).requires_grad_()
    arguments = internal_arguments("conv2d_backward", grad, x, w, *numbers, mask)
    made = torch.ops.dlkernels.conv2d_backward(*arguments)
    assert [t is not None for t in made] == mask
    torch.library.opcheck(torch.ops.dlkernels.conv2d_backward, arguments)


def internal_arguments(name, *arguments):
    """With zeros for what the schema takes beyond them, as the float32 precision."""
    schema = getattr(torch.ops.dlkernels, name).default._schema
    return (*arguments, *(0 for _ in schema.arguments[len(arguments) :]))


def network(conv):
    torch.manual_seed(3)
    return nn.Sequential(conv(3, 4, 3, padding=1), nn.ReLU(), conv(4, 6, (2, 3), stride=2, padding=(1, 0), groups=2))


def loss_and_gradients(model, x):
    x = x.detach().requires_grad_()
    loss = model(x).square().sum()
    return [loss, *torch.autograd.grad(loss, [x, *model.parameters()])]


@pytest.mark.compile
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic, backend):
    torch._dynamo.reset()
    model = network(dlkernels.Conv2d)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with dlkernels.backend(backend):
        for shape in [(2, 3, 8, 9), (3, 3, 11, 7)] if dynamic else [(2, 3, 8, 9)]:
            x = torch.randn(shape)
            torch.testing.assert_close(loss_and_gradients(compiled, x), loss_and_gradients(model, x))


@pytest.mark.compile
def test_compiled_code_sees_the_operator():
    """Tracing keeps our operator, forward and backward, instead of taking it apart."""
    torch._dynamo.reset()
    seen = []

    def recording(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    model = network(dlkernels.Conv2d)
    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=boxed(recording)))
    loss_and_gradients(compiled, torch.randn(2, 3, 8, 8))
    assert {"dlkernels.conv2d.default", "dlkernels.conv2d_backward.default"} <= set(seen)


def boxed(compiler):
    from functorch.compile import make_boxed_func

    return lambda graph, inputs: make_boxed_func(compiler(graph, inputs))


@pytest.mark.compile
@pytest.mark.slow
def test_compiles_with_inductor():
    torch._dynamo.reset()
    model, x = network(dlkernels.Conv2d), torch.randn(2, 3, 8, 9)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(loss_and_gradients(compiled, x), loss_and_gradients(model, x))


@pytest.mark.compile
@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_a_dynamic_batch(strict):
    model = network(dlkernels.Conv2d).eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (torch.randn(4, 3, 8, 9),), dynamic_shapes=({0: batch},), strict=strict)
    x = torch.randn(7, 3, 8, 9)
    torch.testing.assert_close(program.module()(x), model(x))
    assert any("dlkernels.conv2d" in str(node.target) for node in program.graph.nodes)


def test_symbolic_tracing_keeps_the_call():
    """torch.fx, as feature extractors use it: our module is traced like torch's, through whatever it does."""
    model = nn.Sequential(dlkernels.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU())
    traced = torch.fx.symbolic_trace(model)
    assert dlkernels.conv2d in [node.target for node in traced.graph.nodes]
    x = torch.randn(2, 3, 6, 7)
    assert torch.equal(traced(x), model(x))
    with dlkernels.backend("reference"):
        assert torch.equal(traced(x), model(x))


# ---- function transforms -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("in_dims", "shapes"),
    [
        ((0, None, None), ((3, 2, 4, 6, 7), (6, 2, 3, 2), (6,))),
        ((None, 0, None), ((2, 4, 6, 7), (3, 6, 2, 3, 2), (6,))),
        ((0, 0, None), ((3, 2, 4, 6, 7), (3, 6, 2, 3, 2), (6,))),
        ((0, 0, 0), ((3, 2, 4, 6, 7), (3, 6, 2, 3, 2), (3, 6))),
        ((None, None, 0), ((2, 4, 6, 7), (6, 2, 3, 2), (3, 6))),
        ((1, 4, 1), ((2, 3, 4, 6, 7), (6, 2, 3, 2, 3), (6, 3))),
        ((0, None, None), ((3, 4, 6, 7), (6, 2, 3, 2), (6,))),
    ],
    ids=["input", "weight", "input_weight", "all", "bias", "other_dimensions", "unbatched"],
)
def test_vmap_is_a_loop(in_dims, shapes, backend):
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    conv = functools.partial(dlkernels.conv2d, stride=(2, 1), padding=1, groups=2)
    slices = [
        [t if dim is None else t.select(dim, i) for t, dim in zip(tensors, in_dims, strict=True)] for i in range(3)
    ]
    with dlkernels.backend(backend):
        mapped = torch.func.vmap(conv, in_dims)(*tensors)
        expected = torch.stack([conv(*part) for part in slices])
    torch.testing.assert_close(mapped, expected)


def test_nested_vmap():
    x, w = torch.randn(2, 3, 1, 4, 5, 5, dtype=torch.float64), torch.randn(3, 2, 4, 3, 3, dtype=torch.float64)
    mapped = torch.func.vmap(torch.func.vmap(dlkernels.conv2d), in_dims=(0, None))(x, w)
    expected = torch.stack([torch.stack([F.conv2d(x[i, j], w[j]) for j in range(3)]) for i in range(2)])
    torch.testing.assert_close(mapped, expected)


def loss_with(conv, case):
    return lambda w, b, x: conv(x, w, b, **case.arguments).square().sum()


TRANSFORMS = {
    "grad": lambda loss, w, b, x: torch.func.grad(loss, (0, 1, 2))(w, b, x),
    "per_sample_gradients": lambda loss, w, b, x: torch.func.vmap(torch.func.grad(loss, (0, 1)), (None, None, 0))(
        w, b, x
    ),
    "grad_of_grad": lambda loss, w, b, x: torch.func.grad(
        lambda v: sum(g.square().sum() for g in torch.func.grad(loss, (0, 2))(v, b, x))
    )(w),
    "grad_of_per_sample_norms": lambda loss, w, b, x: torch.func.grad(
        lambda v: torch.func.vmap(torch.func.grad(loss), (None, None, 0))(v, b, x).square().sum()
    )(w),
    "vjp": lambda loss, w, b, x: torch.func.vjp(loss, w, b, x)[1](torch.tensor(2.0, dtype=x.dtype)),
    "jacrev": lambda loss, w, b, x: torch.func.jacrev(lambda v: torch.func.grad(loss)(w, v, x))(b),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backend", BACKENDS)
@each_case(GRADCHECK_CASES[:2])
def test_function_transforms_equal_torchs(case, backend, transform):
    x, w, b = case.make_inputs(torch.float64)
    x = torch.cat([x, 2 * x])
    theirs = TRANSFORMS[transform](loss_with(F.conv2d, case), w, b, x)
    with dlkernels.backend(backend):
        ours = TRANSFORMS[transform](loss_with(dlkernels.conv2d, case), w, b, x)
    torch.testing.assert_close(ours, theirs)


def test_jacobian_of_the_output():
    x, w = torch.randn(1, 2, 4, 4, dtype=torch.float64), torch.randn(2, 2, 3, 3, dtype=torch.float64)
    ours = torch.func.jacrev(dlkernels.conv2d, (0, 1))(x, w)
    torch.testing.assert_close(ours, torch.func.jacrev(F.conv2d, (0, 1))(x, w))


@pytest.mark.parametrize("dual", [0, 1])
def test_forward_mode_is_refused(dual):
    """With an error, never with a silent zero."""
    tensors = [torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3)]
    with forward_ad.dual_level():
        tensors[dual] = forward_ad.make_dual(tensors[dual], torch.ones_like(tensors[dual]))
        with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)forward|jvp"):
            dlkernels.conv2d(*tensors)


def test_jvp_is_refused():
    x, w = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)forward|jvp"):
        torch.func.jvp(lambda v: dlkernels.conv2d(v, w), (x,), (x,))


# ---- the same bits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_case([*LARGE_CASES, *SOME_CASES])
def test_threads_and_repetition_do_not_change_bits(case, dtype, memory_format):
    inputs = case.make_inputs(dtype, memory_format=FORMATS[memory_format])
    grad = random_grad(case, inputs)
    runs = []
    for threads in (1, 1, 2, 4):
        torch.set_num_threads(threads)
        runs.append(results(dlkernels.conv2d, case, inputs, grad))
    assert all(same_bits(run, runs[0]) for run in runs)


def test_alignment_does_not_change_bits():
    case = LARGE_CASES[0]
    x, w, b = case.make_inputs(torch.float32)
    shifted = torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    assert torch.equal(dlkernels.conv2d(x, w, b, padding=1), dlkernels.conv2d(shifted, w, b, padding=1))


def test_several_python_threads_at_once():
    """Forward and backward of different shapes in four threads, each with the bits it has alone."""
    work = [(case, case.make_inputs(torch.float32)) for case in (*LARGE_CASES, *SOME_CASES)]
    alone = [results(dlkernels.conv2d, *item) for item in work]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda item: results(dlkernels.conv2d, *item), work * 3))
    assert all(same_bits(a, b) for a, b in zip(together, alone * 3, strict=True))


class ConvolvedImages(torch.utils.data.Dataset):
    """Images that are convolved where they are loaded."""

    def __init__(self, images, weight):
        self.images, self.weight = images, weight

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return dlkernels.conv2d(self.images[index], self.weight, padding=1)


def one_thread(worker):
    torch.set_num_threads(1)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_works_in_data_loader_workers():
    dataset = ConvolvedImages(torch.randn(6, 3, 64, 64), torch.randn(16, 3, 3, 3))
    expected = torch.stack(list(dataset))
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=2, num_workers=2, worker_init_fn=one_thread, multiprocessing_context="fork", timeout=60
    )
    assert torch.equal(torch.cat(list(loader)), expected)


FORKS_BESIDE_A_THREAD = """
import os, signal, threading, torch, dlkernels
torch.set_num_threads(1)
weight, stop = torch.randn(4, 1, 1, 1), threading.Event()

def convolve(megabytes):
    with torch.no_grad():
        dlkernels.conv2d(torch.empty(1, 1, 128 * megabytes, 512), weight)

def allocate_and_free():
    turn = 0
    while not stop.is_set():
        turn += 1
        convolve(4 + 4 * (turn % 37))

thread = threading.Thread(target=allocate_and_free)
thread.start()
hung = 0
for _ in range(100):
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # ends a child that hangs
        convolve(4)
        os._exit(0)
    hung += os.waitpid(child, 0)[1] != 0
stop.set()
thread.join()
assert hung == 0, hung
"""


@pytest.mark.slow
def test_a_fork_while_another_thread_allocates():
    """The child finds the memory pool usable, whatever the other thread was doing (one fork in 80 used to hang)."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKS_BESIDE_A_THREAD], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


# ---- numbers that are not ordinary -------------------------------------------------------------------


NUMERIC_CASES = (
    Conv2dCase("3x3", (2, 16, 13, 13), (16, 16, 3, 3)),
    Conv2dCase("3x3_padded", (2, 16, 13, 13), (16, 16, 3, 3), padding=1),
    Conv2dCase("3x3_large", (2, 64, 28, 28), (64, 64, 3, 3), padding=1),
    Conv2dCase("1x1", (2, 32, 12, 12), (48, 32, 1, 1)),
    Conv2dCase("depthwise", (2, 16, 13, 13), (16, 1, 3, 3), padding=1, groups=16),
    Conv2dCase("strided", (2, 8, 13, 13), (16, 8, 5, 5), stride=2),
    Conv2dCase("dilated_groups", (2, 8, 13, 13), (16, 4, 3, 3), dilation=2, groups=2),
)


def assert_same_pattern(ours, exact):
    """NaN, +inf and -inf in the same places, and ordinary accuracy everywhere else."""
    torch.testing.assert_close(ours, exact.to(ours.dtype), equal_nan=True, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_case(NUMERIC_CASES)
def test_one_value_that_is_not_finite_spreads_no_further_than_the_formula(case, dtype, value, precision, memory_format):
    """One such value in the input, then in the gradient (whose weight gradient is plain only without padding)."""
    torch.set_float32_matmul_precision(precision)
    input, weight, bias = case.make_inputs(dtype, memory_format=FORMATS[memory_format])
    spoiled = input.clone()
    spoiled[1, 2, 6, 5] = value
    exact = reference.conv2d(spoiled.double(), weight.double(), bias.double(), **case.arguments)
    ours = results(dlkernels.conv2d, case, (spoiled, weight, bias))
    assert not exact.isfinite().all()
    assert_same_pattern(ours["output"], exact)
    assert ours["grad_input"].isfinite().all()

    grad = random_grad(case, (input, weight, bias))
    grad[1, 3, 2, 4] = value
    exact = reference.conv2d_backward(*doubled((grad, input, weight, bias)), **case.arguments)
    ours = results(dlkernels.conv2d, case, (input, weight, bias), grad)
    assert_same_pattern(ours["grad_input"], exact[0])
    assert_same_pattern(ours["grad_bias"], exact[2])
    if case.padding == 0:
        assert (ours["grad_weight"].isfinite() == exact[1].isfinite()).all()


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("scale", [1e30, 1e25, 1e-25, 1e-30])
@each_case(NUMERIC_CASES)
def test_large_and_small_numbers_are_ordinary(case, scale, precision):
    """Scaled by what a float32 can hold, one image of two: the result is the scaled result."""
    torch.set_float32_matmul_precision(precision)
    input, weight, _ = case.make_inputs(torch.float32)
    input[1] *= scale
    exact = F.conv2d(input.double(), weight.double(), **case.arguments)
    ours = dlkernels.conv2d(input, weight, **case.arguments)
    assert relative_error(ours[0], exact[0]) < 1e-5
    assert relative_error(ours[1], exact[1]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_case(NUMERIC_CASES)
def test_denormals_give_finite_results(case, dtype):
    input, weight, bias = case.make_inputs(dtype)
    tiny = [input * 1e-40, weight * 1e-40, bias * 1e-40]
    for value in results(dlkernels.conv2d, case, tiny, random_grad(case, tiny) * 1e-40).values():
        assert value.isfinite().all()
        assert value.abs().max() < 1e-30


def test_denormals_are_as_before_after_a_call():
    """The processor's way with denormals belongs to the caller."""
    dlkernels.conv2d(torch.randn(2, 64, 28, 28), torch.randn(64, 64, 3, 3), padding=1)
    assert (torch.full((100,), 1e-40) * 0.5 != 0).all()


# ---- backends ------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """The names of the operators that were called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket._qualified_op_name)
        return function(*args, **(kwargs or {}))


def backend_in_use():
    with Recorder() as recorder:
        dlkernels.conv2d(torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3))
    if "dlkernels::conv2d" in recorder.names:
        return "native"
    return "torch" if "aten::convolution" in recorder.names else "reference"


@pytest.fixture
def backend_restored():
    yield
    dlkernels.set_backend("native")


def test_native_is_the_default():
    assert backend_in_use() == "native"


def test_backends_nest():
    with dlkernels.backend("reference"):
        assert backend_in_use() == "reference"
        with dlkernels.backend("torch"):
            assert backend_in_use() == "torch"
            with dlkernels.backend("native"):
                assert backend_in_use() == "native"
        assert backend_in_use() == "reference"
    assert backend_in_use() == "native"


def test_backend_ends_with_an_exception():
    with pytest.raises(KeyError), dlkernels.backend("torch"):
        raise KeyError
    assert backend_in_use() == "native"


@pytest.mark.usefixtures("backend_restored")
def test_set_backend_is_for_the_process_and_backend_for_the_thread():
    def in_another_thread():
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(backend_in_use).result()

    with dlkernels.backend("torch"):
        assert in_another_thread() == "native"
        dlkernels.set_backend("reference")
        assert backend_in_use() == "torch"
    assert backend_in_use() == "reference"
    assert in_another_thread() == "reference"


def test_backend_of_one_thread_does_not_leak_into_another():
    inside, leave = threading.Event(), threading.Event()

    def stay_inside():
        with dlkernels.backend("reference"):
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=stay_inside)
    thread.start()
    inside.wait(30)
    try:
        assert backend_in_use() == "native"
    finally:
        leave.set()
        thread.join()


@pytest.mark.parametrize("name", ["cuda", "", None, "Native"])
def test_unknown_backend(name):
    with pytest.raises(ValueError, match="native"):
        dlkernels.set_backend(name)
    with pytest.raises(ValueError, match="native"), dlkernels.backend(name):
        pass
    assert backend_in_use() == "native"


@each_case(CASES.values())
def test_backends_agree(case):
    inputs = case.make_inputs(torch.float64)
    made = {}
    for backend in BACKENDS:
        with dlkernels.backend(backend):
            made[backend] = results(dlkernels.conv2d, case, inputs)
    torch.testing.assert_close(made["native"], made["reference"])
    torch.testing.assert_close(made["native"], made["torch"])


# ---- training --------------------------------------------------------------------------------------------


def small_cnn(conv):
    torch.manual_seed(4)
    return nn.Sequential(
        conv(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        conv(8, 16, 3, padding="same", groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


def losses_of_training(model, images, labels, steps=20):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_follows_nn_step_by_step(backend):
    images, labels = torch.randn(16, 3, 16, 16), torch.randint(0, 5, (16,))
    theirs = losses_of_training(small_cnn(nn.Conv2d), images, labels)
    with dlkernels.backend(backend):
        ours = losses_of_training(small_cnn(dlkernels.Conv2d), images, labels)
    assert theirs[-1] < theirs[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_direct_call_of_the_operator_runs_in_autocasts_dtype():
    x, w = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
    geometry = ([1, 1], [0, 0, 0, 0], [1, 1], 1)
    expected = torch.ops.dlkernels.conv2d(x.bfloat16(), w.bfloat16(), None, *geometry)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.ops.dlkernels.conv2d(x, w, None, *geometry), expected)
    assert torch.ops.dlkernels.conv2d(x, w, None, *geometry).dtype == torch.float32
