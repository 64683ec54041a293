"""What was built, what this machine has, and what is in use."""

import platform

import torch

from . import _C, _libraries
from ._backend import current_backend


class Info(dict):
    """A dict that prints as an aligned list."""

    def __str__(self):
        width = max(map(len, self))
        return "\n".join(f"{key:{width}}  {value}" for key, value in self.items())


def info() -> Info:
    """What was built, what this machine has, and what is in use: paste it into a bug report.

    Returns:
        A dict of strings, numbers and lists; `print` shows it a line an entry.

    Example:
        >>> dlkernels.info()["cpu_isa"]
        'avx512'
    """
    from . import __version__

    build, runs = _C.build_info(), _C.cpu_features()
    return Info(
        dlkernels=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        built_with_torch=build["torch"],
        built_with_compiler=build["compiler"],
        needs_torch_abi=f"{build['torch_abi']} or newer",
        processor=_processor_name(),
        cpu_isa=_libraries.CPU_ISA,
        cpu_isas_built=_libraries.built_isas(),
        cpu_isas_of_this_machine=[isa for isa, usable in runs.items() if usable],
        threads=torch.get_num_threads(),
        cuda_in_torch=torch.version.cuda,
        cuda_kernels=_libraries.HAS_CUDA,
        cuda_architectures_built=build["cuda_architectures"] or None,
        cuda_devices=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        backend=current_backend(),
        float32_matmul_precision=torch.get_float32_matmul_precision(),
    )


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
