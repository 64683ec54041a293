"""compare() bites: it accepts what the tolerance rule allows and names what is wrong with everything else."""

import math

import pytest
import torch

from dlkernels.testing import DTYPES, TOLERANCES, compare, conv2d_cases, relative_error

EXACT = torch.linspace(-1, 1, 1000, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_accepts_a_rounded_result_and_nothing_much_worse(dtype):
    rounded = EXACT.to(dtype)
    allowed = TOLERANCES[dtype].factor * relative_error(rounded, EXACT) + TOLERANCES[dtype].floor
    compare(rounded, rounded, EXACT, dtype)
    with pytest.raises(AssertionError, match=r"grad_input: relative error .* above"):
        compare((EXACT * (1 + 4 * allowed)).to(dtype), rounded, EXACT, dtype, name="grad_input")


def test_gradients_may_be_less_accurate_than_outputs():
    theirs, ours = EXACT * (1 + 1e-5), EXACT * (1 + 2.5e-5)
    tensors = ours.float(), theirs.float(), EXACT, torch.float32
    compare(*tensors, gradient=True)
    with pytest.raises(AssertionError):
        compare(*tensors)


@pytest.mark.parametrize("kind", [math.nan, math.inf, -math.inf], ids=str)
def test_one_element_that_is_not_finite_fails(kind):
    """In ours alone, in the exact result alone, and as another kind; in the same place it passes."""
    spoiled = EXACT.clone()
    spoiled[7] = kind
    other = EXACT.clone()
    other[7] = math.inf if math.isnan(kind) else -kind
    theirs = EXACT.float()
    for ours, exact in ((spoiled, EXACT), (EXACT, spoiled), (other, spoiled)):
        with pytest.raises(AssertionError, match=r"first at \[7\]"):
            compare(ours.float(), theirs, exact, torch.float32)
    compare(spoiled.float(), theirs, spoiled, torch.float32)


def test_an_inaccurate_yardstick_that_is_not_finite_does_not_excuse():
    theirs = EXACT.float()
    theirs[3] = math.nan
    with pytest.raises(AssertionError, match="above"):
        compare((EXACT * 1.01).float(), theirs, EXACT, torch.float32)


def test_shapes_and_dtypes_must_be_equal():
    with pytest.raises(AssertionError, match="shape"):
        compare(EXACT[:, None].float(), EXACT.float(), EXACT, torch.float32)
    with pytest.raises(AssertionError, match="float64"):
        compare(EXACT, EXACT.float(), EXACT, torch.float32)


def test_relative_error():
    zero = torch.zeros(3)
    assert relative_error(zero, zero) == 0
    assert relative_error(zero + 2, zero) == pytest.approx(12**0.5)
    assert relative_error(torch.tensor([3.0, 4.4]), torch.tensor([3.0, 4.0])) == pytest.approx(0.08)
    assert relative_error(torch.tensor([math.nan]), torch.ones(1)) == math.inf
    assert relative_error(torch.empty(0), torch.empty(0)) == 0


def test_cases_have_distinct_names_and_repeatable_inputs():
    cases = conv2d_cases()
    assert len({case.name for case in cases}) == len(cases)
    for case in cases[:3]:
        first = case.make_inputs(torch.float32, generator=torch.Generator().manual_seed(5))
        again = case.make_inputs(torch.bfloat16, generator=torch.Generator().manual_seed(5))
        assert torch.equal(first[0].bfloat16(), again[0])
        assert (first[2] is not None) == case.bias
