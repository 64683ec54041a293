"""Times ours against theirs for one case, and gives no time before it has checked the very outputs that were timed.

A round is A B B A: ours, theirs, theirs, ours, so a machine that slows down or speeds up steadily favours neither.
The two inputs of a round go first, second, first, second: each side meets one input fresh and one that the other side
has just used. Rounds rotate through a small pool of inputs. A B is one pair and B A another, and the interval of the
ratio comes from drawing pairs again (bootstrap), so that what disturbs both sides at once cancels.
"""

import contextlib
import gc
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dlkernels.bench.machine import Watch
from dlkernels.testing import compare, relative_error

ROUND = ("ours", "theirs", "theirs", "ours")
ROUND_INPUTS = (0, 1, 0, 1)

SLOW_S = 5e-3  # calls of at least this take few repeats
REPEATS_FAST, REPEATS_SLOW = 30, 8  # of each side, at least; 8 because a round gives two
ROW_S = 0.1  # a fast case goes on until it has been measured for this long
REPEATS_MOST = 200
SAMPLE_S = 1e-4  # shorter calls are timed several in a row: 1000 times the timer's resolution and cost
BATCH_MOST = 100
RESAMPLES = 2000

# Float32 under torch.set_float32_matmul_precision: what a relative error may be when not held to torch's own error.
PRECISION_BOUND = {"highest": 0.0, "high": 1e-5, "medium": 1e-2}


class Refused(Exception):
    """Why a case gets no time: parity failed, or the kernel that is supposed to be measured did not run."""


class Job(Protocol):
    """The two sides of a case with their inputs ready; an input is known by its slot, 0 <= slot < slots."""

    slots: int
    ours_runs: tuple[str, ...]  # profiler events that ours must show and theirs must not
    ours_avoids: tuple[str, ...]  # profiler events that ours must not show

    def ours(self, slot: int) -> tuple[Tensor, ...]: ...
    def theirs(self, slot: int) -> tuple[Tensor, ...]: ...
    def changed(self) -> None:
        """Counts the weights as changed, as an optimiser's step does: nothing packed from them may be used again."""

    def exact(
        self, slot: int, ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]
    ) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """Yields name, ours, theirs and the float64 result of every output, cut to what float64 has time for."""


@dataclass(frozen=True)
class Case:
    """One row of a table: a shape, a variant (memory format, bias), a direction."""

    list: str  # of shapes
    name: str  # of the shape
    variant: str
    direction: str  # "forward", or "forward+backward"
    dtype: torch.dtype
    flops: float  # multiplications and additions of the definition
    bytes: float  # every tensor read or written once
    build: Callable[[], Job] = field(repr=False, compare=False)
    steps: int = 0  # that a call makes one after the other, where time per step says something

    @property
    def backward(self) -> bool:
        return self.direction != "forward"


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    mad: float  # median absolute deviation from the median


@dataclass(frozen=True)
class Row:
    """A measured case, or a refused one with the reason and nothing else."""

    case: Case
    refused: str | None = None
    ours: Timing = Timing(math.nan, math.nan)
    theirs: Timing = Timing(math.nan, math.nan)
    ratio: float = math.nan  # theirs / ours: above 1, ours is faster
    low: float = math.nan  # 95 % interval of the ratio
    high: float = math.nan
    repeats: int = 0  # samples of each side
    batch: int = 0  # calls per sample
    error_ours: float = math.nan  # relative to float64, the worst of all outputs and gradients
    error_theirs: float = math.nan
    others: float = math.nan  # part of the processors' time that others took meanwhile


# ---- statistics -----------------------------------------------------------------------------------


def timing(samples) -> Timing:
    """Median and median absolute deviation."""
    middle = float(np.median(samples))
    return Timing(middle, float(np.median(np.abs(np.asarray(samples) - middle))))


def ratio_interval(ours, theirs, resamples=RESAMPLES, seed=0) -> tuple[float, float, float]:
    """median(theirs) / median(ours), and its 95 % interval: percentiles of the same over pairs drawn again.

    Args:
        ours, theirs: (pairs,) times; index i is one pair, taken right after each other.
    """
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    pick = np.random.default_rng(seed).integers(len(ours), size=(resamples, len(ours)))
    drawn = np.median(theirs[pick], axis=1) / np.median(ours[pick], axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(np.median(theirs) / np.median(ours)), float(low), float(high)


# ---- clocks ---------------------------------------------------------------------------------------


class CpuClock:
    """Seconds per call, and the last call's outputs."""

    def __call__(self, call, job, slot, batch):
        start = time.perf_counter_ns()
        for _ in range(batch):
            job.changed()
            outputs = call(slot)
        return (time.perf_counter_ns() - start) / batch * 1e-9, outputs


class CudaClock:
    """The same by CUDA events, after the L2 cache has been overwritten.

    The overwriting is on its way when the calls are made, and takes longer than it takes to make one: what a kernel
    waits for its own launch does not count, what a GPU waits for many small calls does.
    """

    L2_BYTES = 256 << 20  # more than any L2 of today

    def __init__(self):
        self.flush = torch.empty(self.L2_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, call, job, slot, batch):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        self.flush.zero_()
        start.record()
        for _ in range(batch):
            job.changed()
            outputs = call(slot)
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / batch * 1e-3, outputs


def make_clock(device: str):
    return CudaClock() if device == "cuda" else CpuClock()


@contextlib.contextmanager
def no_garbage_collection():
    """Collects now, and not again until the end."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# ---- evidence -------------------------------------------------------------------------------------


def events(call) -> set[str]:
    """The names of everything torch's profiler sees during a call."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or every profile writes two lines to the terminal
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.name for event in profile.events()}


def prove(job: Job) -> None:
    """Refuses when ours does not run our kernels, or runs torch's, or theirs runs ours."""
    seen_ours, seen_theirs = events(lambda: job.ours(0)), events(lambda: job.theirs(0))
    for name in job.ours_runs:
        if name not in seen_ours:
            raise Refused(f"our kernel did not run: the profiler saw no {name}")
        if name in seen_theirs:
            raise Refused(f"torch's side ran our kernel {name}")
    for name in job.ours_avoids:
        if name in seen_ours:
            raise Refused(f"our side ran torch's kernel {name}")


def check_parity(case: Case, job: Job, slot: int, ours, theirs) -> tuple[float, float]:
    """The worst relative errors (ours, theirs) of these outputs; refuses when ours is too far from float64."""
    worst = [0.0, 0.0]
    looser = PRECISION_BOUND[torch.get_float32_matmul_precision()] if case.dtype == torch.float32 else 0.0
    for name, mine, other, exact in job.exact(slot, ours, theirs):
        errors = relative_error(mine, exact), relative_error(other, exact)
        worst = [max(pair) for pair in zip(worst, errors, strict=True)]
        if errors[0] <= looser:
            continue
        try:
            compare(mine, other, exact, case.dtype, gradient=name.startswith("gradient"), name=name)
        except AssertionError as error:
            raise Refused(f"parity: {error}") from None
    return worst[0], worst[1]


# ---- measuring ------------------------------------------------------------------------------------


def measure(case: Case, clock=None, row_s: float = ROW_S) -> Row:
    """Times one case; the row of a refused one holds the reason and no time."""
    clock = clock or CpuClock()
    try:
        job = case.build()
        with torch.set_grad_enabled(case.backward):
            prove(job)
            with no_garbage_collection():
                watch = Watch()
                ours, theirs, batch, last = _time(job, clock, row_s)
                others = watch.others()
            slot, outputs = last
            errors = check_parity(case, job, slot, outputs["ours"], outputs["theirs"])
    except (Refused, RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        kind = "" if isinstance(error, Refused) else f"{type(error).__name__}: "
        return Row(case, refused=kind + " ".join(f"{error}".split()))
    ratio, low, high = ratio_interval(ours, theirs)
    return Row(case, None, timing(ours), timing(theirs), ratio, low, high, len(ours), batch, *errors, others)


def _time(job: Job, clock, row_s):
    """Times (ours, theirs) by pairs, the calls per sample, and the last (slot, outputs of both sides for that slot)."""
    calls = {"ours": job.ours, "theirs": job.theirs}
    # Caches, thread pools and torch's compiled primitives warm up here, and the second call says how long one takes.
    once = min(min(clock(call, job, slot, 1)[0] for slot in (0, 1)) for call in calls.values())
    batch = max(1, min(BATCH_MOST, math.ceil(SAMPLE_S / once)))
    least, most = (REPEATS_SLOW, REPEATS_SLOW) if once >= SLOW_S else (REPEATS_FAST, REPEATS_MOST)
    samples: dict[str, list[float]] = {"ours": [], "theirs": []}
    outputs: dict[str, tuple[Tensor, ...]] = {}
    start, turn, slot = time.monotonic(), 0, 0
    # Little may happen between two rounds: it is ours that follows, and finds the caches as that has left them.
    while (count := len(samples["ours"])) < least or (count < most and time.monotonic() - start < row_s):
        for side, which in zip(ROUND, ROUND_INPUTS, strict=True):
            slot = (2 * turn + which) % job.slots
            seconds, result = clock(calls[side], job, slot, batch)
            samples[side].append(seconds)
            if which == 1:  # both sides have met this input once when the round is over
                outputs[side] = result
        turn += 1
    return samples["ours"], samples["theirs"], batch, ((2 * turn - 1) % job.slots, outputs)
