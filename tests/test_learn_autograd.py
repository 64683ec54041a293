"""The engine against torch.autograd and finite differences; sampling against exact probabilities and torch."""

import itertools
import math
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlkernels.learn.autograd import (
    ELEMENTWISE,
    MLP,
    AliasTable,
    InverseCDF,
    Scalar,
    Tensor,
    chi_square,
    cross_entropy,
    draw_graph,
    grad,
    multinomial,
    no_grad,
    to_dot,
    topological_order,
)

# ------------------------------------------------------------------------------------------------------- operations

ROWS, COLUMNS = np.array([0, 2, 2, 0]), np.array([1, 0, 0, 3])
MASK = np.array([True, False, True])
LABELS = np.array([2, 0, 3])


def positive(x):
    return abs(x) + 0.5


# Name: ours, torch's, and the shapes of the operands; a shape in a set is that of a positive operand.
OPERATIONS = {
    "add": (lambda a, b: a + b, None, [(2, 3), (2, 3)]),
    "subtract": (lambda a, b: a - b, None, [(2, 3), (2, 3)]),
    "multiply": (lambda a, b: a * b, None, [(2, 3), (2, 3)]),
    "divide": (lambda a, b: a / b, None, [(2, 3), {(2, 3)}]),
    "power": (lambda a, b: a**b, None, [{(2, 3)}, (2, 3)]),
    "square": (lambda a: a**2, None, [(2, 3)]),
    "cube": (lambda a: a**3.0, None, [(2, 3)]),
    "root": (lambda a: a**0.5, None, [{(2, 3)}]),
    "inverse": (lambda a: a**-1, None, [{(2, 3)}]),
    "exponential": (lambda a: 2.5**a, None, [(2, 3)]),
    "numbers_left": (lambda a: 2 + (3 - (4 * (5 / a))), None, [{(2, 3)}]),
    "numbers_right": (lambda a: ((a + 2) * 3 - 4) / 5, None, [(2, 3)]),
    "negative": (lambda a: -a, None, [(2, 3)]),
    "exp": (lambda a: a.exp(), None, [(2, 3)]),
    "log": (lambda a: a.log(), None, [{(2, 3)}]),
    "sin": (lambda a: a.sin(), None, [(2, 3)]),
    "cos": (lambda a: a.cos(), None, [(2, 3)]),
    "tanh": (lambda a: a.tanh(), None, [(2, 3)]),
    "relu": (lambda a: a.relu(), None, [(2, 3)]),
    "used_twice": (lambda a: a * a + a.sin() * a, None, [(2, 3)]),
    "broadcast_row": (lambda a, b: a * b, None, [(2, 3), (3,)]),
    "broadcast_column": (lambda a, b: a / b, None, [(2, 3), {(2, 1)}]),
    "broadcast_both": (lambda a, b: a**b, None, [{(2, 1)}, (1, 3)]),
    "broadcast_number": (lambda a, b: a - b, None, [(), (2, 3)]),
    "broadcast_many": (lambda a, b: a * b, None, [(4, 1, 3), (2, 1)]),
    "broadcast_empty": (lambda a, b: a * b, None, [(3, 1), (3, 0)]),
    "broadcast_to": (lambda a: a.broadcast_to(4, 2, 3), lambda a: a.expand(4, 2, 3), [(2, 1)]),
    "matmul": (lambda a, b: a @ b, None, [(2, 3), (3, 4)]),
    "matmul_vector": (lambda a, b: a @ b, None, [(2, 3), (3,)]),
    "vector_matmul": (lambda a, b: a @ b, None, [(3,), (3, 4)]),
    "vector_vector": (lambda a, b: a @ b, None, [(3,), (3,)]),
    "matmul_batch": (lambda a, b: a @ b, None, [(5, 2, 3), (5, 3, 4)]),
    "broadcast_to_tuple": (lambda a: a.broadcast_to((4, 2, 3)), lambda a: a.expand(4, 2, 3), [(2, 1)]),
    "matmul_broadcast": (lambda a, b: a @ b, None, [(5, 1, 2, 3), (6, 3, 4)]),
    "matmul_batch_vector": (lambda a, b: a @ b, None, [(5, 2, 3), (3,)]),
    "vector_matmul_batch": (lambda a, b: a @ b, None, [(3,), (5, 3, 2)]),
    "matmul_empty": (lambda a, b: a @ b, None, [(2, 0), (0, 4)]),
    "sum": (lambda a: a.sum(), None, [(2, 3, 4)]),
    "sum_axis": (lambda a: a.sum(1), None, [(2, 3, 4)]),
    "sum_axes": (lambda a: a.sum((0, -1)), None, [(2, 3, 4)]),
    "sum_keepdims": (lambda a: a.sum(-2, keepdims=True) * a, lambda a: a.sum(-2, keepdim=True) * a, [(2, 3, 4)]),
    "sum_of_a_number": (lambda a: a.sum() * a, None, [()]),
    "mean": (lambda a: a.mean(), None, [(2, 3, 4)]),
    "mean_axis": (lambda a: a.mean(0), None, [(2, 3, 4)]),
    "mean_axes": (lambda a: a.mean((1, 2), keepdims=True), lambda a: a.mean((1, 2), keepdim=True), [(2, 3, 4)]),
    "max": (lambda a: a.max(), None, [(2, 3, 4)]),
    "max_axis": (lambda a: a.max(1), lambda a: a.amax(1), [(2, 3, 4)]),
    "max_axes": (lambda a: a.max((0, 2), keepdims=True) * a, lambda a: a.amax((0, 2), True) * a, [(2, 3, 4)]),
    "reshape": (lambda a: a.reshape(4, -1) * 2, None, [(2, 3, 4)]),
    "reshape_to_number": (lambda a: a.reshape(), lambda a: a.reshape(()), [(1, 1)]),
    "reshape_to_tuple": (lambda a: a.reshape((4, -1)) * 2, None, [(2, 3, 4)]),
    "transposed": (lambda a: a.T.sin(), lambda a: a.mT.sin(), [(2, 3)]),
    "transpose_to_tuple": (lambda a: a.transpose((2, 0, 1)).exp(), lambda a: a.permute(2, 0, 1).exp(), [(2, 3, 4)]),
    "transpose": (lambda a: a.transpose(2, 0, -2).exp(), lambda a: a.permute(2, 0, -2).exp(), [(2, 3, 4)]),
    "index_number": (lambda a: a[1], None, [(2, 3)]),
    "index_slice": (lambda a: a[::2, 1:], None, [(3, 4)]),
    "index_new_dimension": (lambda a: a[:, None] * a, None, [(3, 3)]),
    "index_ellipsis": (lambda a: a[..., -1], None, [(2, 3, 4)]),
    "index_arrays_twice_the_same": (lambda a: a[ROWS, COLUMNS], None, [(3, 4)]),
    "index_rows": (lambda a: a[ROWS], None, [(3, 4)]),
    "index_mask": (lambda a: a[MASK], None, [(3, 4)]),
    "index_negative_step": (lambda a: a[::-1] * a, lambda a: a.flip(0) * a, [(3, 4)]),
    "softmax": (lambda a: a.softmax(1), None, [(3, 4)]),
    "log_softmax": (lambda a: a.log_softmax(0), None, [(3, 4)]),
    "cross_entropy": (
        lambda a: cross_entropy(a, LABELS),
        lambda a: torch.nn.functional.cross_entropy(a, torch.tensor(LABELS)),
        [(3, 4)],
    ),
}
ON_SCALARS = [
    "add", "subtract", "multiply", "divide", "power", "square", "cube", "root", "inverse", "exponential",
    "numbers_left", "numbers_right", "negative", "exp", "log", "sin", "cos", "tanh", "relu", "used_twice",
]  # fmt: skip


def operands(shapes, seed=0):
    """Arrays of float64, away from 0, where relu has its kink."""
    random = np.random.default_rng(seed)
    arrays = []
    for shape in shapes:
        must_be_positive, (shape,) = isinstance(shape, set), shape if isinstance(shape, set) else (shape,)
        array = np.asarray(random.normal(size=shape))
        array = array + 0.1 * np.sign(array)
        arrays.append(np.asarray(positive(array) if must_be_positive else array))
    return arrays


def weights_like(arrays, seed=1):
    random = np.random.default_rng(seed)
    return [np.asarray(random.normal(size=np.shape(array))) for array in arrays]


def close(ours, theirs, tolerance=1e-12):
    np.testing.assert_allclose(np.asarray(ours, dtype=float), np.asarray(theirs), rtol=tolerance, atol=tolerance)


class TestOperations:
    @pytest.mark.parametrize("name", OPERATIONS)
    def test_value_first_and_second_derivative_are_torchs(self, name):
        function, reference, shapes = OPERATIONS[name]
        arrays = operands(shapes)
        ours = [Tensor(array) for array in arrays]
        theirs = [torch.tensor(array, requires_grad=True) for array in arrays]
        y, expected = function(*ours), (reference or function)(*theirs)
        assert y.shape == tuple(expected.shape)
        close(y, expected.detach())

        (cotangent,) = weights_like([y.value])
        first = grad(y, ours, [cotangent], create_graph=True)
        expected_first = torch.autograd.grad(expected, theirs, torch.tensor(cotangent), create_graph=True)
        for a, b, array in zip(first, expected_first, arrays, strict=True):
            assert a.shape == array.shape
            close(a, b.detach())

        directions = weights_like(arrays, seed=2)  # a Hessian times a vector
        along = sum((g * v).sum() for g, v in zip(first, directions, strict=True))
        expected_along = sum((g * torch.tensor(v)).sum() for g, v in zip(expected_first, directions, strict=True))
        second = grad(along, ours)
        if expected_along.requires_grad:
            expected_second = torch.autograd.grad(expected_along, theirs, allow_unused=True)
        else:
            expected_second = [None] * len(theirs)
        for a, b, array in zip(second, expected_second, arrays, strict=True):
            close(a, np.zeros_like(array) if b is None else b, 1e-11)

    @pytest.mark.parametrize("name", OPERATIONS)
    def test_derivatives_are_those_of_finite_differences(self, name):
        function, _, shapes = OPERATIONS[name]
        arrays = operands(shapes, seed=3)
        y = function(*[Tensor(array) for array in arrays])
        (cotangent,) = weights_like([y.value])
        inputs = [Tensor(array) for array in arrays]
        gradients = grad(function(*inputs), inputs, [cotangent])
        for position, gradient in enumerate(gradients):
            for place in np.ndindex(np.shape(arrays[position])):
                values = []
                for step in (1e-6, -1e-6):
                    moved = [array.copy() for array in arrays]
                    moved[position][place] += step
                    values.append((function(*map(Tensor, moved)).value * cotangent).sum())
                assert gradient.value[place] == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6, abs=1e-7)

    @pytest.mark.parametrize("name", ON_SCALARS)
    def test_scalars_do_what_torch_does(self, name):
        function, _, shapes = OPERATIONS[name]
        for seed in range(5):
            numbers = [float(array.flat[0]) for array in operands(shapes, seed)]
            ours = [Scalar(number) for number in numbers]
            theirs = [torch.tensor(number, dtype=torch.float64, requires_grad=True) for number in numbers]
            y, expected = function(*ours), function(*theirs)
            close(y, expected.item())
            first = grad(y, ours, create_graph=True)
            expected_first = torch.autograd.grad(expected, theirs, create_graph=True)
            close(list(map(float, first)), [g.item() for g in expected_first])
            for g, e in zip(first, expected_first, strict=True):
                if not e.requires_grad:
                    continue
                expected_second = torch.autograd.grad(e, theirs, allow_unused=True, retain_graph=True)
                second = grad(g, ours)
                close(list(map(float, second)), [0.0 if s is None else s.item() for s in expected_second], 1e-11)

    def test_every_elementwise_operation_is_among_them(self):
        graphs = [
            topological_order(OPERATIONS[name][0](*map(Tensor, operands(OPERATIONS[name][2])))) for name in ON_SCALARS
        ]
        assert {node.operation for graph in graphs for node in graph} - {""} == set(ELEMENTWISE)

    @pytest.mark.parametrize(
        ("function", "at"),
        [
            (lambda x: x**0, 0.0),
            (lambda x: x**1, 0.0),
            (lambda x: x**2, 0.0),
            (lambda x: x**0.5, 0.0),
            (lambda x: x**3, -2.0),
            (lambda x: x**0.5, -1.0),
            (lambda x: 0.0**x, 2.0),
            (lambda x: 0.0**x, 0.0),
            (lambda x: 1 / x, 0.0),
            (lambda x: x.log(), 0.0),
            (lambda x: x.log(), -1.0),
            (lambda x: x.exp(), 1000.0),
            (lambda x: x.relu(), 0.0),
            (lambda x: x.tanh(), 400.0),
        ],
    )
    @pytest.mark.parametrize("kind", [Scalar, Tensor])
    @pytest.mark.filterwarnings("error")
    def test_at_the_edges_it_is_torchs_too_and_nothing_warns(self, function, at, kind):
        x, expected_x = kind(at), torch.tensor(at, dtype=torch.float64, requires_grad=True)
        y, expected = function(x), function(expected_x)
        np.testing.assert_equal(float(np.asarray(y.value)), expected.item())
        np.testing.assert_equal(
            float(np.asarray(grad(y, x)[0].value)), torch.autograd.grad(expected, expected_x)[0].item()
        )

    @pytest.mark.parametrize("kind", [Scalar, Tensor])
    @pytest.mark.parametrize("exponent", [0.0, 1.0, -0.5])
    def test_the_mixed_derivative_of_a_power(self, kind, exponent):
        """d2/da db a^b = a^(b-1) (1 + b log a). Where b is 0, torch 2.13 gives 0: it cuts b * a^(b-1) off."""
        a, b = kind(2.0), kind(exponent)
        (by_a,) = grad(a**b, a, create_graph=True)
        (by_b,) = grad(a**b, b, create_graph=True)
        exact = 2.0 ** (exponent - 1) * (1 + exponent * math.log(2))
        close(grad(by_a, b)[0].value, exact)
        close(grad(by_b, a)[0].value, exact)

    def test_equal_largest_elements_share_the_gradient(self):
        x = Tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
        x.max(1).sum().backward()
        close(x.grad, [[0, 0.5, 0.5], [1 / 3] * 3])

    def test_scores_of_any_size_have_finite_softmax(self):
        z = Tensor([[1e5, -1e5, 0.0], [710.0, 711.0, 0.0]])
        loss = cross_entropy(z, np.array([1, 0]))
        loss.backward()
        expected = torch.tensor(z.value, requires_grad=True)
        torch.nn.functional.cross_entropy(expected, torch.tensor([1, 0])).backward()
        close(z.grad, expected.grad)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_types_are_kept(self, dtype):
        x, w = Tensor(np.ones((2, 3), dtype)), Tensor(np.ones((3, 2), dtype))
        y = (1 + (x @ w) * 2.0 - np.float64(1) + np.arange(2)).log_softmax(1).max(0).mean()
        assert y.dtype == dtype
        assert grad(y, w)[0].dtype == dtype

    def test_a_gradient_has_the_type_of_its_input(self):
        x, w = Tensor(np.ones(3, np.float32)), Tensor(np.ones(3, np.float64))
        y = (x * w).sum()
        assert y.dtype == np.float64
        assert [g.dtype for g in grad(y, [x, w])] == [np.float32, np.float64]
        second = grad(grad(y * y, x, create_graph=True)[0].sum(), w)[0]
        close(second, np.full(3, 12.0))  # d/dw_i of the sum of 2 (x.w) w

    def test_arrays_stand_on_either_side(self):
        x = Tensor(np.ones((2, 2)))
        matrix = np.arange(4.0).reshape(2, 2)
        for y in (
            matrix * x,
            matrix @ x,
            matrix - x,
            matrix / x,
            matrix + x,
            matrix**x,
            np.float64(3) * x,
            np.int64(2) / x,
        ):
            assert isinstance(y, Tensor)
            assert y.requires_grad
        assert isinstance(np.float64(3) * Scalar(2.0), Scalar)


# ------------------------------------------------------------------------------------------------- random expressions

# No step makes numbers much larger: with sin(1e8), one rounding more or less would be another answer.
STEPS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b.tanh(),
    "/": lambda a, b: a / (b * b + 1),
    "**": lambda a, b: (a.sin() ** 2 + 1) ** (b.tanh() + 1.5),  # not 0: see test_the_mixed_derivative_of_a_power
    "cube": lambda a, b: a.tanh() ** 3,
    "exp": lambda a, b: (a.tanh() + b.sin()).exp(),
    "log": lambda a, b: (a * a + 0.5).log(),
    "sin": lambda a, b: a.sin(),
    "cos": lambda a, b: 2 * a.cos() - 1,
    "tanh": lambda a, b: (a - b).tanh(),
    "relu": lambda a, b: (a + b).relu(),
    "neg": lambda a, b: -a,
}
NUMBERS = st.floats(-2, 2).map(lambda x: round(x, 3))


@st.composite
def expressions(draw):
    """Three numbers, and up to ten steps: each takes two of the values so far and adds one."""
    values = draw(st.lists(NUMBERS, min_size=3, max_size=3))
    length = draw(st.integers(1, 10))
    steps = [
        (draw(st.sampled_from(sorted(STEPS))), draw(st.integers(0, 2 + i)), draw(st.integers(0, 2 + i)))
        for i in range(length)
    ]
    return values, steps


def evaluate(steps, leaves):
    values = list(leaves)
    for name, i, j in steps:
        values.append(STEPS[name](values[i], values[j]))
    return values[-1]


class TestRandomExpressions:
    @given(expressions())
    @settings(max_examples=150, deadline=None)
    def test_scalars_have_torchs_first_and_second_derivatives(self, expression):
        numbers, steps = expression
        leaves = [Scalar(number) for number in numbers]
        theirs = [torch.tensor(number, dtype=torch.float64, requires_grad=True) for number in numbers]
        y, expected = evaluate(steps, leaves), evaluate(steps, theirs)
        close(y, expected.item(), 1e-9)
        first = grad(y, leaves, create_graph=True)
        expected_first = torch.autograd.grad(expected, theirs, create_graph=True, materialize_grads=True)
        close([float(g) for g in first], [g.item() for g in expected_first], 1e-9)
        total, expected_total = sum(first), sum(expected_first)
        if expected_total.requires_grad:
            expected_second = torch.autograd.grad(expected_total, theirs, materialize_grads=True)
            close([float(g) for g in grad(total, leaves)], [g.item() for g in expected_second], 1e-8)

    @given(expressions(), st.permutations([(), (3,), (2, 1), (2, 3)]))
    @settings(max_examples=100, deadline=None)
    def test_tensors_of_shapes_that_broadcast_have_torchs_derivatives(self, expression, shapes):
        numbers, steps = expression
        arrays = [n + np.linspace(0, 1, math.prod(s)).reshape(s) for n, s in zip(numbers, shapes, strict=False)]
        leaves = [Tensor(array) for array in arrays]
        theirs = [torch.tensor(array, requires_grad=True) for array in arrays]
        y, expected = evaluate(steps, leaves).sum(), evaluate(steps, theirs).sum()
        close(y, expected.detach(), 1e-9)
        expected_gradients = torch.autograd.grad(expected, theirs, materialize_grads=True)
        for g, e in zip(grad(y, leaves), expected_gradients, strict=True):
            close(g, e, 1e-9)

    @given(expressions())
    @settings(max_examples=50, deadline=None)
    def test_the_order_is_topological(self, expression):
        numbers, steps = expression
        order = topological_order(evaluate(steps, [Scalar(number) for number in numbers]))
        place = {node: i for i, node in enumerate(order)}
        assert len(place) == len(order)
        assert all(place[parent] < place[node] for node in order for parent in node.parents)


# ---------------------------------------------------------------------------------------------------------- the engine


class TestEngine:
    def test_a_node_shows_what_it_was_made_of(self):
        x, y = Scalar(2.0), Scalar(3.0)
        z = x * y
        assert (z.value, z.operation, z.parents) == (6.0, "*", (x, y))
        assert [float(d) for d in z.local_derivatives] == [3.0, 2.0]
        assert x.local_derivatives == ()

    def test_gradients_accumulate(self):
        x = Scalar(3.0)
        (x * x).backward()
        (x * x).backward()
        y = 2 * x
        y.backward()
        y.backward()  # the graph is kept
        assert float(x.grad) == 16.0

    def test_backward_leaves_results_in_the_middle_alone_and_grad_leaves_all_alone(self):
        x = Scalar(2.0)
        middle = x * x
        assert [float(g) for g in grad(middle.exp(), [middle, x])] == pytest.approx([math.exp(4), 4 * math.exp(4)])
        assert x.grad is None
        middle.exp().backward()
        assert middle.grad is None
        assert float(x.grad) == pytest.approx(4 * math.exp(4))

    def test_an_output_that_is_an_input(self):
        x = Scalar(2.0)
        y = x * 3
        assert [float(g) for g in grad([y, x], [x, y])] == [4.0, 1.0]
        assert float(grad(x, x)[0]) == 1.0

    def test_several_outputs_are_added_up(self):
        x = Tensor([1.0, 2.0])
        (g,) = grad([x * x, x.sum()], x, [np.array([1.0, 10.0]), None])
        close(g, [3.0, 41.0])

    def test_an_input_without_influence_has_zeros(self):
        x, unused = Tensor([1.0, 2.0]), Tensor([[3.0]])
        close(grad(x.sum(), unused)[0], [[0.0]])

    @pytest.mark.parametrize("kind", [Scalar, Tensor])
    def test_a_chain_of_a_hundred_thousand_nodes(self, kind):
        x = kind(1.0)
        y = x
        for _ in range(50_000):
            y = y * 0.99999 + 0.1
        order = topological_order(y)
        assert len(order) == 200_001  # with the constants
        y.backward()
        assert float(np.asarray(x.grad.value)) == pytest.approx(0.99999**50_000, rel=1e-9)

    def test_many_paths_are_walked_once(self):
        """2^60 paths lead from y to x; each node is visited once."""
        x = Scalar(1.0)
        y = x
        for _ in range(60):
            y = y + y
        y.backward()
        assert float(x.grad) == 2.0**60

    def test_third_derivatives(self):
        x = Tensor(np.linspace(-2, 2, 9))
        y = x.tanh()
        for _ in range(3):
            (y,) = grad(y.sum(), x, create_graph=True)
        t = np.tanh(x.value)
        close(y, (1 - t**2) * (6 * t**2 - 2))

    def test_backward_with_create_graph_can_be_differentiated(self):
        x = Scalar(2.0)
        (x**3).backward(create_graph=True)
        first = x.grad
        assert first.requires_grad
        x.grad = None
        first.backward()
        assert float(x.grad) == 12.0

    def test_without_create_graph_the_answer_is_constant(self):
        x = Scalar(2.0)
        (g,) = grad(x**3, x)
        assert not g.requires_grad
        assert g.parents == ()

    def test_no_grad(self):
        x = Scalar(2.0)
        with no_grad():
            y = x * x
            with pytest.raises(RuntimeError, match="does not require grad"):
                y.backward()
        assert y.parents == ()
        assert (x * x).requires_grad

    def test_no_grad_is_for_one_thread(self):
        x, found = Scalar(2.0), []
        with no_grad():
            thread = threading.Thread(target=lambda: found.append((x * x).requires_grad))
            thread.start()
            thread.join()
        assert found == [True]

    def test_no_grad_ends_with_an_error_too(self):
        with pytest.raises(KeyError), no_grad():
            raise KeyError
        assert (Scalar(2.0) * 2).requires_grad

    def test_constants_cost_nothing(self):
        x, data = Tensor(np.ones((2, 2))), Tensor(np.ones((2, 2)), requires_grad=False)
        y = (data @ data) * 2
        assert not y.requires_grad
        assert y.parents == ()
        (x @ data).sum().backward()
        assert data.grad is None

    def test_a_leaf_can_be_assigned_but_not_behind_the_graphs_back(self):
        x = Tensor([1.0, 2.0])
        y = (x * x).sum()
        x.value = x.value - 1
        close((x * x).sum(), 1.0)
        with pytest.raises(RuntimeError, match="operand of '\\*' was assigned a new value"):
            y.backward()
        with pytest.raises(AttributeError, match="only a leaf's value can be assigned"):
            y.value = 3.0
        with pytest.raises(ValueError, match=r"shape \(2,\), got \(3,\)"):
            x.value = np.ones(3)
        with pytest.raises(ValueError, match="read-only"):
            x.value += 1

    def test_one_element_is_a_number(self):
        assert (float(Scalar(2)), float(Tensor([2.0])), float(Tensor(2).sum())) == (2, 2, 2)
        with pytest.raises(ValueError, match="size 1"):
            float(Tensor([1.0, 2.0]))

    def test_arrays_are_copied_on_the_way_in(self):
        array = np.ones(2)
        x = Tensor(array)
        array[0] = 5
        assert x.value.tolist() == [1, 1]

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda: Tensor([1.0, 2.0]).backward(), RuntimeError, "only for scalar outputs"),
            (lambda: Scalar(1.0, requires_grad=False).backward(), RuntimeError, "does not require grad"),
            (lambda: grad(Scalar(1.0), Scalar(1.0, requires_grad=False)), RuntimeError, "does not require grad"),
            (lambda: Tensor([1.0, 2.0]).backward(np.ones(3)), ValueError, r"grad_outputs\[0\] .* \(2,\) .* got \(3,\)"),
            (lambda: grad(Scalar(1.0), Scalar(1.0), [1.0, 1.0]), ValueError, "each of the 1 outputs, got 2"),
            (lambda: Scalar(1.0).backward("1"), TypeError, "got str"),
            (lambda: Scalar("1"), TypeError, "must be a real number, got str"),
            (lambda: Scalar(1j), TypeError, "must be a real number, got complex"),
            (lambda: Tensor(["a"]), TypeError, "array of real numbers"),
            (lambda: Tensor([1j]), TypeError, "got complex128"),
            (lambda: Scalar(1.0) + "a", TypeError, "unsupported operand"),
            (lambda: Scalar(1.0) + Tensor(1.0), TypeError, "unsupported operand"),
            (lambda: "a" * Tensor(1.0), TypeError, "unsupported operand|can't multiply"),
            (lambda: Tensor([1.0]) @ "a", TypeError, "unsupported operand"),
            (lambda: Tensor(np.ones((2, 3))) + np.ones(2), ValueError, "broadcast"),
            (lambda: Tensor(np.ones((2, 3))) @ np.ones((2, 3)), ValueError, "matmul"),
            (lambda: cross_entropy(Tensor(np.ones((2, 3))), np.array([0, 3])), ValueError, r"0\.\.2"),
            (lambda: cross_entropy(Tensor(np.ones((2, 3))), np.array([0, -1])), ValueError, r"0\.\.2"),
            (lambda: cross_entropy(Tensor(np.ones((2, 3))), np.array([0])), ValueError, r"\(2, 3\) and \(1,\)"),
            (lambda: cross_entropy(Tensor(np.ones((2, 3))), np.array([0.0, 1.0])), TypeError, "whole numbers"),
        ],
    )
    def test_refuses_what_cannot_be(self, call, error, message):
        with pytest.raises(error, match=message):
            call()

    def test_mlp_has_torchs_gradients(self):
        model = MLP([5, 7, 6, 3], seed=4)
        x, y = np.random.default_rng(0).normal(size=(8, 5)), np.arange(8) % 3
        layers = [torch.nn.Linear(*w.shape, dtype=torch.float64) for w in model.parameters[::2]]
        for layer, weight, bias in zip(layers, model.parameters[::2], model.parameters[1::2], strict=True):
            layer.weight.data, layer.bias.data = torch.tensor(weight.value.T), torch.tensor(bias.value)
        theirs = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
        expected = torch.nn.functional.cross_entropy(theirs(torch.tensor(x)), torch.tensor(y))
        expected.backward()
        loss = cross_entropy(model(x), y)
        loss.backward()
        close(loss, expected.item())
        for layer, weight, bias in zip(layers, model.parameters[::2], model.parameters[1::2], strict=True):
            close(weight.grad, layer.weight.grad.T)
            close(bias.grad, layer.bias.grad)

    def test_a_second_order_step_on_a_quadratic_is_exact(self):
        """Newton: the Hessian, column by column, from gradients of the gradient."""
        a = np.array([[3.0, 1.0], [1.0, 2.0]])
        x = Tensor([5.0, -7.0])
        (g,) = grad(0.5 * (x @ a @ x) - x.sum(), x, create_graph=True)
        hessian = np.stack([grad(g[i], x)[0].value for i in range(2)])
        close(hessian, a)
        close(x.value - np.linalg.solve(hessian, g.value), np.linalg.solve(a, np.ones(2)))


class TestDrawing:
    def test_dot_has_every_node_and_edge(self):
        x = Scalar(2.0, label="x")
        text = to_dot((x * x).exp())
        assert text.startswith("digraph {")
        assert text.count("->") == 3
        assert '[label="x\\n2\\nd = 218.4"]' in text
        assert '[label="exp\\n54.6\\nd = 1"]' in text

    def test_tensors_show_their_shapes(self):
        text = to_dot((Tensor(np.ones((2, 3)), label="W") @ np.ones(3)).sum())
        assert '"W\\n(2, 3)"' in text
        assert '"sum\\n6"' in text

    def test_labels_are_only_text(self):
        text = to_dot(Scalar(1.0, label='a"];\n b\\') * 2)
        assert '[label="a\\"];\\n b\\\\\\n1\\nd = 2"]' in text
        assert len(text.splitlines()) == 8

    def test_graphviz_reads_it(self):
        if not shutil.which("dot"):
            pytest.skip("graphviz is not installed")
        x = Scalar(2.0, label='quote " backslash \\ newline \n end')
        subprocess.run(["dot", "-Tsvg"], input=to_dot(x * x + 1), text=True, check=True, capture_output=True)

    def test_the_figure_has_every_node_at_its_own_place_and_parents_on_the_left(self):
        figure = pytest.importorskip("matplotlib.figure")
        x, y = Scalar(2.0, label="x $1"), Scalar(3.0, label="y")
        z = (x * y + x.sin()) / (y + 1)
        axes = figure.Figure().subplots()
        draw_graph(z, axes)
        words = {text.get_text() for text in axes.texts}
        assert {"*", "+", "sin", "/"} <= {word.partition("\n")[0] for word in words}
        boxes = [text for text in axes.texts if text.get_text()]
        assert len(boxes) == len(topological_order(z))
        assert len({text.get_position() for text in boxes}) == len(boxes)
        arrows = [text for text in axes.texts if not text.get_text()]
        assert len(arrows) == 9
        assert all(arrow.xyann[0] < arrow.xy[0] for arrow in arrows)

    def test_a_deep_graph_can_be_drawn(self):
        figure = pytest.importorskip("matplotlib.figure")
        y = Scalar(1.0)
        for _ in range(1100):  # Python's recursion limit is 1000
            y = y + 1
        assert to_dot(y).count("->") == 2200
        axes = figure.Figure().subplots()
        draw_graph(y, axes)
        assert len(axes.texts) == 2201 + 2200

    def test_the_topic_does_not_load_matplotlib(self):
        code = "import sys, dlkernels.learn.autograd; assert 'matplotlib' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True)


# ----------------------------------------------------------------------------------------------------------- sampling

WEIGHTS = torch.tensor([0.0, 5.0, 1.0, 0.0, 3.0, 0.25, 0.0, 10.0, 1.0, 0.0], dtype=torch.float64)


def generator(seed=0, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def from_alias(weights, count, generator):
    return AliasTable(weights).draw(count, generator)


def with_replacement(weights, count, generator):
    return multinomial(weights, count, True, generator=generator)


class TestDrawsWithReplacement:
    @pytest.mark.parametrize("draw", [with_replacement, from_alias])
    @pytest.mark.parametrize("weights", [WEIGHTS, torch.ones(7), torch.arange(1000.0), 0.9 ** torch.arange(60.0)])
    def test_a_million_draws_pass_chi_square_and_zeros_are_never_drawn(self, draw, weights, device):
        weights = weights.to(device)
        counts = torch.bincount(draw(weights, 10**6, generator(1, device)), minlength=len(weights))
        assert counts.sum() == 10**6
        assert counts[weights == 0].sum() == 0
        statistic, p_value = chi_square(counts.cpu(), weights.cpu())
        assert 1e-4 < p_value < 1 - 1e-4, (statistic, p_value)

    @pytest.mark.parametrize("draw", [with_replacement, from_alias])
    def test_one_draw_does_not_depend_on_the_one_before(self, draw):
        drawn = draw(WEIGHTS, 10**6, generator(2)).reshape(-1, 2)
        counts = torch.bincount(drawn[:, 0] * 10 + drawn[:, 1], minlength=100)
        _, p_value = chi_square(counts, torch.outer(WEIGHTS, WEIGHTS).flatten())
        assert 1e-4 < p_value < 1 - 1e-4

    def test_rows_are_drawn_from_their_own_weights(self):
        rows = torch.stack([WEIGHTS, WEIGHTS.flip(0), torch.ones(10, dtype=torch.float64)])
        drawn = multinomial(rows, 300_000, True, generator=generator(3))
        assert drawn.shape == (3, 300_000)
        for row, weights in zip(drawn, rows, strict=True):
            assert chi_square(torch.bincount(row, minlength=10), weights)[1] > 1e-4

    @given(st.lists(st.integers(0, 6), min_size=1, max_size=12).filter(any))
    @settings(max_examples=200, deadline=None)
    def test_the_alias_table_holds_exactly_these_probabilities(self, weights):
        """Small whole numbers make ties, uniform weights and zeros common."""
        weights = torch.tensor(weights, dtype=torch.float64)
        table = AliasTable(weights)
        torch.testing.assert_close(table.probabilities(), weights / weights.sum(), rtol=0, atol=1e-14)
        assert (table.keep >= 0).all()
        assert (table.keep <= 1).all()
        assert (table.keep[weights == 0] == 0).all()
        assert (weights[table.alias[table.keep < 1]] > 0).all()

    @pytest.mark.parametrize("seed", range(3))
    def test_a_large_alias_table_is_right_too(self, seed):
        weights = torch.rand(200_000, dtype=torch.float64, generator=generator(seed)) ** 8
        weights[::3] = 0
        table = AliasTable(weights)
        torch.testing.assert_close(table.probabilities(), weights / weights.sum(), rtol=0, atol=1e-8 / len(weights))
        assert (table.keep[::3] == 0).all()
        assert (table.alias[table.keep < 1] % 3 != 0).all()

    def test_the_extremes_of_u(self, monkeypatch):
        """The smallest and the largest random number fall on categories that exist."""
        table, alias = InverseCDF(WEIGHTS), AliasTable(WEIGHTS)
        for extreme, category in ((0.0, 1), (1 - 2**-53, 8)):
            monkeypatch.setattr(
                torch, "rand", lambda *a, extreme=extreme, **k: torch.full((50,), extreme, dtype=torch.float64)
            )
            assert table.draw(50).unique().tolist() == [category]
            assert (WEIGHTS[alias.draw(50)] > 0).all()

    @pytest.mark.parametrize("weights", [[3e38, 3e38, 0.0], [1e-40, 1e-40, 0.0]])
    def test_weights_whose_sum_leaves_float32(self, weights):
        drawn = multinomial(torch.tensor(weights), 1000, True, generator=generator())
        assert 400 < (drawn == 0).sum() < 600
        assert (drawn < 2).all()


class TestDrawsWithoutReplacement:
    @pytest.mark.parametrize("count", [1, 3, 6])
    def test_no_category_twice_and_zeros_never(self, count, device):
        rows = WEIGHTS.to(device).expand(20_000, 10)
        drawn = multinomial(rows, count, generator=generator(1, device))
        assert drawn.shape == (20_000, count)
        assert all(len(set(row)) == count for row in drawn.tolist())
        assert (rows.gather(1, drawn) > 0).all()

    def test_all_there_are_is_a_permutation(self):
        assert multinomial(torch.rand(50) + 0.1, 50).sort().values.tolist() == list(range(50))

    def test_ordered_triples_have_the_exact_probabilities(self):
        """P(i, j, k) = w_i/W * w_j/(W - w_i) * w_k/(W - w_i - w_j), at 10^6 draws."""
        weights = torch.tensor([1.0, 2.0, 0.0, 4.0, 8.0], dtype=torch.float64)
        drawn = multinomial(weights.expand(10**6, 5), 3, generator=generator(5))
        counts = torch.bincount((drawn * torch.tensor([25, 5, 1])).sum(dim=1), minlength=125)
        exact = torch.zeros(125, dtype=torch.float64)
        for i, j, k in itertools.permutations([0, 1, 3, 4], 3):
            w, total = weights.tolist(), 15.0
            exact[25 * i + 5 * j + k] = w[i] / total * w[j] / (total - w[i]) * w[k] / (total - w[i] - w[j])
        assert exact.sum() == pytest.approx(1)
        _, p_value = chi_square(counts, exact)
        assert 1e-4 < p_value < 1 - 1e-4

    def test_weights_at_the_end_of_float64(self):
        weights = torch.tensor([5e-324, 1e308, 0.0, 1e308], dtype=torch.float64)
        drawn = multinomial(weights.expand(2000, 4), 3, generator=generator())
        assert (drawn != 2).all()
        assert (drawn[:, 2] == 0).all()


CASES = {
    "three dimensions": (torch.rand(2, 2, 2), 2),
    "no dimension": (torch.tensor(1.0), 1),
    "no samples": (torch.rand(3), 0),
    "negative samples": (torch.rand(3), -1),
    "too many samples": (torch.rand(3), 4),
    "too many samples of no rows": (torch.rand(0, 3), 4),
    "no category": (torch.rand(0), 1, True),
    "no category, many draws": (torch.rand(2, 0), 3, True),
    "int64": (torch.tensor([1, 2, 3]), 1),
    "int32": (torch.tensor([1, 2, 3], dtype=torch.int32), 1),
    "uint8": (torch.tensor([1, 2, 3], dtype=torch.uint8), 1),
    "bool": (torch.tensor([True, False]), 1),
    "complex": (torch.ones(2, dtype=torch.complex64), 1),
    "negative": (torch.tensor([1.0, -1.0]), 1),
    "nan": (torch.tensor([1.0, torch.nan]), 1),
    "inf": (torch.tensor([1.0, torch.inf]), 1),
    "zeros": (torch.tensor([0.0, 0.0]), 1),
    "zeros, two": (torch.tensor([0.0, 0.0]), 2),
    "zeros in one row": (torch.tensor([[1.0, 1.0], [0.0, 0.0]]), 1),
    "negative, two": (torch.tensor([1.0, -1.0]), 2),
    "nan, one with replacement": (torch.tensor([1.0, torch.nan]), 1, True),
    "negative, with replacement": (torch.tensor([1.0, -1.0]), 3, True),
    "nan, with replacement": (torch.tensor([1.0, torch.nan]), 3, True),
    "inf, with replacement": (torch.tensor([1.0, torch.inf]), 3, True),
    "zeros, with replacement": (torch.tensor([0.0, 0.0]), 3, True),
    "zeros in one row, with replacement": (torch.tensor([[1.0, 1.0], [0.0, 0.0]]), 3, True),
    "too many categories": (torch.ones(1).expand(2**24 + 1), 1),
    "uint16": (torch.tensor([1, 2], dtype=torch.uint16), 1),
    "a list": ([0.1, 0.2], 1),
    "an array": (np.ones(2), 1),
    "half a sample": (torch.rand(3), 1.5),
    "a truth value of samples": (torch.rand(3), True),
    "a word of samples": (torch.rand(3), "a"),
    "a tensor of half a sample": (torch.rand(3), torch.tensor(2.0)),
    "a word as replacement": (torch.rand(3), 1, "yes"),
    "a number as replacement": (torch.rand(3), 1, 1),
}


class TestContract:
    @pytest.mark.parametrize("name", CASES)
    def test_errors_are_torchs(self, name):
        with pytest.raises((RuntimeError, TypeError)) as theirs:
            torch.multinomial(*CASES[name])
        with pytest.raises(type(theirs.value)) as ours:
            multinomial(*CASES[name])
        assert type(ours.value) is type(theirs.value)
        if name == "no category":  # torch speaks of aminmax(), with which it looks for negative weights
            assert "sum of probabilities <= 0" in str(ours.value)
        else:
            assert str(ours.value) == str(theirs.value)

    def test_a_wrong_generator_is_torchs_error(self):
        messages = []
        for function in (torch.multinomial, multinomial):
            with pytest.raises(TypeError) as error:
                function(torch.rand(3), 1, generator=3)
            messages.append(str(error.value))
        assert messages[0] == messages[1]

    def test_too_few_categories_that_are_possible(self):
        """torch says that this must not be, and then returns category 0 all the same."""
        for weights in (torch.tensor([0.0, 1.0]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])):
            with pytest.raises(RuntimeError, match="not enough non-negative category to sample"):
                multinomial(weights, 2)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("shape", [(3,), (2, 3), (0, 3)])
    @pytest.mark.parametrize("arguments", [(2,), (5, True), (1,), (1, True), (torch.tensor(2),), (np.int64(2), False)])
    def test_shape_and_type_are_torchs(self, dtype, shape, arguments):
        weights = torch.rand(shape).to(dtype) + 0.1
        ours, theirs = multinomial(weights, *arguments), torch.multinomial(weights, *arguments)
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype

    def test_no_rows_of_no_categories(self):
        assert multinomial(torch.rand(0, 0), 3, True).shape == torch.multinomial(torch.rand(0, 0), 3, True).shape

    def test_names_of_the_arguments_are_torchs(self):
        arguments = {"input": torch.rand(4), "num_samples": 2, "replacement": True, "generator": generator()}
        assert multinomial(**arguments).shape == torch.multinomial(**arguments).shape

    @pytest.mark.parametrize("replacement", [False, True])
    def test_the_generator_decides_and_nothing_else_moves(self, replacement):
        weights = torch.rand(20)
        before = torch.get_rng_state()
        first, again = (multinomial(weights, 10, replacement, generator=generator(7)) for _ in range(2))
        assert torch.equal(first, again)
        assert torch.equal(torch.get_rng_state(), before)
        assert not torch.equal(first, multinomial(weights, 10, replacement, generator=generator(8)))
        torch.manual_seed(3)
        first = multinomial(weights, 10, replacement)
        torch.manual_seed(3)
        assert torch.equal(first, multinomial(weights, 10, replacement))

    def test_strides_do_not_matter_and_the_weights_stay(self):
        wide = torch.rand(6, 8)
        view = wide.T[::2]
        before = wide.clone()
        ours = multinomial(view, 4, generator=generator())
        assert torch.equal(ours, multinomial(view.contiguous(), 4, generator=generator()))
        assert torch.equal(wide, before)

    def test_weights_that_require_a_gradient(self):
        drawn = multinomial(torch.rand(3, requires_grad=True), 2)
        assert not drawn.requires_grad

    def test_an_alias_table_refuses_rows(self):
        with pytest.raises(RuntimeError, match="must be 1 dim"):
            AliasTable(torch.rand(2, 3))
        with pytest.raises(RuntimeError, match="sum of probabilities"):
            AliasTable(torch.zeros(3))


class TestChiSquare:
    def test_is_scipys(self):
        stats = pytest.importorskip("scipy.stats")
        counts, p = torch.tensor([18, 25, 30, 7]), torch.tensor([0.2, 0.3, 0.4, 0.1], dtype=torch.float64)
        expected = stats.chisquare(counts.numpy(), 80 * p.numpy())
        assert chi_square(counts, p) == pytest.approx((expected.statistic, expected.pvalue))
        assert chi_square(counts, 7 * p) == pytest.approx((expected.statistic, expected.pvalue))

    def test_one_impossible_draw_is_enough(self):
        assert chi_square(torch.tensor([100, 1]), torch.tensor([1.0, 0.0])) == (math.inf, 0.0)

    def test_it_notices_a_weight_that_is_one_percent_off(self):
        wrong = WEIGHTS.clone()
        wrong[1] *= 1.01
        counts = torch.bincount(with_replacement(wrong, 10**6, generator()), minlength=10)
        assert chi_square(counts, WEIGHTS)[1] < 1e-3

    def test_p_values_of_a_right_sampler_are_uniform(self):
        drawn = multinomial(WEIGHTS.expand(1000, 10), 2000, True, generator=generator())
        p_values = sorted(chi_square(torch.bincount(row, minlength=10), WEIGHTS)[1] for row in drawn)
        uniform = (np.arange(1000) + 0.5) / 1000
        assert np.abs(np.array(p_values) - uniform).max() < 1.95 / math.sqrt(1000)  # Kolmogorov and Smirnov, 0.1 %
