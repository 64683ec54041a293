"""Builds dlkernels/_C, one CPU library per instruction set, and the CUDA library where torch and nvcc allow it.

Environment: DLKERNELS_CUDA=0|1 (default: build CUDA if torch has it and nvcc is found), TORCH_CUDA_ARCH_LIST, MAX_JOBS.
"""

import copy
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from glob import glob

import pybind11
import torch
import torch.utils.cpp_extension
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CUDAExtension, include_paths, library_paths

if sys.platform == "win32":
    sys.exit("dlkernels: Windows is not supported; use Linux (or WSL), please.")

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
AMX = [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
ISA_FLAGS = {"baseline": [], "avx2": AVX2, "avx512": AVX512, "amx": AMX}  # what _C.cpu_features() must find
if platform.machine() != "x86_64":
    ISA_FLAGS = {"baseline": []}

CUDA_ARCHS = "8.0;9.0a;9.0+PTX"  # unless TORCH_CUDA_ARCH_LIST says otherwise
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the stable ABI of torch 2.11: runs on every torch since
FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", TARGET]
HEADERS = glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True)


def sources(pattern):
    return sorted(glob(pattern, recursive=True))


def extension(name, files, flags, include_dirs=()):
    return Extension(
        f"dlkernels.{name}",
        files,
        include_dirs=[*include_dirs, "csrc", *include_paths()],
        library_dirs=library_paths(),
        libraries=["torch_cpu"],
        extra_compile_args=[*FLAGS, *flags],
        depends=HEADERS,
        language="c++",
    )


def wants_cuda():
    """Whether to build the CUDA library; DLKERNELS_CUDA=1 turns a missing piece into an error."""
    setting = os.environ.get("DLKERNELS_CUDA", "")
    missing = [] if torch.version.cuda else ["a torch built with CUDA"]
    missing += [] if shutil.which("nvcc") or os.environ.get("CUDA_HOME") else ["nvcc (on PATH, or CUDA_HOME)"]
    if setting == "1" and missing:
        sys.exit(f"dlkernels: DLKERNELS_CUDA=1, but {' and '.join(missing)} could not be found.")
    return setting != "0" and not missing


def cuda_home():
    """The toolkit's folder in nvcc's own words: nvcc on PATH may be a link or a script somewhere else."""
    dry_run = subprocess.run(["nvcc", "--dryrun", "-c", "none.cu"], capture_output=True, text=True).stderr
    return os.path.realpath(re.search(r"TOP=(\S+)", dry_run)[1])


def cuda_extension():
    if "CUDA_HOME" not in os.environ:
        torch.utils.cpp_extension.CUDA_HOME = cuda_home()
    if not torch.cuda.is_available():  # with a GPU at hand, torch's default is that GPU's architecture
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
    return CUDAExtension(
        "dlkernels.lib.cuda",
        sources("csrc/cuda/**/*.cu"),
        include_dirs=[os.path.abspath("csrc")],
        extra_compile_args={"cxx": FLAGS, "nvcc": ["-std=c++20", "-O3", "-DUSE_CUDA", TARGET]},
        depends=HEADERS,
        py_limited_api=True,
    )


class Build(BuildExtension.with_options(no_python_abi_suffix=True)):
    """Libraries share sources: each gets an object folder of its own, so that rebuilds are incremental.

    They are built side by side, each with its share of the jobs: where a single file has changed, there is one compiler
    to run for each of them.
    """

    def finalize_options(self):
        super().finalize_options()
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count())
        self.parallel = min(jobs, len(self.extensions))
        os.environ["MAX_JOBS"] = str(jobs // self.parallel)  # ninja reads it
        # Also for `pip install -e .`: setuptools would compile in a folder that it throws away afterwards.
        self.build_temp = os.path.join("build", f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}")

    def build_extension(self, ext):
        own = copy.copy(self)  # threads share self
        own.build_temp = os.path.join(self.build_temp, ext.name)
        super(Build, own).build_extension(ext)

    def get_ext_filename(self, name):
        """The libraries belong to no Python version; `_C` does."""
        if name.endswith("._C") or name == "_C":
            return super(BuildExtension, self).get_ext_filename(name)
        return super().get_ext_filename(name)


built_with = {"TORCH": torch.__version__, "CUDA_ARCHS": ""}
libraries = [extension(f"lib.cpu_{isa}", sources("csrc/cpu/**/*.cpp"), flags) for isa, flags in ISA_FLAGS.items()]
if wants_cuda():
    libraries.append(cuda_extension())
    built_with["CUDA_ARCHS"] = os.environ.get("TORCH_CUDA_ARCH_LIST", "this machine's")
macros = [f'-DDLKERNELS_BUILD_{key}="{value}"' for key, value in built_with.items()]

setup(
    ext_modules=[extension("_C", ["csrc/schema.cpp"], macros, [pybind11.get_include()]), *libraries],
    cmdclass={"build_ext": Build},
)
