"""Broadcasting by strides against torch's own: results, strides, shared memory, gradients, and every error's text."""

import ast
import inspect
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlkernels.learn import broadcast_tensors as module
from dlkernels.learn.broadcast_tensors import (
    broadcast_shapes,
    broadcast_tensors,
    broadcast_to,
    expand,
    expand_as,
    is_broadcastable,
)

SHAPES = [shape for length in range(4) for shape in itertools.product((0, 1, 2, 3), repeat=length)]
SIZES = st.integers(0, 3)
SHAPE = st.lists(SIZES, max_size=5).map(tuple)


def geometry(result):
    """Everything that makes a view: sizes, strides, and where in memory it begins."""
    if isinstance(result, torch.Tensor):
        return tuple(result.shape), result.stride(), result.storage_offset(), result.data_ptr(), result.dtype
    return type(result), [geometry(part) for part in result] if isinstance(result, list) else tuple(result)


def outcome(function, *arguments):
    """What a function makes of the arguments: the result, or the error's type and text."""
    try:
        result = function(*arguments)
    except Exception as error:
        return type(error), str(error)
    if type(result) is tuple:
        return [geometry(part) for part in result]
    return geometry(result)


def tensors_of(shapes):
    return [torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape) for shape in shapes]


def odd_layout(shape, seed):
    """A tensor of this shape whose strides are not the contiguous ones: permuted, spread, with an offset."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(shape))
    steps = random.integers(1, 3, len(shape))
    wide = torch.randn([shape[d] * steps[d] + 1 for d in order])
    cut = wide[tuple(slice(1, None, int(steps[d])) for d in order)]
    return cut.permute(tuple(np.argsort(order).tolist()))


class TestAgreesWithTorch:
    def test_shapes_of_every_pair(self):
        """All 7,225 pairs of shapes of at most three dimensions of 0..3: answers, and the texts of the refusals."""
        for pair in itertools.product(SHAPES, repeat=2):
            assert outcome(broadcast_shapes, *pair) == outcome(torch.broadcast_shapes, *pair), pair

    def test_tensors_of_every_pair(self):
        tensors = dict(zip(SHAPES, tensors_of(SHAPES), strict=True))
        refused = 0
        for pair in itertools.product(SHAPES, repeat=2):
            a, b = (tensors[shape] for shape in pair)
            expected = outcome(torch.broadcast_tensors, a, b)
            assert outcome(broadcast_tensors, a, b) == expected, pair
            assert outcome(expand_as, a, b) == outcome(torch.Tensor.expand_as, a, b), pair
            accepted = isinstance(expected, list)
            assert is_broadcastable(*pair) == is_broadcastable(a, b) == accepted, pair
            refused += not accepted
        assert 1000 < refused < 6000

    @given(st.lists(SHAPE, max_size=5))
    @settings(max_examples=300, deadline=None)
    def test_any_number_of_shapes(self, shapes):
        assert outcome(broadcast_shapes, *shapes) == outcome(torch.broadcast_shapes, *shapes)
        tensors = tensors_of(shapes)
        expected = outcome(torch.broadcast_tensors, *tensors)
        assert outcome(broadcast_tensors, *tensors) == expected
        assert is_broadcastable(*shapes) == isinstance(expected, list)

    @given(st.data(), SHAPE, st.integers(0, 10**6))
    @settings(max_examples=300, deadline=None)
    def test_any_strides_that_fit(self, data, common, seed):
        """Parts of one common shape always fit, and every part may lie in memory in its own way."""
        tensors = []
        for number in range(data.draw(st.integers(1, 4))):
            shape = tuple(size if data.draw(st.booleans()) else 1 for size in common)
            tensors.append(odd_layout(shape[data.draw(st.integers(0, len(shape))) :], seed + number))
        assert outcome(broadcast_tensors, *tensors) == outcome(torch.broadcast_tensors, *tensors)
        for ours, theirs in zip(broadcast_tensors(*tensors), torch.broadcast_tensors(*tensors), strict=True):
            assert torch.equal(ours, theirs)

    @given(SHAPE, st.lists(st.integers(-2, 3), max_size=6), st.integers(0, 10**6))
    @settings(max_examples=500, deadline=None)
    def test_expand_and_broadcast_to(self, shape, sizes, seed):
        a = odd_layout(shape, seed)
        assert outcome(expand, a, sizes) == outcome(torch.Tensor.expand, a, sizes)
        assert outcome(expand, a, *sizes) == outcome(torch.Tensor.expand, a, *sizes)
        assert outcome(broadcast_to, a, sizes) == outcome(torch.broadcast_to, a, sizes)

    def test_views_of_views(self):
        a = torch.arange(3.0).expand(2, 3)  # has a stride of 0 already
        assert outcome(expand, a, 4, -1, 3) == outcome(a.expand, 4, -1, 3)
        assert outcome(expand, a[1:, 1:], 4, 5, 2) == outcome(a[1:, 1:].expand, 4, 5, 2)

    def test_no_tensors_no_shapes(self):
        assert broadcast_tensors() == ()
        assert broadcast_shapes() == torch.Size([])
        assert is_broadcastable()

    @pytest.mark.parametrize(
        "dtype", [torch.bool, torch.uint8, torch.int16, torch.int64, torch.bfloat16, torch.float64, torch.complex64]
    )
    def test_every_dtype_and_mixed_ones(self, dtype):
        a, b = torch.ones(2, 1).to(dtype), torch.zeros(3)
        assert outcome(broadcast_tensors, a, b) == outcome(torch.broadcast_tensors, a, b)

    def test_without_data(self):
        a, b = torch.empty(2, 1, device="meta"), torch.empty(3)
        assert outcome(broadcast_tensors, a, b) == outcome(torch.broadcast_tensors, a, b)
        assert broadcast_tensors(a, b)[0].device.type == "meta"

    def test_on_every_device(self, device):
        a, b = torch.rand(2, 1, device=device), torch.rand(3, device=device)
        assert all(
            torch.equal(ours, theirs)
            for ours, theirs in zip(broadcast_tensors(a, b), torch.broadcast_tensors(a, b), strict=True)
        )

    def test_large_sizes_cost_no_memory(self):
        view = expand(torch.ones(1), 2**40)
        assert view.shape == (2**40,)
        assert view[2**40 - 1] == 1
        assert broadcast_shapes((2**40, 1), (2**40,)) == (2**40, 2**40)


class TestSharedMemory:
    @pytest.mark.parametrize(
        "make",
        [
            lambda a: expand(a, 4, 2, 3),
            lambda a: expand_as(a, torch.empty(4, 2, 3)),
            lambda a: broadcast_to(a, (4, 2, 3)),
            lambda a: broadcast_tensors(a, torch.empty(4, 1, 3))[0],
        ],
    )
    def test_a_write_shows_in_the_view_and_nothing_is_allocated(self, make):
        a = torch.zeros(2, 1)
        view = make(a)
        assert view.untyped_storage().data_ptr() == a.untyped_storage().data_ptr()
        assert view.untyped_storage().nbytes() == 8
        assert view.stride() == (0, 1, 0)
        assert view._base is a
        a[1] = 5
        assert view[:, 1].eq(5).all()
        assert view[:, 0].eq(0).all()

    def test_what_has_the_shape_already_is_returned_itself(self):
        a, b = torch.zeros(2, 3), torch.zeros(3)
        ours, theirs = broadcast_tensors(a, b), torch.broadcast_tensors(a, b)
        assert ours[0] is a
        assert theirs[0] is a
        assert ours[1] is not b

    def test_nothing_of_torchs_broadcasting_is_inside(self):
        """The one function of torch that makes a result is as_strided."""
        names = set()
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                names.add(node.attr)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr not in ("expand", "expand_as", "repeat", "tile", "broadcast_to")
        assert names == {"Size", "as_strided"}


class TestGradients:
    def test_gradients_sum_over_the_expanded_dimensions(self):
        a = torch.zeros(3, 1, requires_grad=True)
        b = torch.zeros(4, requires_grad=True)
        weight = torch.arange(12.0).reshape(3, 4)
        for part in broadcast_tensors(a, b):
            (part * weight).sum().backward()
        assert torch.equal(a.grad, weight.sum(dim=1, keepdim=True))
        assert torch.equal(b.grad, weight.sum(dim=0))

    @pytest.mark.parametrize(
        ("shape", "sizes"),
        [((3, 1), (3, 4)), ((3,), (2, 3)), ((), (2, 2)), ((1, 2, 1), (3, 1, -1, 2)), ((2, 1), (2, 0)), ((2,), (2,))],
    )
    def test_gradcheck(self, shape, sizes):
        a = torch.rand(shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda a: expand(a, *sizes), a)
        assert torch.autograd.gradcheck(lambda a: expand(a, *sizes) ** 3, a)
        assert torch.autograd.gradgradcheck(lambda a: expand(a, *sizes) ** 3, a)

    def test_gradcheck_of_several_tensors(self):
        tensors = [
            torch.rand(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 1, 1), (3, 1), (4,), ())
        ]
        assert torch.autograd.gradcheck(lambda *t: sum(torch.stack(broadcast_tensors(*t)).unbind()) ** 2, tensors)

    def test_gradcheck_of_odd_strides(self):
        a = torch.rand(4, 6, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda a: expand(a.t()[1::2, None, 1:], 2, -1, 5, -1).sin(), a)

    def test_through_a_view_that_was_stretched_before(self):
        a = torch.rand(3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda a: expand(expand(a, 2, 3), 4, 2, 3) ** 2, a)

    def test_under_vmap_and_func_grad(self):
        a, weight = torch.rand(5, 3), torch.rand(5, 2, 3)
        ours = torch.func.vmap(torch.func.grad(lambda a, w: (expand(a, 2, 3) * w).sum()))(a, weight)
        torch.testing.assert_close(ours, weight.sum(dim=1))


class TestErrors:
    """Type and text are torch's."""

    @pytest.mark.parametrize(
        "shapes",
        [
            ((3,), (4,)),
            ((2, 3), (3, 2)),
            ((3, 4), (4, 3), (2, 2)),
            ((3,), (1,), (4,), (5,)),
            ((2, 0), (2, 3)),
            (3, 4),
            (3, 1),
            (True,),
            ([2, 1], [1, 3]),
            ([2, 3], [4]),
            (torch.Size([2]), (3,)),
            ((-1,), (3,)),
            ((1,), (-1,)),
            ((2, 3), (-3, 1)),
            (-1,),
            (2.0,),
            ((2.0,), (1,)),
            ((2,), (1.5,)),
            (None,),
            ((2,), None),
            ({2, 3},),
            ((None,), (2,)),
        ],
        ids=str,
    )
    def test_broadcast_shapes(self, shapes):
        assert outcome(broadcast_shapes, *shapes) == outcome(torch.broadcast_shapes, *shapes)

    @pytest.mark.parametrize(
        "shapes", [[(3,), (4,)], [(2, 1), (1, 3), (4,)], [(2,), (1,), (3,), (4,)], [(5, 1, 2), (3, 4)]], ids=str
    )
    def test_broadcast_tensors(self, shapes):
        tensors = tensors_of(shapes)
        kind, text = outcome(broadcast_tensors, *tensors)
        assert (kind, text) == outcome(torch.broadcast_tensors, *tensors)
        assert kind is RuntimeError
        assert "must match the size of tensor b" in text

    @pytest.mark.parametrize("other", [3, None, [torch.zeros(2)], np.zeros(2)], ids=lambda value: type(value).__name__)
    def test_what_is_not_a_tensor(self, other):
        a = torch.zeros(2)
        assert outcome(broadcast_tensors, a, other) == outcome(torch.broadcast_tensors, a, other)
        assert outcome(broadcast_tensors, other) == outcome(torch.broadcast_tensors, other)
        assert outcome(broadcast_to, other, (2,)) == outcome(torch.broadcast_to, other, (2,))
        assert outcome(expand_as, a, other) == outcome(a.expand_as, other)
        with pytest.raises(TypeError, match="must be Tensor, not"):
            expand(other, 2)

    @pytest.mark.parametrize(
        "sizes",
        [
            (4,),
            (2, 4),
            (-1, 3),
            (-2,),
            (2, -2),
            (2**40, 2**40, 3),
            (),
            ((),),
            (2.0,),
            ("3",),
            (None,),
            (True,),
            (2.0, 3),
            (True, 3),
            ((2, 3), 4),
            (2, 2.0),
            (2, None),
            ((2.0, 3),),
            ((True, 3),),
            ((3, True),),
            ([2, "a"],),
            ({2, 3},),
            (torch.tensor([2, 3]),),
            (torch.tensor(2.0), 3),
            (2, torch.tensor(3.0)),
            (torch.tensor(2), 3),
            (torch.tensor(3),),
            (np.int64(2), 3),
            ((np.int64(2), 3),),
            (np.array([2, 3]),),
            (range(2, 4),),
        ],
        ids=str,
    )
    def test_expand(self, sizes):
        a = torch.arange(3)
        assert outcome(expand, a, *sizes) == outcome(a.expand, *sizes)
        if len(sizes) == 1:
            assert outcome(broadcast_to, a, sizes[0]) == outcome(torch.broadcast_to, a, sizes[0])

    @pytest.mark.parametrize("sizes", [(2**63, 3), (3, -(2**70)), (2**63, 2.0)], ids=str)
    def test_sizes_beyond_64_bits(self, sizes):
        """Only the first line: a stack trace of C++ follows in torch's."""
        a = torch.zeros(2)
        for ours, torchs in ((expand, torch.Tensor.expand), (broadcast_to, torch.broadcast_to)):
            arguments = (a, *sizes) if ours is expand else (a, sizes)
            (kind, text), (expected, long_text) = outcome(ours, *arguments), outcome(torchs, *arguments)
            assert (kind, text.rstrip('"')) == (expected, long_text.splitlines()[0])

    @pytest.mark.parametrize(
        "dtype",
        [
            *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.half, torch.float, torch.double),
            *(torch.bool, torch.bfloat16, torch.complex64, torch.complex128, torch.uint16, torch.float8_e4m3fn),
        ],
        ids=str,
    )
    def test_too_few_sizes_name_the_type(self, dtype, device):
        a = torch.zeros(2, 3, dtype=dtype, device=device)
        kind, text = outcome(expand, a, 3)
        assert (kind, text) == outcome(a.expand, 3)
        assert "number of sizes provided (1)" in text

    def test_too_few_sizes_without_data(self):
        a = torch.empty(2, device="meta")
        assert outcome(expand, a, ()) == outcome(a.expand, ())

    def test_is_broadcastable_refuses_what_is_not_a_shape(self):
        assert not is_broadcastable((-1,), (3,))
        with pytest.raises(RuntimeError, match="ints, a tuple of ints"):
            is_broadcastable(2.0)
