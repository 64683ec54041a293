"""Fixtures of all tests: a fixed seed, the process's settings put back, and the devices of this machine."""

import random

import numpy
import pytest
import torch

from dlkernels.testing import devices


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test draws the same numbers, alone or in any order."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def settings_restored():
    """Threads, float32 precision and the default dtype are as before, whatever a test did to them."""
    threads, precision, dtype = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.set_default_dtype(dtype)


_NEEDS_CUDA = pytest.mark.skipif("cuda" not in devices(), reason="no CUDA device on this machine")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, _NEEDS_CUDA])])
def device(request):
    return request.param
