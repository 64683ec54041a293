"""Fixtures of all tests: a fixed seed, the process's settings put back, and the devices of this machine."""

import os
import random
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
import torch

from dlkernels.testing import devices

# On a machine with pytest and torch alone (make gpu), the tests that are written with hypothesis are left out, aloud.
collect_ignore = (
    []
    if find_spec("hypothesis")
    else [path.name for path in Path(__file__).parent.glob("test_*.py") if "\nfrom hypothesis" in path.read_text()]
)


# Where the processors are shared out between processes (pytest -n), torch gets each process's share of them.
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))


def pytest_report_header():
    """What this machine cannot run, at the top of the output."""
    return f"left out, hypothesis is not installed: {', '.join(sorted(collect_ignore))}" if collect_ignore else None


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
