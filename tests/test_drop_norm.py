"""drop_mask, drop_norm and DropNorm: every test states one property, for the native kernels and where it can for all.

Values are judged by the tolerance rule of dlkernels.testing; the yardstick is torch's own layer normalisation of the
kept features, gathered before and scattered after.
"""

import copy
import functools
import io
import itertools
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import dlkernels
from dlkernels import reference
from dlkernels.testing import DTYPES, VIEWS, DropNormCase, compare, drop_norm_cases, relative_error

CASES = {case.name: case for case in drop_norm_cases()}
BACKENDS = ("native", "reference", "torch")
OURS = ("native", "reference")
GRADIENTS = ("grad_input", "grad_weight", "grad_bias")

# Large enough to be divided among threads, in rows and in features.
LARGE_CASES = (
    DropNormCase("large", (130, 9), (1000,), 500),
    DropNormCase("large_no_mask", (130, 9), (1000,)),
    DropNormCase("many_short_rows", (20011,), (24,), 5, eps=1e-2),
    DropNormCase("few_long_rows", (3,), (70001,), 7000),
    DropNormCase("one_long_row", (), (300007,), 150000),
)

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_of_ours = pytest.mark.parametrize("backend", OURS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def each_case(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def named(*names):
    return [CASES[name] for name in names]


def layer_norm(x, shape, weight, bias, eps):
    """F.layer_norm; on CUDA it takes one dtype alone, so 16-bit rows beside float32 parameters are widened for it."""
    parameter = bias if weight is None else weight
    mixed = parameter is not None and parameter.dtype != x.dtype
    if mixed and x.is_cuda and not torch.is_autocast_enabled("cuda"):
        return F.layer_norm(x.to(parameter.dtype), shape, weight, bias, eps).to(x.dtype)
    return F.layer_norm(x, shape, weight, bias, eps)


def gather_norm_scatter(input, keep=None, weight=None, bias=None, eps=1e-5, rescale=True):
    """The definition in torch's own operators, in the dtype of the input."""
    given = next((t for t in (keep, weight, bias) if t is not None), None)
    shape = input.shape[-1:] if given is None else given.shape
    if keep is None:
        return layer_norm(input, shape, weight, bias, eps)
    kept = keep.flatten().nonzero().flatten()
    scale = keep.numel() / max(len(kept), 1) if rescale else 1.0
    weight, bias = (None if t is None else t.flatten()[kept] for t in (weight, bias))
    x = input.flatten(-len(shape))[..., kept]
    y = layer_norm(x, kept.shape, weight, bias, eps) * scale
    zeros = torch.zeros_like(input).flatten(-len(shape))
    return zeros.index_copy(-1, kept, y).reshape(input.shape)


def results(function, case, inputs, grad=None):
    """output, and a gradient for each of input, weight and bias that is there; grad defaults to ones."""
    leaves = [t.detach().requires_grad_() if t is not None and t.is_floating_point() else t for t in inputs]
    output = function(*leaves, **case.arguments)
    grad = torch.ones_like(output) if grad is None else grad
    wanted = {name: t for name, t in zip(GRADIENTS, (leaves[0], *leaves[2:]), strict=True) if t is not None}
    gradients = torch.autograd.grad(output, list(wanted.values()), grad)
    return {"output": output.detach(), **dict(zip(wanted, gradients, strict=True))}


def random_grad(inputs):
    """A gradient of the output's shape, in the input's dtype."""
    input = inputs[0]
    return torch.randn(input.shape, dtype=torch.float64).to(input.device, input.dtype)


def doubled(tensors):
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_as_accurate_as_torchs(case, inputs, backend):
    """By the rule; of a single kept feature only the output, see test_one_feature_is_its_bias."""
    only_one = math.prod(case.features) - (case.dropped or 0) == 1
    grad = random_grad(inputs)
    exact = results(gather_norm_scatter, case, doubled(inputs), grad.double())
    theirs = results(gather_norm_scatter, case, inputs, grad)
    with dlkernels.backend(backend):
        ours = results(dlkernels.drop_norm, case, inputs, grad)
    assert ours.keys() == exact.keys()
    for name in ["output"] if only_one else exact:
        dtype = theirs[name].dtype
        compare(ours[name], theirs[name], exact[name], dtype, gradient=name != "output", name=name)


# ---- values ---------------------------------------------------------------------------------------


@each_of_ours
@each_dtype
@each_case([*CASES.values(), *LARGE_CASES])
def test_output_and_gradients_are_as_accurate_as_torchs(case, dtype, backend, device):
    assert_as_accurate_as_torchs(case, case.make_inputs(dtype, device), backend)


@each_of_ours
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@each_case(named("half_dropped", "no_mask", "no_bias", "weight_only", "two_feature_dimensions", "width_1000"))
def test_16_bit_input_with_float32_parameters(case, dtype, backend, device):
    """The output is in the input's dtype, the parameters' gradients are in theirs."""
    assert_as_accurate_as_torchs(case, case.make_inputs(dtype, device, parameter_dtype=torch.float32), backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("M", [256, 264, 512, 520, 4096, 7168, 7680, 8192, 8200])
def test_rows_around_what_a_gpu_holds(M, dtype, device):
    """A warp's rows, a block's, and what is too long for one's registers or shared memory."""
    case = DropNormCase(f"{M}", (9,), (M,), M // 3)
    assert_as_accurate_as_torchs(case, case.make_inputs(dtype, device), "native")


@each_of_ours
@pytest.mark.parametrize("parameters", ["both", "weight", "bias", "none"])
@pytest.mark.parametrize("M", [5, 8, 100, 1000, 4096, 65537, 2**20])
def test_rows_of_every_length(M, parameters, backend, device):
    case = DropNormCase(
        f"{M}", (3,), (M,), M // 3, parameters in ("both", "weight"), parameters in ("both", "bias"), eps=1e-2
    )
    assert_as_accurate_as_torchs(case, case.make_inputs(torch.float32, device), backend)


@each_of_ours
@pytest.mark.parametrize("mean", [0.0, 10.0, 1000.0])
@pytest.mark.parametrize("features", [(64,), (1000,), (32, 32), (16384,)], ids=str)
def test_without_a_mask_the_error_is_at_most_twice_layer_norms(features, mean, backend, device):
    """Where the mean is large beside the deviation, too."""
    case = DropNormCase("no_mask", (37,), features)
    input, *others = case.make_inputs(torch.float32, device)
    assert_as_accurate_as_torchs(case, (input + mean, *others), backend)


ODD_ROWS = {
    "a step": lambda x, i: x + 1000 * (i < 64),
    "a ramp": lambda x, i: x + 1000 * i / len(i),
    "one outlier": lambda x, i: x + 10000 * (i == 0),
    "constant at first": lambda x, i: x * (i >= 128),
}


@each_of_ours
@pytest.mark.parametrize("M", [100, 1000, 4096, 16384])
@pytest.mark.parametrize("rows", ODD_ROWS)
def test_rows_that_begin_unlike_they_go_on(rows, M, backend, device):
    case = DropNormCase("no_mask", (37,), (M,))
    input, *others = case.make_inputs(torch.float32, device)
    odd = ODD_ROWS[rows](input, torch.arange(M, device=device))
    assert_as_accurate_as_torchs(case, (odd, *others), backend)


@pytest.mark.parametrize("N", [*range(1, 20), 31, 32, 33, 63, 64, 65, 127, 255, 257, 511, 513])
def test_every_number_of_rows(N, device):
    """Rows are summed into the parameters' gradients in parts: none is lost, none counted twice."""
    case = DropNormCase(f"{N}", (N,), (19,), 7)
    inputs = case.make_inputs(torch.float64, device)
    grad = random_grad(inputs)
    ours = results(dlkernels.drop_norm, case, inputs, grad)
    torch.testing.assert_close(ours, results(gather_norm_scatter, case, inputs, grad))


@each_case(CASES.values())
def test_reference_backward_is_the_gradient(case):
    """The written-out backward equals what autograd derives from the forward and from torch's own operators."""
    inputs = case.make_inputs(torch.float64)
    grad = random_grad(inputs)
    exact = results(gather_norm_scatter, case, inputs, grad)
    derived = results(reference.drop_norm, case, inputs, grad)
    grad_input, grad_keep, *others = reference.drop_norm_backward(grad, *inputs, **case.arguments)
    assert grad_keep is None
    for name, ours in zip(GRADIENTS, (grad_input, *others), strict=True):
        if name in exact:
            torch.testing.assert_close(ours, exact[name])
            torch.testing.assert_close(ours, derived[name])
        else:
            assert ours is None


# ---- identities -----------------------------------------------------------------------------------


@each_of_ours
@pytest.mark.parametrize("features", [(40,), (5, 8)], ids=str)
def test_statistics_are_those_of_the_kept_features(features, backend):
    case = DropNormCase("statistics", (6,), features, 13, weight=False, bias=False, eps=0.0, rescale=False)
    input, keep, *_ = case.make_inputs(torch.float64)
    with dlkernels.backend(backend):
        output = dlkernels.drop_norm(input, keep, eps=0.0, rescale=False)
    kept = output[:, keep]
    torch.testing.assert_close(kept.mean(1), torch.zeros(6).double())
    torch.testing.assert_close(kept.var(1, correction=0), torch.ones(6).double())
    assert (output[:, ~keep] == 0).all()


@each_of_ours
@each_dtype
@each_case(named("half_dropped", "two_feature_dimensions", "no_weight", "width_17", "none_kept", "one_kept"))
def test_dropped_features_are_zero_and_have_no_gradient(case, dtype, backend, device):
    inputs = case.make_inputs(dtype, device)
    dropped = ~inputs[1]
    with dlkernels.backend(backend):
        ours = results(dlkernels.drop_norm, case, inputs, random_grad(inputs))
    for value in ours.values():
        assert (value[..., dropped] == 0).all()


@each_of_ours
def test_scaling_and_shifting_the_input_changes_nothing(backend):
    case = CASES["half_dropped"]
    input, keep, weight, bias = case.make_inputs(torch.float64)
    with dlkernels.backend(backend):
        output = dlkernels.drop_norm(input, keep, weight, bias, eps=0.0)
        torch.testing.assert_close(dlkernels.drop_norm(3 * input - 7, keep, weight, bias, eps=0.0), output)


@each_of_ours
def test_order_of_features_does_not_matter(backend):
    case = CASES["half_dropped"]
    inputs = case.make_inputs(torch.float64)
    order = torch.randperm(case.features[0])
    with dlkernels.backend(backend):
        shuffled = dlkernels.drop_norm(*(t[..., order] for t in inputs))
        torch.testing.assert_close(shuffled, dlkernels.drop_norm(*inputs)[..., order])


@each_of_ours
def test_gradient_of_the_input_is_orthogonal_to_shift_and_scale(backend):
    """The output does not change when a row is shifted or scaled, so no gradient points there."""
    case = DropNormCase("orthogonal", (9,), (50,), 20, eps=0.0)
    inputs = case.make_inputs(torch.float64)
    with dlkernels.backend(backend):
        grad_input = results(dlkernels.drop_norm, case, inputs, random_grad(inputs))["grad_input"]
    torch.testing.assert_close(grad_input.sum(1), torch.zeros(9).double())
    torch.testing.assert_close((grad_input * inputs[0]).sum(1), torch.zeros(9).double())


@each_backend
@pytest.mark.parametrize("features", [(24,), (4, 6)], ids=str)
def test_a_mask_that_keeps_all_is_no_mask(features, backend):
    case = DropNormCase("all", (7,), features)
    input, _, weight, bias = case.make_inputs(torch.float64)
    everything = torch.ones(features, dtype=torch.bool)
    with dlkernels.backend(backend):
        ours = results(dlkernels.drop_norm, case, (input, everything, weight, bias))
        torch.testing.assert_close(ours, results(dlkernels.drop_norm, case, (input, None, weight, bias)))


@each_backend
@each_case(CASES.values())
def test_rescale_multiplies_by_all_over_kept(case, backend):
    inputs = case.make_inputs(torch.float64)
    M = math.prod(case.features)
    scale = M / max(M - (case.dropped or 0), 1)
    with dlkernels.backend(backend):
        scaled = dlkernels.drop_norm(*inputs, eps=case.eps)
        plain = dlkernels.drop_norm(*inputs, eps=case.eps, rescale=False)
    torch.testing.assert_close(scaled, plain * scale)


@each_backend
def test_no_kept_feature_gives_zeros(backend):
    """Also without eps, where a normalisation of nothing would be 0/0."""
    case = DropNormCase("none_kept", (3,), (4, 5), 20, eps=0.0)
    inputs = case.make_inputs(torch.float64)
    with dlkernels.backend(backend):
        made = results(dlkernels.drop_norm, case, inputs)
    assert len(made) == 4
    for value in made.values():
        assert torch.equal(value, torch.zeros_like(value))


# ---- derivatives ----------------------------------------------------------------------------------

GRADCHECK_CASES = (
    DropNormCase("plain", (3,), (7,), 3),
    DropNormCase("no_rescale", (3,), (7,), 3, rescale=False),
    DropNormCase("no_mask", (3,), (5,)),
    DropNormCase("no_weight", (3,), (7,), 3, weight=False),
    DropNormCase("no_bias", (3,), (7,), 3, bias=False),
    DropNormCase("mask_only", (3,), (7,), 3, weight=False, bias=False),
    DropNormCase("input_only", (3,), (5,), weight=False, bias=False),
    DropNormCase("many_dimensions", (2, 1, 2), (2, 3), 2),
    DropNormCase("one_row", (), (6,), 2),
    DropNormCase("one_kept", (3,), (4,), 3, eps=0.1),
    DropNormCase("none_kept", (3,), (4,), 4),
    DropNormCase("large_eps", (3,), (7,), 3, eps=0.7),
)


@each_of_ours
@each_case(GRADCHECK_CASES)
def test_first_and_second_derivatives_match_finite_differences(case, backend):
    input, keep, weight, bias = case.make_inputs(torch.float64)
    present = {"input": input, "weight": weight, "bias": bias}
    present = {name: t.requires_grad_() for name, t in present.items() if t is not None}

    def function(*tensors):
        with dlkernels.backend(backend):
            return dlkernels.drop_norm(keep=keep, **dict(zip(present, tensors, strict=True)), **case.arguments)

    assert torch.autograd.gradcheck(function, list(present.values()))
    assert torch.autograd.gradgradcheck(function, list(present.values()))


@each_case(GRADCHECK_CASES)
def test_reference_backward_is_differentiable(case):
    input, keep, weight, bias = case.make_inputs(torch.float64)
    tensors = [random_grad([input]), input, *([] if weight is None else [weight])]

    def backward(grad, input, weight=None):
        grads = reference.drop_norm_backward(grad, input, keep, weight, bias, **case.arguments)
        return tuple(g for g in grads if g is not None)

    assert torch.autograd.gradcheck(backward, [t.requires_grad_() for t in tensors])


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("masked", [False, True])
@each_backend
def test_every_subset_of_requires_grad(backend, masked, wanted, create_graph):
    """Gradients, and with create_graph the gradients of their norm, equal torch's for exactly the tensors that ask."""
    input, keep, weight, bias = CASES["half_dropped"].make_inputs(torch.float64)
    keep = keep if masked else None

    def derivatives(function):
        tensors = zip((input, weight, bias), wanted, strict=True)
        x, w, b = (t.detach().requires_grad_(asks) for t, asks in tensors)
        output = function(x, keep, w, b)
        assert output.requires_grad == any(wanted)
        asking = [t for t in (x, w, b) if t.requires_grad]
        if not asking:
            return [output]
        first = torch.autograd.grad(output.square().sum(), asking, create_graph=create_graph)
        assert all(g.requires_grad == create_graph for g in first)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), asking) if create_graph else ()
        return [*first, *second]

    with dlkernels.backend(backend):
        ours = derivatives(dlkernels.drop_norm)
    torch.testing.assert_close(ours, derivatives(gather_norm_scatter))


def test_gradients_accumulate_in_leaves():
    norm, x = dlkernels.DropNorm(8, p=0.0), torch.randn(5, 8)
    norm(x).square().sum().backward()
    once = norm.weight.grad.clone()
    norm(x).square().sum().backward()
    assert torch.equal(norm.weight.grad, once + once)


# ---- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["input", "keep", "weight", "bias", "grad", "all"])
@pytest.mark.parametrize("view", VIEWS)
@each_of_ours
@each_case(named("half_dropped", "two_feature_dimensions", "three_feature_dimensions", "width_17"))
def test_any_strides_give_the_same_values(case, backend, view, argument):
    inputs = case.make_inputs(torch.float64)
    names = ("input", "keep", "weight", "bias", "grad")
    tensors = dict(zip(names, (*inputs, random_grad(inputs)), strict=True))
    for name in tensors if argument == "all" else [argument]:
        tensors[name] = VIEWS[view](tensors[name])
    copies = [t.clone(memory_format=torch.contiguous_format) for t in tensors.values()]
    exact = results(gather_norm_scatter, case, copies[:-1], copies[-1])
    *inputs, grad = tensors.values()
    with dlkernels.backend(backend):
        ours = results(dlkernels.drop_norm, case, inputs, grad)
    torch.testing.assert_close(ours, exact)


def test_channels_last_images():
    """Features that are no neighbours in memory, in one order or another."""
    x = torch.randn(3, 5, 4, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
    keep = torch.rand(5, 4, 6) > 0.4
    torch.testing.assert_close(dlkernels.drop_norm(x, keep), gather_norm_scatter(x, keep))
    keep = torch.rand(6) > 0.4
    torch.testing.assert_close(dlkernels.drop_norm(x, keep), gather_norm_scatter(x, keep))
    x = x.permute(2, 0, 3, 1)
    keep = torch.rand(5) > 0.4
    torch.testing.assert_close(dlkernels.drop_norm(x, keep), gather_norm_scatter(x, keep))


@each_of_ours
@each_dtype
@each_case(named("half_dropped", "no_mask", "input_only", "none_dropped", "none_kept", "two_feature_dimensions"))
def test_inputs_are_not_modified_and_not_aliased(case, dtype, backend):
    inputs = [t for t in case.make_inputs(dtype) if t is not None]
    grad = random_grad(inputs)
    given = [*inputs, grad]
    before = [(t.clone(), t._version) for t in given]
    with dlkernels.backend(backend):
        made = results(dlkernels.drop_norm, case, case_arguments(case, inputs), grad).values()
    for tensor, (bits, version) in zip(given, before, strict=True):
        assert torch.equal(tensor, bits)
        assert tensor._version == version
    pointers = [t.untyped_storage().data_ptr() for t in (*given, *made)]
    assert len(set(pointers)) == len(pointers)


def case_arguments(case, present):
    """(input, keep, weight, bias) from those of them that the case has."""
    rest = iter(present[1:])
    has = (case.dropped is not None, case.weight, case.bias)
    return [present[0], *(next(rest) if there else None for there in has)]


@each_dtype
@each_case(CASES.values())
def test_fake_kernel_tells_shape_strides_and_dtype(case, dtype):
    inputs = case.make_inputs(dtype)
    fake = [None if t is None else t.to("meta") for t in inputs]
    real, told = results(dlkernels.drop_norm, case, inputs), results(dlkernels.drop_norm, case, fake)
    assert real.keys() == told.keys()
    for name in real:
        a, b = real[name], told[name]
        assert (a.shape, a.stride(), a.dtype, b.device.type) == (b.shape, b.stride(), b.dtype, "meta"), name


@each_backend
@pytest.mark.parametrize("training", [False, True])
def test_empty_batch(training, backend):
    """An empty result of the right shape, and a gradient of zeros for what there is."""
    norm, x = dlkernels.DropNorm((2, 4)).train(training), torch.randn(3, 0, 2, 4, requires_grad=True)
    with dlkernels.backend(backend):
        output = norm(x)
        output.sum().backward()
    assert output.shape == x.grad.shape == (3, 0, 2, 4)
    assert torch.equal(norm.weight.grad, torch.zeros(2, 4))
    assert torch.equal(norm.bias.grad, torch.zeros(2, 4))


# ---- errors ---------------------------------------------------------------------------------------

X, K, W, B = torch.ones(3, 2, 4), torch.ones(4, dtype=torch.bool), torch.ones(4), torch.ones(4)
BAD_CALLS = {
    "keep too short": ((X, K[:3]), "keep|normalized_shape"),
    "keep too long": ((X, torch.ones(8, dtype=torch.bool)), "keep|normalized_shape"),
    "keep with more dimensions than input": ((X[0, 0], K[None]), "keep|input"),
    "keep with other leading dimensions": ((X, torch.ones(3, 4, dtype=torch.bool)), "keep|input"),
    "keep is a number": ((X, K[0]), "keep|normalized_shape"),
    "keep is float": ((X, W), "keep"),
    "keep is uint8": ((X, K.byte()), "keep"),
    "keep on another device": ((X, K.to("meta")), "keep"),
    "weight too short": ((X, None, W[:3]), "weight|normalized_shape"),
    "weight unlike keep": ((X, K, torch.ones(2, 4)), "weight"),
    "weight with one row": ((X, K, W[None]), "weight"),
    "weight of another dtype": ((X, K, W.double()), "weight|parameter"),
    "weight in 16 bits beside float32 input": ((X, K, W.bfloat16()), "weight|parameter"),
    "weight in float32 beside float64 input": ((X.double(), K, W), "weight|input"),
    "weight on another device": ((X, K, W.to("meta")), "weight"),
    "bias too short": ((X, K, W, B[:3]), "bias"),
    "bias unlike weight": ((X, None, W, torch.ones(2, 4)), "bias"),
    "bias of another dtype": ((X, K, W, B.double()), "bias|parameter"),
    "bias on another device": ((X, K, W, B.to("meta")), "bias"),
    "integer input": ((X.long(),), "input"),
    "integer input and parameters": ((X.long(), K, W.long(), B.long()), "input"),
    "boolean input": ((X.bool(),), "input"),
    "complex input": ((X.to(torch.complex64),), "input"),
    "complex input and parameters": ((X.to(torch.complex64), K, W.to(torch.complex64)), "input"),
    "0-D input": ((X[0, 0, 0],), "input|normalized_shape"),
    "input narrower than keep": ((X[..., :3], K), "keep|input"),
}
NO_TENSORS = {
    "input is a list": (([[1.0]], K), "input"),
    "no input": ((None, K), "input"),
    "keep is a list": ((X, [True] * 4), "keep"),
    "weight is a number": ((X, K, 1.0), "weight"),
    "bias is a number": ((X, K, W, 1.0), "bias"),
}


@pytest.mark.parametrize("call", BAD_CALLS)
@each_of_ours
def test_bad_calls_name_the_argument(backend, call):
    arguments, names = BAD_CALLS[call]
    with (
        dlkernels.backend(backend),
        pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError), match=rf"\b({names})\b"),
    ):
        dlkernels.drop_norm(*arguments)


@pytest.mark.parametrize("call", BAD_CALLS)
def test_bad_calls_fail_in_the_reference_itself(call):
    arguments, names = BAD_CALLS[call]
    with pytest.raises(RuntimeError, match=rf"\b({names})\b"):
        reference.drop_norm(*arguments)
    with pytest.raises(RuntimeError):
        reference.drop_norm_backward(torch.ones_like(arguments[0]), *arguments)


@pytest.mark.parametrize("call", NO_TENSORS)
def test_what_is_no_tensor_names_the_argument(call):
    arguments, name = NO_TENSORS[call]
    with pytest.raises((TypeError, RuntimeError, AttributeError), match=rf"\b{name}\b"):
        dlkernels.drop_norm(*arguments)


@pytest.mark.parametrize("shape", [(3, 3, 2), (4, 2), (2,), ()], ids=str)
@each_backend
def test_module_refuses_input_of_another_shape(shape, backend):
    """As nn.LayerNorm does, also where there is nothing else that would not fit."""
    for options in {}, {"elementwise_affine": False}:
        norm = dlkernels.DropNorm((2, 4), **options)
        for training in False, True:
            with dlkernels.backend(backend), pytest.raises(RuntimeError, match=r"input|keep|normalized_shape"):
                norm.train(training)(torch.ones(shape))


@pytest.mark.parametrize("p", [1.0, 1.5, -0.1, 2, float("nan"), float("inf")])
def test_p_lies_in_0_to_1(p):
    with pytest.raises(ValueError, match=r"\bp\b"):
        dlkernels.DropNorm(8, p)
    with pytest.raises(ValueError, match=r"\bp\b"):
        dlkernels.drop_mask(8, p)


@pytest.mark.parametrize("dropped", [-1, 9])
def test_dropped_lies_in_0_to_the_number_of_features(dropped):
    keys = torch.arange(8, dtype=torch.int32)
    for function in torch.ops.dlkernels.drop_mask, reference.drop_mask:
        with pytest.raises(RuntimeError, match="dropped"):
            function(keys, dropped)


def test_options_are_keywords():
    with pytest.raises(TypeError):
        dlkernels.DropNorm(8, 0.5, 1e-5)


# ---- numbers that are not ordinary -----------------------------------------------------------------


@each_of_ours
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@each_dtype
@each_case(named("half_dropped", "no_mask", "width_17", "width_1000"))
def test_what_is_not_finite_stays_in_its_row(case, dtype, value, backend, device):
    """In the input it spoils its row, in the gradient its row and the parameters of its feature."""
    input, *others = case.make_inputs(dtype, device)
    input = input.flatten(0, -2)
    grad = random_grad([input])
    keep = others[0]
    feature = 0 if keep is None else keep.nonzero()[3].item()
    spoiled_input, spoiled_grad = input.clone(), grad.clone()
    spoiled_input[1, feature] = spoiled_grad[1, feature] = value
    with dlkernels.backend(backend):
        clean = results(dlkernels.drop_norm, case, (input, *others), grad)
        by_input = results(dlkernels.drop_norm, case, (spoiled_input, *others), grad)
        by_grad = results(dlkernels.drop_norm, case, (input, *others), spoiled_grad)
    kept = torch.ones(case.features, dtype=torch.bool, device=device) if keep is None else keep
    other_rows = torch.arange(len(grad)) != 1
    for name, spoiled in ("output", by_input), ("grad_input", by_input), ("grad_input", by_grad):
        assert not spoiled[name][1, kept].isfinite().any()
        assert (spoiled[name][1, ~kept] == 0).all()
        assert torch.equal(spoiled[name][other_rows], clean[name][other_rows])
    assert by_input["output"][1, kept].isnan().all()
    for name in "grad_weight", "grad_bias":
        assert not by_grad[name][feature].isfinite()
        assert by_grad[name].isfinite().sum() == grad.shape[1] - 1


@each_of_ours
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("argument", ["input", "weight", "bias", "grad", "all"])
@each_dtype
@each_case(named("half_dropped", "width_17", "width_1000", "none_kept", "two_feature_dimensions"))
def test_dropped_features_have_no_effect(case, dtype, argument, value, backend, device):
    """Whatever stands there, the bits are the same."""
    inputs = case.make_inputs(dtype, device)
    tensors = dict(zip(("input", "keep", "weight", "bias", "grad"), (*inputs, random_grad(inputs)), strict=True))
    with dlkernels.backend(backend):
        *given, grad = tensors.values()
        clean = results(dlkernels.drop_norm, case, given, grad)
        for name in ("input", "weight", "bias", "grad") if argument == "all" else [argument]:
            tensors[name][..., ~tensors["keep"]] = value
        *given, grad = tensors.values()
        assert same_bits(results(dlkernels.drop_norm, case, given, grad), clean)


@each_of_ours
@pytest.mark.parametrize("scale", [1e30, -1e30, 1e25, 1e-15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_case(named("half_dropped", "no_mask", "width_17", "width_1000"))
def test_rows_of_any_size_are_ordinary(case, dtype, scale, backend, device):
    """One row of numbers whose squares are beyond float32: it is right, and so are the others."""
    inputs = case.make_inputs(dtype, device)
    inputs = [inputs[0].flatten(0, -2), *inputs[1:]]
    inputs[0][1] *= scale
    grad = random_grad(inputs)
    exact = results(gather_norm_scatter, case, doubled(inputs), grad.double())
    with dlkernels.backend(backend):
        ours = results(dlkernels.drop_norm, case, inputs, grad)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    for name in exact:
        for row in [0, 1, 2] if name in ("output", "grad_input") else [slice(None)]:
            assert relative_error(ours[name][row], exact[name][row]) < bound, (name, row)


@each_of_ours
@each_case(named("half_dropped", "no_mask", "width_1000"))
def test_products_of_rows_and_gradients_may_overflow(case, backend, device):
    """1e18 times 1e25 is beyond float32; what comes of it, divided by the row's deviation, is not."""
    inputs = case.make_inputs(torch.float32, device)
    inputs = [inputs[0] * 1e18, *inputs[1:]]
    grad = random_grad(inputs) * 1e25
    exact = results(gather_norm_scatter, case, doubled(inputs), grad.double())
    with dlkernels.backend(backend):
        ours = results(dlkernels.drop_norm, case, inputs, grad)
    for name in exact:
        assert relative_error(ours[name], exact[name]) < 1e-5, name


@each_of_ours
@pytest.mark.parametrize("M", [3, 100, 1000])
def test_one_large_number_in_a_row(M, backend, device):
    case = DropNormCase("outlier", (4,), (M,), M // 3)
    inputs = case.make_inputs(torch.float32, device)
    inputs[0][2, inputs[1].nonzero()[-1]] = 1e30
    exact = gather_norm_scatter(*doubled(inputs))
    with dlkernels.backend(backend):
        ours = dlkernels.drop_norm(*inputs)
    for row in range(4):
        assert relative_error(ours[row], exact[row]) < 1e-5


@each_of_ours
@pytest.mark.parametrize("dropped", [None, 0, 5000, 60000])
@pytest.mark.parametrize("offset", [0.0, 1e3, -1e4])
def test_long_rows_that_begin_unlike_the_rest(offset, dropped, backend, device):
    """The first features are far from the mean, or dropped: what is summed about them loses nothing."""
    case = DropNormCase("long", (2,), (65539,), dropped)
    input, keep, *parameters = case.make_inputs(torch.float32, device)
    input[:, :4200] = 1e-3 * input[:, :4200] + 1e3
    if keep is not None:
        keep = torch.arange(len(keep), device=device) >= dropped
    assert_as_accurate_as_torchs(case, (input + offset, keep, *parameters), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dropped", [None, 0.5])
@pytest.mark.parametrize("M", [4096, 4099])
def test_results_too_large_for_the_caches(M, dropped, dtype, device):
    """They are written past them, where rows are whole vectors: the same bits as in small pieces."""
    N = (17 << 20) // (M * dtype.itemsize)
    case = DropNormCase("large", (N,), (M,), None if dropped is None else int(dropped * M))
    inputs = case.make_inputs(dtype, device)
    grad = random_grad(inputs)
    whole = results(dlkernels.drop_norm, case, inputs, grad)
    pieces = [
        results(dlkernels.drop_norm, case, (rows, *inputs[1:]), dy)
        for rows, dy in zip(inputs[0].split(256), grad.split(256), strict=True)
    ]
    for name in "output", "grad_input":
        assert torch.equal(whole[name], torch.cat([piece[name] for piece in pieces]))


@each_of_ours
@pytest.mark.parametrize(
    ("dtype", "value"),
    [(dtype, value) for dtype in DTYPES for value in (0.0, 1 / 3, 1e4 / 3, -6e4)]
    + [(dtype, value) for dtype in DTYPES if dtype != torch.float16 for value in (1e30 / 3, -1e30)],
    ids=str,
)
@pytest.mark.parametrize("dropped", [None, 0.5])
@pytest.mark.parametrize("M", [1, 2, 7, 100, 1000, 30000])
def test_constant_rows_give_the_bias(M, dropped, dtype, value, backend, device):
    """No deviation, no division by it: s * bias where kept, and finite gradients."""
    case = DropNormCase("constant", (3,), (M,), None if dropped is None else int(dropped * M))
    input, keep, weight, bias = case.make_inputs(dtype, device)
    input = torch.full_like(input, value)
    with dlkernels.backend(backend):
        ours = results(dlkernels.drop_norm, case, (input, keep, weight, bias), random_grad([input]))
    everywhere = torch.ones(M, dtype=torch.bool, device=device) if keep is None else keep
    expected = bias.double() * everywhere * (M / int(everywhere.sum()))
    torch.testing.assert_close(ours["output"], expected.to(dtype).expand(3, M))
    assert all(result.isfinite().all() for result in ours.values())
    torch.testing.assert_close(ours["grad_weight"], torch.zeros_like(weight))


@each_of_ours
@each_dtype
@each_case(named("one_kept", "width_1", "width_1_no_mask"))
def test_one_feature_is_its_bias(case, dtype, backend, device):
    """Only the bias has a gradient; the others' are 0, up to the rounding of the numbers that cancel."""
    input, keep, weight, bias = case.make_inputs(dtype, device)
    grad = random_grad([input])
    with dlkernels.backend(backend):
        ours = results(dlkernels.drop_norm, case, (input, keep, weight, bias), grad)
    kept = torch.ones_like(bias, dtype=torch.bool) if keep is None else keep
    scaled = kept * (len(kept) / int(kept.sum()))
    torch.testing.assert_close(ours["output"], (bias.double() * scaled).to(dtype).expand_as(input))
    error = (ours["grad_bias"].double() - (grad.double() * scaled).sum(0)).abs()
    assert (error <= torch.finfo(dtype).eps * (grad.double() * scaled).abs().sum(0)).all()
    largest = len(kept) * weight.abs().max().item() / math.sqrt(case.eps)
    rounding = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert ours["grad_input"].abs().max() <= 8 * rounding * largest
    assert (ours["grad_weight"] == 0).all()


@each_of_ours
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
@each_case(named("half_dropped", "no_mask", "width_1000"))
def test_denormals_give_finite_results(case, dtype, backend, device):
    """Read as they are or as 0: beside eps they are nothing."""
    input, keep, weight, _ = case.make_inputs(dtype, device)
    input = (input.double() * (1e-7 if dtype == torch.float16 else 1e-40)).to(dtype)
    with dlkernels.backend(backend):
        ours = results(dlkernels.drop_norm, case, (input, keep, weight, torch.zeros_like(weight)))
    assert ours["output"].abs().max() < (1e-3 if dtype == torch.float16 else 1e-30)
    assert all(value.isfinite().all() for value in ours.values())


def test_denormals_are_as_before_after_a_call():
    """The processor's way with denormals belongs to the caller."""
    dlkernels.drop_norm(torch.randn(1000, 500))
    assert (torch.full((100,), 1e-40) * 0.5 != 0).all()


@each_of_ours
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bit_statistics_are_wider_than_16_bits(dtype, backend, device):
    """A variance beyond float16, and an eps below it."""
    x = torch.tensor([[6e4, -6e4, 3e4, 0.0], [0.0, 0.0, 0.0, 0.0]], device=device).to(dtype)
    with dlkernels.backend(backend):
        output = dlkernels.drop_norm(x, eps=1e-12)
    torch.testing.assert_close(output, F.layer_norm(x.double(), (4,), eps=1e-12).to(dtype))


# ---- the mask ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("M", [1, 2, 3, 8, 31, 64, 100, 1000, 1024, 4097, 100003])
@pytest.mark.parametrize("p", [0, 0.0, 0.1, 0.29, 0.3, 0.5, 0.57, 0.9, 0.999])
def test_exactly_int_p_m_features_are_dropped(M, p, device):
    keep = dlkernels.drop_mask(M, p, device=device)
    assert keep.dtype == torch.bool
    assert keep.shape == (M,)
    assert keep.device.type == device
    assert int((~keep).sum()) == int(p * M)


@pytest.mark.parametrize("shape", [7, (7,), [3, 5], torch.Size([2, 3, 4])], ids=str)
def test_mask_has_the_shape_of_the_features(shape):
    keep = dlkernels.drop_mask(shape)
    assert keep.shape == torch.empty(shape).shape
    assert int((~keep).sum()) == keep.numel() // 2


@each_backend
def test_backends_draw_the_same_mask(backend):
    torch.manual_seed(5)
    expected = dlkernels.drop_mask(1000, 0.3)
    torch.manual_seed(5)
    with dlkernels.backend(backend):
        assert torch.equal(dlkernels.drop_mask(1000, 0.3), expected)


def drawn_subsets(M, dropped, draws, device):
    """(draws, M) masks that drop `dropped` features."""
    p = (dropped + 0.5) / M
    return torch.stack([dlkernels.drop_mask(M, p, device=device) for _ in range(draws)])


def assert_chi_square(statistic, freedom):
    """Within 5 standard deviations of its mean: the seed is fixed, so it is passed for good or not at all."""
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(("M", "dropped"), [(12, 1), (12, 11), (12, 2), (12, 10), (6, 3), (7, 4)])
def test_every_set_of_features_is_equally_likely(M, dropped, device):
    """Chi-square over all sets: of one feature, of the pairs dropped and of the pairs kept, and of larger sets."""
    draws, sets = 8000, math.comb(M, dropped)
    masks = drawn_subsets(M, dropped, draws, device).cpu()
    numbers = (masks.long() << torch.arange(M)).sum(1)
    counts = numbers.bincount(minlength=2**M)
    counts = counts[counts > 0].double()
    assert len(counts) == sets
    expected = draws / sets
    assert_chi_square(((counts - expected) ** 2 / expected).sum().item(), sets - 1)


@pytest.mark.parametrize(("M", "dropped"), [(64, 32), (100, 10), (30, 29)])
def test_every_feature_and_every_pair_is_equally_likely(M, dropped, device):
    """Counts of features and of pairs in larger masks. A fixed number is dropped, so counts are not independent."""
    draws = 4000
    drops = (~drawn_subsets(M, dropped, draws, device)).double().cpu()
    q = dropped / M
    spread = draws * q * (1 - q) * M / (M - 1)  # the covariance of the counts is this times (identity - 1/M)
    assert_chi_square(((drops.sum(0) - draws * q) ** 2 / spread).sum().item(), M - 1)
    together = (drops.T @ drops)[torch.triu_indices(M, M, 1).unbind()]
    both = q * (dropped - 1) / (M - 1)
    deviations = (together - draws * both) / math.sqrt(draws * both * (1 - both) or 1)
    assert deviations.abs().max() < 5.5
    assert deviations.square().mean() < 1.2


@pytest.mark.parametrize("M", [1, 2, 7, 64, 100, 1000, 4097, 30011])
@pytest.mark.parametrize("kind", ["random", "few_values", "equal", "ascending", "descending", "extreme"])
def test_selection_takes_the_smallest_and_of_equals_the_first(kind, M, device):
    limits = torch.iinfo(torch.int32)
    keys = {
        "random": torch.randint(limits.min, limits.max, (M,)),
        "few_values": torch.randint(-2, 2, (M,)),
        "equal": torch.full((M,), 7),
        "ascending": torch.arange(M),
        "descending": -torch.arange(M),
        "extreme": torch.tensor([limits.min, limits.max, 0, -1])[torch.randint(4, (M,))],
    }[kind].to(device, torch.int32)
    before = keys.clone()
    for dropped in {0, 1, M // 10, M // 2, M - 1, M}:
        keep = torch.ops.dlkernels.drop_mask(keys, dropped)
        assert int((~keep).sum()) == dropped
        assert torch.equal(keep, reference.drop_mask(keys, dropped)), dropped
        order = sorted(range(M), key=keys.tolist().__getitem__) if M <= 1000 else []  # Python's sort is stable
        assert not keep[order[:dropped]].any()
        assert keep[order[dropped:]].all()
    assert torch.equal(keys, before)


def test_selection_of_strided_and_empty_keys():
    keys = torch.randint(1000, (50, 3), dtype=torch.int32)[:, 1]
    assert torch.equal(torch.ops.dlkernels.drop_mask(keys, 20), reference.drop_mask(keys.clone(), 20))
    empty = torch.ops.dlkernels.drop_mask(torch.empty(0, dtype=torch.int32), 0)
    assert (empty.shape, empty.dtype) == ((0,), torch.bool)


def test_mask_is_reproducible(device):
    torch.manual_seed(3)
    first, second = (dlkernels.drop_mask(500, device=device) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(dlkernels.drop_mask(500, device=device), first)
    assert torch.equal(dlkernels.drop_mask(500, device=device), second)
    assert not torch.equal(first, second)


def test_generator_is_drawn_from_alone(device):
    def generator():
        return torch.Generator(device).manual_seed(11)

    state = torch.get_rng_state()
    first = dlkernels.drop_mask(500, generator=generator(), device=device)
    assert torch.equal(dlkernels.drop_mask(500, generator=generator(), device=device), first)
    assert torch.equal(torch.get_rng_state(), state)
    drawing = generator()
    assert torch.equal(dlkernels.drop_mask(500, generator=drawing, device=device), first)
    assert not torch.equal(dlkernels.drop_mask(500, generator=drawing, device=device), first)


# ---- module: training and evaluation -----------------------------------------------------------------


def dropped_of(output):
    """Which features are 0 in every row, asserting that it is the same in every row."""
    zero = (output == 0).flatten(0, -2)
    assert torch.equal(zero, zero[:1].expand_as(zero))
    return zero[0]


@each_backend
def test_training_drops_the_same_features_of_every_row(backend):
    norm, x = dlkernels.DropNorm(100, p=0.3), torch.randn(4, 5, 100)
    nn.init.ones_(norm.bias)
    with dlkernels.backend(backend):
        first, second = dropped_of(norm(x)), dropped_of(norm(x))
    assert int(first.sum()) == int(second.sum()) == 30
    assert not torch.equal(first, second)


@each_backend
@pytest.mark.parametrize("options", [{}, {"rescale": False}, {"elementwise_affine": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("shape", [(20,), (4, 5)], ids=str)
def test_training_is_the_function_with_a_drawn_mask(shape, options, backend):
    norm, x = dlkernels.DropNorm(shape, p=0.4, eps=1e-3, **options).double(), torch.randn(3, *shape).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    with dlkernels.backend(backend):
        torch.manual_seed(8)
        output = norm(x)
        torch.manual_seed(8)
        keep = dlkernels.drop_mask(shape, 0.4)
    expected = gather_norm_scatter(x, keep, norm.weight, norm.bias, 1e-3, options.get("rescale", True))
    torch.testing.assert_close(output, expected)


@each_backend
@pytest.mark.parametrize("options", [{}, {"elementwise_affine": False}, {"bias": False}, {"eps": 0.1}], ids=str)
@pytest.mark.parametrize("shape", [20, (20,), (4, 5)], ids=str)
def test_evaluation_and_p_0_are_layer_norm(shape, options, backend):
    theirs = nn.LayerNorm(shape, dtype=torch.float64, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 2, *theirs.normalized_shape, dtype=torch.float64)
    with dlkernels.backend(backend):
        for p, training in (0.5, False), (0.0, False), (0.0, True), (0, True):
            ours = dlkernels.DropNorm(shape, p, dtype=torch.float64, **options).train(training)
            ours.load_state_dict(theirs.state_dict())
            torch.testing.assert_close(ours(x), theirs(x))


def test_evaluation_draws_nothing():
    norm, state = dlkernels.DropNorm(8).eval(), torch.get_rng_state()
    norm(torch.randn(0, 8))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("rescale", "factor"), [(True, 1.0), (False, 0.6)])
def test_rescale_makes_training_expect_what_evaluation_gives(rescale, factor):
    """Up to the change of the statistics over the kept features, which is of the order of 1/M."""
    norm, x = dlkernels.DropNorm(512, p=0.4, rescale=rescale, dtype=torch.float64), torch.randn(512).double()
    nn.init.normal_(norm.bias)
    draws = 3000
    average = sum(norm(x).detach() for _ in range(draws)) / draws
    expected = factor * norm.eval()(x)
    noise = math.sqrt(0.4 / 0.6 / draws)
    assert relative_error(average, expected) < 1.2 * noise + 0.01


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}], ids=str)
@pytest.mark.parametrize("shape", [12, (3, 4)], ids=str)
def test_state_dict_is_nn_layer_norms(shape, options):
    ours, theirs = dlkernels.DropNorm(shape, **options), nn.LayerNorm(shape, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert dict(ours.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
        nn.init.normal_(b)
    ours.load_state_dict(theirs.state_dict())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    ours.reset_parameters()
    theirs.load_state_dict(ours.state_dict())
    assert ours.weight is None or torch.equal(theirs.weight, torch.ones(theirs.normalized_shape))
    assert (ours.bias is None) == (theirs.bias is None)


def test_attributes_are_nn_layer_norms():
    ours, theirs = dlkernels.DropNorm([3, 4], eps=1e-3), nn.LayerNorm([3, 4], eps=1e-3)
    assert (ours.p, ours.rescale, dlkernels.DropNorm(3).eps) == (0.5, True, 1e-5)
    for name in "normalized_shape", "eps", "elementwise_affine":
        assert getattr(ours, name) == getattr(theirs, name)


def test_extra_repr():
    text = repr(dlkernels.DropNorm((3, 4), 0.25, eps=1e-3, bias=False, rescale=False))
    assert text.startswith("DropNorm((3, 4), ")
    for part in "p=0.25", "eps=0.001", "elementwise_affine=True", "bias=False", "rescale=False":
        assert part in text


def copied_by_pickle(module):
    return pickle.loads(pickle.dumps(module))


def copied_by_save(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, copied_by_pickle, copied_by_save])
def test_module_copies(copied):
    norm, x = dlkernels.DropNorm(16, 0.25, rescale=False), torch.randn(3, 16)
    nn.init.normal_(norm.weight)
    other = copied(norm)
    assert type(other) is dlkernels.DropNorm
    assert repr(other) == repr(norm)
    outputs = []
    for module in norm, other:
        torch.manual_seed(2)
        outputs.append(module(x))
    assert torch.equal(*outputs)
    assert other.weight.data_ptr() != norm.weight.data_ptr()


def test_module_factory_arguments():
    assert dlkernels.DropNorm(8, device="meta").weight.device.type == "meta"
    assert dlkernels.DropNorm(8, dtype=torch.bfloat16).bias.dtype == torch.bfloat16
    materialised = dlkernels.DropNorm(8, device="meta").to_empty(device="cpu")
    materialised.reset_parameters()
    assert materialised(torch.randn(3, 8)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_module_moves_to_dtype(dtype):
    assert dlkernels.DropNorm(8).to(dtype)(torch.randn(3, 8, dtype=dtype)).dtype == dtype


def test_functional_call():
    norm, x = dlkernels.DropNorm(8).eval(), torch.randn(3, 8)
    other = {"weight": torch.randn(8), "bias": torch.randn(8)}
    expected = dlkernels.drop_norm(x, None, **other)
    assert torch.equal(torch.func.functional_call(norm, other, (x,)), expected)


def small_net(norm):
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(10, 32), norm(32), nn.ReLU(), nn.Linear(32, 24), norm(24), nn.Linear(24, 4))


def losses_of_training(model, inputs, labels, steps=20):
    torch.manual_seed(6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@each_backend
def test_training_without_dropping_follows_nn_step_by_step(backend):
    inputs, labels = torch.randn(32, 10), torch.randint(0, 4, (32,))
    theirs = losses_of_training(small_net(nn.LayerNorm), inputs, labels)
    with dlkernels.backend(backend):
        ours = losses_of_training(small_net(functools.partial(dlkernels.DropNorm, p=0.0)), inputs, labels)
    assert theirs[-1] < theirs[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_training_is_the_same_on_every_backend():
    inputs, labels = torch.randn(32, 10), torch.randint(0, 4, (32,))
    losses = []
    for backend in BACKENDS:
        with dlkernels.backend(backend):
            losses.append(losses_of_training(small_net(functools.partial(dlkernels.DropNorm, p=0.2)), inputs, labels))
    assert losses[0][-5:].mean() < losses[0][0]
    for other in losses[1:]:
        torch.testing.assert_close(losses[0], other, rtol=1e-3, atol=1e-4)


# ---- autocast, modes, checkpoint -------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("parameter_dtype", [torch.float32, "input's"], ids=["float32", "input's"])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_does_what_it_does_to_layer_norm(dtype, input_dtype, parameter_dtype, backend, device):
    """On the CPU nothing, on CUDA float32; and no other combinations of dtypes are taken."""
    case = CASES["no_mask"]
    parameter_dtype = input_dtype if parameter_dtype == "input's" else parameter_dtype
    inputs = case.make_inputs(input_dtype, device, parameter_dtype=parameter_dtype)
    masked = (inputs[0], dlkernels.drop_mask(64, 0.25, device=device), *inputs[2:])
    with torch.autocast(device, dtype), dlkernels.backend(backend):
        try:
            expected = results(gather_norm_scatter, case, inputs)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                dlkernels.drop_norm(*inputs)
            return
        ours = results(dlkernels.drop_norm, case, inputs)
        also = results(dlkernels.drop_norm, case, masked)
    for name in expected:
        assert ours[name].dtype == also[name].dtype == expected[name].dtype, name
    torch.testing.assert_close(ours["output"], expected["output"])


@each_of_ours
def test_direct_calls_of_the_operator_under_autocast(backend):
    x, w = torch.randn(3, 8), torch.ones(8)
    with torch.autocast("cpu", torch.bfloat16):
        output, *_ = torch.ops.dlkernels.drop_norm(x, None, w, None, [8], 1e-5, True)
    assert output.dtype == F.layer_norm(x, (8,), w).dtype


@each_backend
@pytest.mark.parametrize("training", [False, True])
def test_no_grad_and_inference_mode(training, backend):
    norm, x = dlkernels.DropNorm(12).train(training), torch.randn(3, 12)

    def seeded():
        torch.manual_seed(7)
        return norm(x)

    with dlkernels.backend(backend):
        expected = seeded()
        assert expected.requires_grad
        for mode in torch.no_grad, torch.inference_mode:
            with mode():
                output = seeded()
            assert not output.requires_grad
            assert output.is_inference() == (mode is torch.inference_mode)
            assert torch.equal(output, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@each_of_ours
def test_checkpoint_draws_the_same_mask_again(backend, reentrant):
    model = nn.Sequential(nn.Linear(8, 16), dlkernels.DropNorm(16), nn.Linear(16, 4))
    x = torch.randn(3, 8, requires_grad=True)
    with dlkernels.backend(backend):
        torch.manual_seed(9)
        expected = torch.autograd.grad(model(x).square().sum(), x)
        torch.manual_seed(9)
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, expected[0])


# ---- dispatcher, compile, export --------------------------------------------------------------------

OPERATORS = torch.ops.dlkernels


@pytest.mark.parametrize(("M", "dropped"), [(20, 7), (1, 0), (0, 0)])
def test_opcheck_mask(M, dropped):
    torch.library.opcheck(OPERATORS.drop_mask, (torch.randint(2**31 - 1, (M,), dtype=torch.int32), dropped))


def internal_arguments(case, dtype=torch.float32):
    input, keep, weight, bias = case.make_inputs(dtype)
    tensors = [None if t is None else t.requires_grad_() for t in (input, weight, bias)]
    return tensors[0], keep, *tensors[1:], list(case.features), case.eps, case.rescale


INTERNAL_CASES = named(
    "half_dropped", "no_mask", "mask_only", "bias_only", "input_only", "two_feature_dimensions", "empty_batch"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_case(INTERNAL_CASES)
def test_opcheck_forward(case, dtype):
    torch.library.opcheck(OPERATORS.drop_norm, internal_arguments(case, dtype))


@pytest.mark.parametrize("mask", [[True, True, True], [True, False, False], [False, True, True], [False, False, True]])
@each_case(named("half_dropped", "no_mask", "two_feature_dimensions"))
def test_opcheck_backward(case, mask):
    input, keep, weight, _bias, *settings = internal_arguments(case)
    grad = torch.randn_like(input).requires_grad_()
    arguments = (grad, input, keep, weight, *settings, mask)
    made = OPERATORS.drop_norm_backward(*arguments)
    assert [t is not None for t in made] == mask
    torch.library.opcheck(OPERATORS.drop_norm_backward, arguments)


class Network(nn.Module):
    """Two normalisations with masks from outside, so that every run can have the same."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.linear, self.first, self.second = nn.Linear(8, 12), dlkernels.DropNorm(12), dlkernels.DropNorm((3, 4))

    def forward(self, x, keep):
        y = dlkernels.drop_norm(self.linear(x), keep, self.first.weight, self.first.bias, self.first.eps)
        y = y.relu().unflatten(-1, (3, 4))
        return dlkernels.drop_norm(y, keep.view(3, 4), self.second.weight, self.second.bias, self.second.eps, False)


def loss_and_gradients(model, x, *others):
    x = x.detach().requires_grad_()
    loss = (model(x, *others) - 0.3).pow(3).sum()
    return [loss, *torch.autograd.grad(loss, [x, *(p for p in model.parameters())])]


@pytest.mark.compile
@each_of_ours
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic, backend):
    torch._dynamo.reset()
    model = Network()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    keep = dlkernels.drop_mask(12)
    with dlkernels.backend(backend):
        for shape in [(5, 8), (7, 8), (2, 3, 8)] if dynamic else [(5, 8)]:
            x = torch.randn(shape)
            torch.testing.assert_close(loss_and_gradients(compiled, x, keep), loss_and_gradients(model, x, keep))


@pytest.mark.compile
@each_of_ours
@pytest.mark.parametrize("training", [False, True])
def test_module_compiles_and_draws_as_eager(training, backend):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 40), dlkernels.DropNorm(40, 0.3)).train(training)
    compiled, x = torch.compile(model, fullgraph=True, backend="aot_eager"), torch.randn(5, 8)
    with dlkernels.backend(backend):
        made = []
        for module in compiled, model:
            torch.manual_seed(12)
            made.append([module(x), module(x)])
    torch.testing.assert_close(*made)
    if training:
        first, second = map(dropped_of, made[0])
        assert int(first.sum()) == int(second.sum()) == 12
        assert not torch.equal(first, second)


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

    model = nn.Sequential(nn.Linear(8, 12), dlkernels.DropNorm(12))
    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=recording))
    compiled(torch.randn(5, 8)).square().sum().backward()
    assert {f"dlkernels.{name}.default" for name in ("drop_mask", "drop_norm", "drop_norm_backward")} <= set(seen)


@pytest.mark.compile
@pytest.mark.slow
def test_compiles_with_inductor():
    torch._dynamo.reset()
    model, x, keep = Network(), torch.randn(5, 8), dlkernels.drop_mask(12)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(loss_and_gradients(compiled, x, keep), loss_and_gradients(model, x, keep))
    training = torch.compile(dlkernels.DropNorm(40, 0.3), fullgraph=True)
    assert int(dropped_of(training(torch.randn(5, 40))).sum()) == 12


@pytest.mark.compile
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_a_dynamic_batch(strict, training):
    model = nn.Sequential(nn.Linear(8, 12), dlkernels.DropNorm(12, 0.25)).train(training)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (torch.randn(4, 8),), dynamic_shapes=({0: batch},), strict=strict)
    x = torch.randn(7, 8)
    output = program.module()(x)
    if training:
        assert int(dropped_of(output).sum()) == 3
    else:
        torch.testing.assert_close(output, model(x))
    assert any("dlkernels.drop_norm" in str(node.target) for node in program.graph.nodes)


# ---- function transforms -----------------------------------------------------------------------------


@each_of_ours
@pytest.mark.parametrize(
    "in_dims",
    [
        (0, None, None, None),
        (None, 0, None, None),
        (0, 0, None, None),
        (0, None, 0, None),
        (None, None, None, 0),
        (0, 0, 0, 0),
        (1, 1, 1, 1),
        (None, None, 1, 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [(), (4,), (2, 3)], ids=str)
def test_vmap_is_a_loop(rows, in_dims, backend):
    shapes = ((*rows, 7), (7,), (7,), (7,))
    tensors = [
        torch.randn(shape if dim is None else (*shape[:dim], 3, *shape[dim:]), dtype=torch.float64)
        for shape, dim in zip(shapes, in_dims, strict=True)
    ]
    tensors[1] = tensors[1] > -0.3
    slices = [
        [t if dim is None else t.select(dim, i) for t, dim in zip(tensors, in_dims, strict=True)] for i in range(3)
    ]
    with dlkernels.backend(backend):
        mapped = torch.func.vmap(dlkernels.drop_norm, in_dims)(*tensors)
    torch.testing.assert_close(mapped, torch.stack([gather_norm_scatter(*part) for part in slices]))


def test_nested_vmap():
    x, keep = torch.randn(2, 3, 4, 7, dtype=torch.float64), torch.rand(3, 7) > 0.3
    mapped = torch.func.vmap(torch.func.vmap(dlkernels.drop_norm), in_dims=(0, None))(x, keep)
    expected = [[gather_norm_scatter(x[i, j], keep[j]) for j in range(3)] for i in range(2)]
    torch.testing.assert_close(mapped, torch.stack([torch.stack(row) for row in expected]))


@each_of_ours
def test_vmap_of_the_selection(backend):
    keys = torch.randint(100, (4, 30), dtype=torch.int32)
    select = torch.ops.dlkernels.drop_mask if backend == "native" else reference.drop_mask
    mapped = torch.func.vmap(lambda k: select(k, 11))(keys)
    assert torch.equal(mapped, torch.stack([reference.drop_mask(k, 11) for k in keys]))


@each_of_ours
@pytest.mark.parametrize("randomness", ["same", "different", "error"])
def test_vmap_randomness_decides_over_the_masks(randomness, backend):
    norm, x = dlkernels.DropNorm(60), torch.randn(4, 3, 60)
    mapped = torch.func.vmap(norm, randomness=randomness)
    with dlkernels.backend(backend):
        if randomness == "error":
            with pytest.raises(RuntimeError, match="random"):
                mapped(x)
            return
        masks = torch.stack([dropped_of(sample) for sample in mapped(x)])
    assert (masks.sum(1) == 30).all()
    assert len(masks.unique(dim=0)) == (1 if randomness == "same" else 4)


def loss_with(function, keep):
    return lambda w, b, x: function(x, keep, w, b).pow(3).sum()


TRANSFORMS = {
    "grad": lambda loss, w, b, x: torch.func.grad(loss, (0, 1, 2))(w, b, x),
    "per_sample_gradients": lambda loss, w, b, x: torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), (None, None, 0))(
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
@pytest.mark.parametrize("masked", [False, True])
@each_of_ours
def test_function_transforms_equal_torchs(masked, backend, transform):
    x, w, b = (torch.randn(shape, dtype=torch.float64) for shape in ((4, 7), (7,), (7,)))
    keep = torch.tensor([True, False, True, True, False, True, True]) if masked else None
    theirs = TRANSFORMS[transform](loss_with(gather_norm_scatter, keep), w, b, x)
    with dlkernels.backend(backend):
        ours = TRANSFORMS[transform](loss_with(dlkernels.drop_norm, keep), w, b, x)
    torch.testing.assert_close(ours, theirs)


@each_of_ours
def test_jacobian_of_the_output(backend):
    x, w, b = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 5), (5,), (5,)))
    keep = torch.tensor([True, True, False, True, True])

    def jacobian(function):
        return torch.func.jacrev(lambda x, w, b: function(x, keep, w, b), (0, 1, 2))(x, w, b)

    with dlkernels.backend(backend):
        ours = jacobian(dlkernels.drop_norm)
    torch.testing.assert_close(ours, jacobian(gather_norm_scatter))


@pytest.mark.parametrize("dual", [0, 1, 2])
def test_forward_mode_is_refused(dual):
    """With an error, never with a silent zero."""
    tensors = [torch.randn(3, 8), torch.randn(8), torch.randn(8)]
    with forward_ad.dual_level():
        tensors[dual] = forward_ad.make_dual(tensors[dual], torch.ones_like(tensors[dual]))
        with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)forward|jvp"):
            dlkernels.drop_norm(tensors[0], None, *tensors[1:])


def test_jvp_is_refused():
    x, keep = torch.randn(3, 8), dlkernels.drop_mask(8)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)forward|jvp"):
        torch.func.jvp(lambda v: dlkernels.drop_norm(v, keep), (x,), (x,))


# ---- the same bits -----------------------------------------------------------------------------------

SOME_CASES = named("half_dropped", "no_mask", "two_feature_dimensions", "width_17", "1027_rows", "width_4099")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_case([*LARGE_CASES, *SOME_CASES])
def test_threads_and_repetition_do_not_change_bits(case, dtype):
    inputs = case.make_inputs(dtype)
    grad = random_grad(inputs)
    runs = []
    for threads in (1, 1, 2, 4):
        torch.set_num_threads(threads)
        runs.append(results(dlkernels.drop_norm, case, inputs, grad))
    assert all(same_bits(run, runs[0]) for run in runs)


def test_threads_do_not_change_the_mask():
    masks = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        masks.append(dlkernels.drop_mask(300007, 0.3))
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


def test_bits_of_a_row_do_not_depend_on_the_other_rows():
    case = DropNormCase("rows", (100,), (129,), 60)
    input, *others = case.make_inputs(torch.float32)
    whole = dlkernels.drop_norm(input, *others)
    assert torch.equal(dlkernels.drop_norm(input[37:38], *others), whole[37:38])
    assert torch.equal(dlkernels.drop_norm(input[3:50], *others), whole[3:50])


@each_case(named("half_dropped", "width_17", "width_1000"))
def test_alignment_does_not_change_bits(case):
    inputs = case.make_inputs(torch.float32)
    grad = random_grad(inputs)
    shifted = [torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view_as(t).copy_(t) for t in (*inputs, grad)]
    ours = results(dlkernels.drop_norm, case, shifted[:-1], shifted[-1])
    assert same_bits(ours, results(dlkernels.drop_norm, case, inputs, grad))


def test_several_python_threads_at_once():
    """Forward and backward of different shapes in four threads, each with the bits it has alone."""
    work = [(case, case.make_inputs(torch.float32)) for case in (*LARGE_CASES, *SOME_CASES)]
    alone = [results(dlkernels.drop_norm, *item) for item in work]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda item: results(dlkernels.drop_norm, *item), work * 3))
    assert all(same_bits(a, b) for a, b in zip(together, alone * 3, strict=True))


# ---- backends ------------------------------------------------------------------------------------------


@each_case(CASES.values())
def test_backends_agree(case):
    inputs = case.make_inputs(torch.float64)
    grad = random_grad(inputs)
    made = {}
    for backend in BACKENDS:
        with dlkernels.backend(backend):
            made[backend] = results(dlkernels.drop_norm, case, inputs, grad)
    torch.testing.assert_close(made["native"], made["reference"])
    torch.testing.assert_close(made["native"], made["torch"])


def test_torch_fx_keeps_the_calls_in_its_graph():
    model = nn.Sequential(nn.Linear(8, 6), dlkernels.DropNorm(6, p=0.5))
    traced, x = torch.fx.symbolic_trace(model), torch.randn(5, 8)
    assert dlkernels.drop_mask in [node.target for node in traced.graph.nodes]
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    assert torch.equal(traced(x), expected)


def test_other_layouts_are_named():
    with pytest.raises(RuntimeError, match="sparse_coo"):
        dlkernels.drop_norm(torch.eye(4).to_sparse())
