"""conv2d on random problems in small integers, for which only one answer is right."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conv2d import FORMATS, doubled, random_grad, results, same_bits

import dlkernels
from dlkernels.testing import Conv2dCase


@st.composite
def conv2d_problems(draw):
    """A valid convolution with every argument free, as a case."""
    small = st.integers(1, 3)
    groups, per_group, kernels = draw(small), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    R, S = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    dilation = draw(small), draw(small)
    padding = draw(st.one_of(st.tuples(st.integers(0, 4), st.integers(0, 4)), st.sampled_from(["same", "valid"])))
    stride = (1, 1) if padding == "same" else (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    around = padding if isinstance(padding, tuple) else (0, 0)
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, (R, S), around, strict=True)]
    H, W = draw(st.integers(least[0], least[0] + 13)), draw(st.integers(least[1], least[1] + 13))
    input, weight = (draw(small), per_group * groups, H, W), (kernels * groups, per_group, R, S)
    return Conv2dCase("fuzz", input, weight, stride, padding, dilation, groups, draw(st.booleans()))


@given(conv2d_problems(), st.sampled_from(["nchw", "channels_last"]), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_any_problem_equals_torch(case, memory_format, dtype):
    inputs = case.make_inputs(dtype, memory_format=FORMATS[memory_format], integers=True)
    grad = random_grad(case, inputs, integers=True)
    exact = results(F.conv2d, case, doubled(inputs), grad.double())
    ours = results(dlkernels.conv2d, case, inputs, grad)
    assert same_bits(ours, {name: value.to(dtype) for name, value in exact.items()})
