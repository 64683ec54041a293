"""split_linear and SplitLinear: every test states one property, with torch's own layers as the yardstick."""

import copy
import io
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dlkernels
from dlkernels import reference
from dlkernels.testing import DTYPES, compare, relative_error

BACKENDS = ("native", "reference", "torch")
DIFFERENT = ("native", "reference")  # "native" and "torch" are the same composite
ACTIVATIONS = {"relu": F.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "gelu": F.gelu, "none": lambda y: y}
NAMES = ("output", "grad_input", "grad_weight", "grad_bias")

# leading dimensions, features in, features out, splits
SHAPES = {
    "plain": ((6,), 12, 8, 2),
    "one_group": ((6,), 12, 8, 1),
    "groups_of_one": ((33,), 4, 96, 4),
    "wider_out": ((3, 5), 6, 15, 3),
    "unbatched": ((), 10, 6, 2),
    "four_leading": ((2, 1, 3, 2), 8, 64, 4),
    "larger": ((40,), 256, 384, 8),
    "empty_batch": ((0, 3), 8, 4, 2),
}

each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def made_inputs(shape, dtype=torch.float64, device="cpu", bias=True):
    """Random input, weight, bias or None; and splits."""
    leading, inside, outside, splits = shape
    draw = [(*leading, inside), (outside // splits, inside // splits), (outside // splits,)]
    tensors = [torch.randn(size, dtype=torch.float64).to(device, dtype) for size in draw]
    return (*tensors[: 3 if bias else 2], *(() if bias else (None,)), splits)


def by_linear(input, weight, bias, splits, activation):
    """Group by group with torch's own functions."""
    groups = input.chunk(splits, -1)
    return torch.cat([ACTIVATIONS[activation](F.linear(x, weight, bias)) for x in groups], -1)


def by_block_diagonal(input, weight, bias, splits, activation):
    """One Linear, whose weight has the same block `splits` times on its diagonal."""
    repeated = None if bias is None else bias.repeat(splits)
    return ACTIVATIONS[activation](F.linear(input, torch.block_diag(*[weight] * splits), repeated))


def results(function, inputs, activation, grad=None):
    """output, grad_input, grad_weight, grad_bias of one call."""
    *tensors, splits = inputs
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    output = function(*leaves, splits, activation)
    grad = torch.ones_like(output) if grad is None else grad
    gradients = torch.autograd.grad(output, [t for t in leaves if t is not None], grad)
    return dict(zip(NAMES, (output.detach(), *gradients), strict=False))


def doubled(inputs):
    return [x.double() if isinstance(x, torch.Tensor) else x for x in inputs]


# ---- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", DIFFERENT)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@each_activation
@each_shape
def test_output_and_gradients_are_as_accurate_as_torchs(shape, activation, dtype, backend, device):
    inputs = made_inputs(shape, dtype, device)
    grad = torch.randn((*shape[0], shape[2]), dtype=torch.float64).to(device, dtype)
    exact = results(by_linear, doubled(inputs), activation, grad.double())
    theirs = results(by_linear, inputs, activation, grad)
    with dlkernels.backend(backend):
        ours = results(dlkernels.split_linear, inputs, activation, grad)
    for name in exact:
        compare(ours[name], theirs[name], exact[name], dtype, gradient=name != "output", name=name)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@each_activation
@each_shape
def test_is_a_linear_with_equal_blocks_on_its_diagonal(shape, activation, backend, bias):
    inputs = made_inputs(shape, bias=bias)
    with dlkernels.backend(backend):
        ours = results(dlkernels.split_linear, inputs, activation)
    torch.testing.assert_close(ours, results(by_block_diagonal, inputs, activation))


@pytest.mark.parametrize("bias", [False, True])
@each_activation
@each_shape
def test_reference_backward_is_the_gradient(shape, activation, bias):
    """The written-out backward equals what autograd derives."""
    inputs = made_inputs(shape, bias=bias)
    grad = torch.randn((*shape[0], shape[2]), dtype=torch.float64)
    exact = results(by_linear, inputs, activation, grad)
    written_out = reference.split_linear_backward(grad, *inputs, activation)
    for name, ours in zip(NAMES[1:], written_out, strict=True):
        if name in exact:
            assert relative_error(ours, exact[name]) < 1e-14, name
            assert ours.shape == exact[name].shape
        else:
            assert ours is None


@pytest.mark.parametrize("backend", DIFFERENT)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_group(value, backend):
    input, weight, bias, splits = made_inputs(SHAPES["wider_out"])
    input[1, 2, 3] = value
    with dlkernels.backend(backend):
        output = dlkernels.split_linear(input, weight, bias, splits, "none").unflatten(-1, (splits, -1))
    finite = torch.ones_like(output, dtype=torch.bool)
    finite[1, 2, 1] = False
    assert torch.equal(output.isfinite(), finite)


# ---- derivatives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", DIFFERENT)
@each_activation
def test_first_and_second_derivatives_match_finite_differences(activation, backend, bias):
    *tensors, splits = made_inputs(((2,), 4, 6, 2), bias=bias)
    leaves = [t.requires_grad_() for t in tensors if t is not None]

    def function(*tensors):
        with dlkernels.backend(backend):
            return dlkernels.split_linear(*tensors, splits=splits, activation=activation)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_subset_of_requires_grad(backend, wanted, create_graph):
    *tensors, splits = made_inputs(SHAPES["wider_out"])

    def derivatives(function):
        leaves = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        output = function(*leaves, splits, "tanh")
        assert output.requires_grad == any(wanted)
        asking = [t for t in leaves if t.requires_grad]
        if not asking:
            return [output]
        first = torch.autograd.grad(output.square().sum(), asking, create_graph=create_graph)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), asking) if create_graph else ()
        return [*first, *second]

    with dlkernels.backend(backend):
        ours = derivatives(dlkernels.split_linear)
    torch.testing.assert_close(ours, derivatives(by_linear))


# ---- memory ---------------------------------------------------------------------------------------

VIEWS = {
    "sliced": lambda t: torch.cat([t, t], -1)[..., 1 : 1 + t.shape[-1]],
    "stepped": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded_first": lambda t: t[:1].expand_as(t),
    "expanded_last": lambda t: t[..., :1].expand_as(t),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("backend", DIFFERENT)
def test_any_strides_give_the_same_values(backend, view):
    *tensors, splits = made_inputs(SHAPES["wider_out"])
    viewed = [VIEWS[view](t) for t in tensors]
    with dlkernels.backend(backend):
        ours = results(dlkernels.split_linear, (*viewed, splits), "gelu")
    torch.testing.assert_close(ours, results(by_linear, (*[t.clone() for t in viewed], splits), "gelu"))


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("backend", DIFFERENT)
@each_activation
@each_shape
def test_inputs_are_not_modified_and_not_aliased(shape, activation, backend, needs_grad):
    *tensors, splits = made_inputs(shape)
    before = [(t.clone(), t._version) for t in tensors]
    with dlkernels.backend(backend):
        output = dlkernels.split_linear(*[t.requires_grad_(needs_grad) for t in tensors], splits, activation)
    for tensor, (bits, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, bits)
        assert tensor._version == version
    given = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
    assert output.untyped_storage().data_ptr() not in given or not output.numel()


class Recorder(TorchDispatchMode):
    """The operators that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket._qualified_op_name.removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid"])
def test_is_one_matrix_product_without_copies(activation):
    """The rows of all groups go through one addmm; the activation works in place."""
    layer, x = dlkernels.SplitLinear(12, 8, 4, activation=activation), torch.randn(3, 5, 12)
    with Recorder() as recorder:
        layer(x)
    views = {"view", "_unsafe_view", "reshape", "_reshape_alias", "t", "transpose", "detach", "alias"}
    assert [name for name in recorder.names if name not in views] == ["addmm", f"{activation}_"]


# ---- module ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("inside", "outside", "splits"), [(64, 32, 1), (64, 32, 2), (64, 32, 8), (12, 30, 6)])
def test_parameter_counts(inside, outside, splits):
    """1/splits^2 of nn.Linear's weights, 1/splits of its biases."""
    layer, linear = dlkernels.SplitLinear(inside, outside, splits), nn.Linear(inside, outside)
    assert layer.weight.shape == (outside // splits, inside // splits)
    assert layer.weight.numel() * splits**2 == linear.weight.numel()
    assert layer.bias.numel() * splits == linear.bias.numel()
    assert dlkernels.SplitLinear(inside, outside, splits, bias=False).bias is None


@pytest.mark.parametrize("bias", [False, True])
def test_starts_as_the_small_linear_does(bias):
    torch.manual_seed(1)
    ours = dlkernels.SplitLinear(48, 24, 4, bias)
    torch.manual_seed(1)
    theirs = nn.Linear(12, 6, bias)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    ours.reset_parameters()
    assert not torch.equal(ours.weight, theirs.weight)
    assert ours.weight.abs().max() <= 12**-0.5


def test_module_is_the_function():
    layer, x = dlkernels.SplitLinear(12, 8, 4, activation="gelu", dtype=torch.float64), torch.randn(2, 12).double()
    expected = dlkernels.split_linear(x, layer.weight, layer.bias, 4, "gelu")
    assert torch.equal(layer(x), expected)
    assert dlkernels.SplitLinear(12, 8).splits == 2
    assert dlkernels.SplitLinear(12, 8).activation == "relu"


def test_extra_repr():
    expected = "SplitLinear(in_features=12, out_features=8, splits=4, bias=False, activation='tanh')"
    assert repr(dlkernels.SplitLinear(12, 8, 4, bias=False, activation="tanh")) == expected


def saved_and_loaded(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), saved_and_loaded])
def test_module_copies(copied):
    layer, x = dlkernels.SplitLinear(12, 8, 4, activation="sigmoid"), torch.randn(3, 12)
    other = copied(layer)
    assert type(other) is dlkernels.SplitLinear
    assert torch.equal(other(x), layer(x))
    assert other.weight.data_ptr() != layer.weight.data_ptr()


def test_module_factory_arguments():
    assert dlkernels.SplitLinear(12, 8, device="meta").weight.device.type == "meta"
    assert dlkernels.SplitLinear(12, 8, dtype=torch.bfloat16).bias.dtype == torch.bfloat16
    assert dlkernels.SplitLinear(12, 8, device="meta")(torch.empty(5, 12, device="meta")).shape == (5, 8)


# ---- errors ---------------------------------------------------------------------------------------

X, W, B = torch.ones(3, 12), torch.ones(4, 6), torch.ones(4)
BAD_CALLS = {
    "features that splits does not divide": ((X[:, :11], W), {}, ValueError, r"input.*multiple.*2.*got 11"),
    "no splits": ((X, W), {"splits": 0}, ValueError, r"splits.*at least 1.*got 0"),
    "negative splits": ((X, W), {"splits": -2}, ValueError, r"splits.*at least 1.*got -2"),
    "unknown activation": ((X, W), {"activation": "silu"}, ValueError, r"activation.*'relu'.*got 'silu'"),
    "activation is None": ((X, W), {"activation": None}, ValueError, r"activation.*'relu'.*got None"),
    "weight of the whole Linear": ((X, torch.ones(8, 12)), {}, RuntimeError, r"weight.*6.*got \[8, 12\]"),
    "1-D weight": ((X, W[0]), {}, RuntimeError, r"weight.*got \[6\]"),
    "bias of the whole Linear": ((X, W, torch.ones(8)), {}, RuntimeError, "."),
    "weight of another dtype": ((X, W.double()), {}, RuntimeError, "."),
    "bias of another dtype": ((X, W, B.double()), {}, RuntimeError, "."),
}


@pytest.mark.parametrize("call", BAD_CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_calls(backend, call):
    arguments, options, error, text = BAD_CALLS[call]
    with dlkernels.backend(backend), pytest.raises(error, match=text):
        dlkernels.split_linear(*arguments, **options)


@pytest.mark.parametrize("splits", [2.0, "2", None, True])
def test_splits_must_be_an_int(splits):
    with pytest.raises(TypeError, match="splits"):
        dlkernels.split_linear(X, W, splits=splits)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((11, 8, 2), "in_features.*multiple.*got 11"),
        ((12, 7, 2), "out_features.*multiple.*got 7"),
        ((12, 8, 0), "splits.*got 0"),
        ((12, 8, 2, True, "swish"), "activation.*got 'swish'"),
    ],
)
def test_module_refuses(arguments, text):
    with pytest.raises(ValueError, match=text):
        dlkernels.SplitLinear(*arguments)


# ---- autocast, modes, compile, transforms ------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_computes_in_its_dtype(dtype, backend):
    layer, x = dlkernels.SplitLinear(32, 16, 4), torch.randn(6, 32, requires_grad=True)
    with dlkernels.backend(backend):
        with torch.autocast("cpu", dtype):
            output = layer(x)
            doubles = dlkernels.split_linear(X.double(), W.double())
        expected = dlkernels.split_linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype), 4)
        output.float().sum().backward()
    assert output.dtype == dtype
    assert doubles.dtype == torch.float64
    assert torch.equal(output, expected)
    assert x.grad.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@each_activation
def test_no_grad_and_inference_mode(activation, backend):
    layer, x = dlkernels.SplitLinear(12, 8, activation=activation), torch.randn(3, 12)
    with dlkernels.backend(backend):
        expected = layer(x)
        assert expected.requires_grad
        for mode in torch.no_grad, torch.inference_mode:
            with mode():
                assert torch.equal(layer(x), expected)


def network():
    torch.manual_seed(3)
    return nn.Sequential(dlkernels.SplitLinear(12, 8, 4), dlkernels.SplitLinear(8, 6, 2, activation="gelu"))


def loss_and_gradients(model, x):
    x = x.detach().requires_grad_()
    loss = model(x).square().sum()
    return [loss, *torch.autograd.grad(loss, [x, *model.parameters()])]


def test_symbolic_tracing_keeps_the_call():
    model = nn.Sequential(dlkernels.SplitLinear(8, 4, splits=2), nn.Linear(4, 3))
    traced = torch.fx.symbolic_trace(model)
    assert dlkernels.split_linear in [node.target for node in traced.graph.nodes]
    x = torch.randn(5, 8)
    assert torch.equal(traced(x), model(x))


@pytest.mark.compile
@pytest.mark.parametrize("backend", DIFFERENT)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic, backend):
    torch._dynamo.reset()
    model = network()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with dlkernels.backend(backend):
        for shape in [(5, 12), (3, 12), (2, 7, 12)] if dynamic else [(5, 12)]:
            x = torch.randn(shape)
            torch.testing.assert_close(loss_and_gradients(compiled, x), loss_and_gradients(model, x))


@pytest.mark.compile
@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_a_dynamic_batch(strict):
    model = network().eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (torch.randn(4, 12),), dynamic_shapes=({0: batch},), strict=strict)
    x = torch.randn(7, 12)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 0, None), (1, 0, 1), (None, None, 0)], ids=str)
@pytest.mark.parametrize("backend", DIFFERENT)
@each_activation
def test_vmap_is_a_loop(activation, backend, in_dims):
    *tensors, splits = made_inputs(SHAPES["wider_out"])
    batched = [t if dim is None else torch.stack([t, t + 1, -t], dim) for t, dim in zip(tensors, in_dims, strict=True)]

    def function(*tensors):
        return dlkernels.split_linear(*tensors, splits, activation)

    with dlkernels.backend(backend):
        mapped = torch.func.vmap(function, in_dims)(*batched)
        parts = [
            [t if dim is None else t.select(dim, i) for t, dim in zip(batched, in_dims, strict=True)] for i in range(3)
        ]
        torch.testing.assert_close(mapped, torch.stack([function(*part) for part in parts]))


@pytest.mark.parametrize("backend", DIFFERENT)
def test_per_sample_gradients(backend):
    *tensors, splits = made_inputs(SHAPES["plain"])

    def of(function):
        def loss(x, w, b):
            return function(x, w, b, splits, "tanh").square().sum()

        return torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), (0, None, None))(*tensors)

    with dlkernels.backend(backend):
        ours = of(dlkernels.split_linear)
    torch.testing.assert_close(ours, of(by_linear))


def test_forward_mode_is_torchs():
    *tensors, splits = made_inputs(SHAPES["plain"])
    tangents = tuple(torch.randn_like(t) for t in tensors)

    def of(function):
        return torch.func.jvp(lambda *t: function(*t, splits, "tanh"), tuple(tensors), tangents)

    torch.testing.assert_close(of(dlkernels.split_linear), of(by_linear))
