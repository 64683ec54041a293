"""Loads the schemas, one CPU library and, where torch has CUDA, the CUDA library. Imported once, by `dlkernels`."""

import os
from pathlib import Path

import torch

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"dlkernels: the compiled part could not be loaded ({error}). Build it with `pip install -e .` in the source "
        f"folder; it needs torch 2.11 or newer, and this is torch {torch.__version__}."
    ) from error

FOLDER = Path(__file__).parent / "lib"
ISAS = ("baseline", "avx2", "avx512", "amx")  # slowest first


def built_isas() -> list[str]:
    """The instruction sets this build has a library for, slowest first."""
    return [isa for isa in ISAS if (FOLDER / f"cpu_{isa}.so").exists()]


def choose_isa(wanted: str | None) -> str:
    """The instruction set to use: `wanted` (DLKERNELS_CPU_ISA) if given, else the best that is built and runs here.

    Raises ImportError where `wanted` is unknown, was not built, or is more than this processor has.
    """
    built, runs = built_isas(), _C.cpu_features()
    usable = [isa for isa in built if runs[isa]]
    if not usable:
        raise ImportError(
            f"dlkernels: no CPU library in {FOLDER}. Build it with `pip install -e .` in the source folder."
        )
    if not wanted:
        return usable[-1]
    if wanted not in usable:
        reason = (
            f"this processor (or operating system) does not run {wanted}"
            if wanted in built
            else "it was not built"
            if wanted in ISAS
            else "no such instruction set is known"
        )
        raise ImportError(f"dlkernels: DLKERNELS_CPU_ISA={wanted}: {reason}. Usable here: {', '.join(usable)}.")
    return wanted


CPU_ISA = choose_isa(os.environ.get("DLKERNELS_CPU_ISA"))
torch.ops.load_library(FOLDER / f"cpu_{CPU_ISA}.so")

HAS_CUDA = torch.version.cuda is not None and (FOLDER / "cuda.so").exists()
if HAS_CUDA:
    torch.ops.load_library(FOLDER / "cuda.so")
