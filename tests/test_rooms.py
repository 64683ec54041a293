"""The house has its rooms: what one operator has, every operator has, under the same name, with the same arguments."""

import importlib
import inspect
from pathlib import Path

import pytest
import torch

import dlkernels

ROOT = Path(__file__).resolve().parent.parent
COMPOSITES = {"split_linear"}  # made of torch's operators: no kernels, so no csrc, cpu or cuda of their own
DRAWN = {"drop_mask"}  # randomness is an argument: the public function draws it and hands it to the operator
OPERATORS = sorted(p.stem for p in (ROOT / "dlkernels" / "ops").glob("*.py") if not p.stem.startswith("_"))
WITH_KERNELS = [stem for stem in OPERATORS if stem not in COMPOSITES]


def test_there_are_operators():
    assert "conv2d" in OPERATORS


@pytest.mark.parametrize("stem", OPERATORS)
@pytest.mark.parametrize("room", ["dlkernels/ops/{}.py", "dlkernels/reference/{}.py", "tests/test_{}.py"])
def test_python_rooms(stem, room):
    assert (ROOT / room.format(stem)).is_file()


@pytest.mark.parametrize("stem", WITH_KERNELS)
@pytest.mark.parametrize(
    "rooms",
    [
        ("csrc/{}.h",),
        ("csrc/cpu/{}.cpp", "csrc/cpu/{}"),
        ("csrc/cuda/{}.cu", "csrc/cuda/{}"),
        ("bench/bench_{}.py",),
    ],
    ids=["contract", "cpu", "cuda", "bench"],
)
def test_kernel_rooms(stem, rooms):
    """A file, or a folder with something in it."""
    paths = [ROOT / room.format(stem) for room in rooms]
    assert any(path.is_file() or (path.is_dir() and any(path.iterdir())) for path in paths), f"none of {paths}"


@pytest.mark.parametrize("stem", WITH_KERNELS)
def test_schema_names_the_operator(stem):
    schemas = (ROOT / "csrc" / "schema.cpp").read_text()
    assert f'"{stem}(' in schemas
    assert f'"{stem}_backward(' in schemas


@pytest.mark.parametrize("stem", OPERATORS)
def test_public_name_is_exported(stem):
    assert callable(getattr(dlkernels, stem))
    assert stem in dlkernels.__all__
    assert callable(getattr(dlkernels.reference, stem))


@pytest.mark.parametrize("stem", WITH_KERNELS)
def test_reference_has_the_backward(stem):
    """grad first, then the arguments of the forward."""
    forward, backward = getattr(dlkernels.reference, stem), getattr(dlkernels.reference, f"{stem}_backward")
    assert next(iter(inspect.signature(backward).parameters)) == "grad"
    assert _parameters(backward)[1:] == _parameters(forward)


@pytest.mark.parametrize("stem", OPERATORS)
def test_operator_and_reference_take_the_same_arguments(stem):
    ops, reference = _public_functions(f"dlkernels.ops.{stem}"), _public_functions(f"dlkernels.reference.{stem}")
    assert stem in ops
    assert stem in reference
    for name in ops.keys() & reference.keys():
        if name in DRAWN:  # the reference starts where the operator does, after the random numbers
            schema = getattr(torch.ops.dlkernels, name).default._schema
            assert [argument.name for argument in schema.arguments] == list(
                inspect.signature(reference[name]).parameters
            )
        else:
            assert _parameters(ops[name]) == _parameters(reference[name]), name


def _public_functions(module_name):
    module = importlib.import_module(module_name)
    functions = inspect.getmembers(module, inspect.isfunction)
    return {name: f for name, f in functions if f.__module__ == module_name and not name.startswith("_")}


def _parameters(function):
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
