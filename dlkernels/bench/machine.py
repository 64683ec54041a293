"""What a table must say about the machine, and the roofs that percentages refer to, measured in the same run.

On a CPU the arithmetic roofs are loops on registers alone (csrc/cpu/roofs.cpp), on a GPU torch.mm of square matrices;
the memory roof is copy_ of a large tensor. A kernel can be above either: a convolution can save multiplications, and a
small tensor lives in a cache.
"""

import contextlib
import datetime
import math
import os
import platform
import time
from dataclasses import dataclass

import torch

MM_SIZE = 2048
ROOF_ROUNDS = 20_000  # of the register loops: some milliseconds
COPY_BYTES = 256 << 20
ROOF_S = 0.4  # each roof is measured for this long, and at least three times


@dataclass(frozen=True)
class Roofs:
    """Rates: FLOP/s of each unit, named "<unit> <dtype>", and bytes/s of copy_ (read and written)."""

    arithmetic: dict[str, float]
    copy: float

    def unit(self, dtype: torch.dtype) -> str:
        """The unit for this dtype: its own, else the float32 one, which converted numbers go through."""
        own = (name for name in self.arithmetic if name.endswith(f" {dtype_name(dtype)}"))
        return next(own, next(iter(self.arithmetic)))

    def seconds(self, flops: float, bytes: float, dtype: torch.dtype) -> tuple[float, str]:
        """The shortest time under the roofs, and the name of the roof that sets it."""
        unit = self.unit(dtype)
        by_unit, by_copy = flops / self.arithmetic[unit], bytes / self.copy
        return (by_unit, unit.split()[0]) if by_unit >= by_copy else (by_copy, "copy")


def dtype_name(dtype: torch.dtype) -> str:
    return f"{dtype}".removeprefix("torch.")


def measure_roofs(dtype: torch.dtype, device: str = "cpu") -> Roofs:
    """The best of several runs each, for a roof is what can be reached."""
    source = torch.zeros(COPY_BYTES, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = 2.0 * COPY_BYTES / _least_seconds(lambda: target.copy_(source), device)
    return Roofs(_matmul_rates(dtype) if device == "cuda" else _register_rates(), copy)


def _register_rates() -> dict[str, float]:
    """FLOP/s of fused multiply-adds, and of AMX tiles where the library in use has them, on all threads."""
    loops = torch.ops.dlkernels
    fma = loops.roof_fma(ROOF_ROUNDS) / _least_seconds(lambda: loops.roof_fma(ROOF_ROUNDS), "cpu")
    amx = loops.roof_amx(ROOF_ROUNDS) / _least_seconds(lambda: loops.roof_amx(ROOF_ROUNDS), "cpu")
    return {"FMA float32": fma, "FMA float64": fma / 2} | ({"AMX bfloat16": amx} if amx else {})


def _matmul_rates(dtype: torch.dtype) -> dict[str, float]:
    rates = {}
    for kind in dict.fromkeys((torch.float32, torch.bfloat16, dtype)):
        a, b = (torch.randn(MM_SIZE, MM_SIZE, device="cuda").to(kind) for _ in "ab")
        seconds = _least_seconds(lambda a=a, b=b: torch.mm(a, b), "cuda")
        rates[f"mm {dtype_name(kind)}"] = 2.0 * MM_SIZE**3 / seconds
    return rates


def _least_seconds(call, device):
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    began, times = time.monotonic(), list[float]()
    while len(times) < 3 or time.monotonic() - began < ROOF_S:
        synchronize()
        start = time.perf_counter_ns()
        call()
        synchronize()
        times.append((time.perf_counter_ns() - start) * 1e-9)
    return min(times)


def describe(device: str = "cpu") -> dict[str, str]:
    """Processor, instruction sets in use, versions, threads, precision, load, date."""
    import dlkernels

    info = dlkernels.info()
    facts = {"processor": processor(), "cores": f"{torch.multiprocessing.cpu_count()}"}
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts | {
        "instruction set": f"ours {info['cpu_isa']}, torch {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "dlkernels": info["dlkernels"],
        "threads": f"{torch.get_num_threads()}",
        "float32 precision": torch.get_float32_matmul_precision(),
        "load before": f"{os.getloadavg()[0]:.2f}",
        "date": datetime.date.today().isoformat(),
    }


class Watch:
    """How much of the processors' time others take from now on, other processes and other guests of the host."""

    def __init__(self):
        self.start = self._read()

    def others(self) -> float:
        """Their part of all processor time since then, 0 to 1; NaN where the system does not tell."""
        if not (self.start and (now := self._read())):
            return math.nan
        total, busy, own = (after - before for before, after in zip(self.start, now, strict=True))
        return min(1.0, max(0.0, busy - own) / max(total, 1e-9))

    @staticmethod
    def _read():
        try:
            with open("/proc/stat", encoding="utf-8") as file:
                ticks = [int(word) for word in file.readline().split()[1:9]]
        except OSError:
            return None
        _user, _nice, _system, idle, waiting, *_ = ticks  # then interrupts, and stolen by the host
        second = os.sysconf("SC_CLK_TCK")
        return sum(ticks) / second, (sum(ticks) - idle - waiting) / second, time.process_time()


def processor() -> str:
    """The processor's name, with family and model where the system tells them."""
    facts: dict[str, str] = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name", platform.processor() or platform.machine())
    return f"{name}, family {facts['cpu family']} model {facts['model']}" if "cpu family" in facts else name
