"""One training loop for all topics: short enough to read, complete enough for a long run.

What it does beyond the five lines of every tutorial: a learning-rate schedule, gradient clipping, autocast, a
checkpoint after every epoch, Ctrl-C that stops cleanly, and data-parallel training under torchrun.

Randomness has no hidden state. The order of an epoch and the random numbers of a step depend on the seed and on
the number of the epoch or step only; so a resumed run continues bit for bit, and two processes see the batches that
one would see.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

# DistributedDataParallel imports this module, and its functions take the group that exists at that moment as a default
# argument. Imported here, before there is one, it cannot keep the group and gloo's threads alive: threads that live to
# the end of Python may abort it (pytorch#190489).
import torch.distributed.nn.functional
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from dlkernels.experiments import DataError, UsageError, atomic_path

__all__ = ["Checkpoint", "History", "Plan", "distributed", "fit", "learning_rate", "outputs", "rank", "say", "world"]

Loss = Callable[..., Tensor]  # (model, *batch) -> mean loss of the batch, a scalar


@dataclass(frozen=True)
class Plan:
    """How to train.

    Attributes:
        epochs: passes over the data.
        batch_size: examples per step, of all processes together. An incomplete last batch is left out.
        learning_rate: the highest one; see :func:`learning_rate`.
        warmup: share of the steps in which it rises.
        weight_decay: AdamW's.
        clip_norm: gradients longer than this are shortened to it.
        autocast: dtype for autocast (torch.bfloat16), None for none.
        seed: of the order of the examples and everything random in a step.
    """

    epochs: int
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup: float = 0.25
    weight_decay: float = 1e-2
    clip_norm: float = 1.0
    autocast: torch.dtype | None = None
    seed: int = 0


@dataclass
class History:
    """What happened: one entry per step, but for `epochs`, which has what `evaluate` said after each epoch.

    Attributes:
        loss: mean loss of the batch, before the step.
        gradient_norm: length of the gradient, before clipping.
        seconds: time of the step, evaluation not included.
        epochs: one dict per finished epoch.
        interrupted: stopped by Ctrl-C before the end.
    """

    loss: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)
    interrupted: bool = False


def fit(
    model: nn.Module,
    loss: Loss,
    data: Sequence[Tensor],
    plan: Plan,
    *,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    augment: Callable[[Tensor], Tensor] | None = None,
    checkpoint: Checkpoint | None = None,
    label: str = "training",
) -> History:
    """Train `model` on `data` by AdamW. The first Ctrl-C ends it after the current step, the second at once.

    Args:
        model: trained in place; already on its device.
        loss: called as ``loss(model, *batch)``, returns the batch's mean loss.
        data: tensors of one length, on the model's device; batches are cut from all of them alike.
        plan: how to train.
        evaluate: called after every epoch; what it returns is kept in the history.
        augment: applied to the first tensor of every batch; may use torch's random numbers.
        checkpoint: where to save after every epoch and on Ctrl-C. If an unfinished run of the same identity is
            there, it is continued. When training is complete the file is removed.
        label: name in the progress bar.

    Returns:
        The history, of the resumed part too.
    """
    steps_per_epoch = _steps_per_epoch(data, plan)
    total = plan.epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay)
    history = checkpoint.load(model, optimizer) if checkpoint else History()
    parallel = DistributedDataParallel(model) if world() > 1 else model

    with _first_ctrl_c() as stop, _progress_bar(total, len(history.loss), label) as bar:
        for step in range(len(history.loss), total):
            begin = time.perf_counter()
            model.train()
            batch = _batch(data, plan, step, steps_per_epoch, augment)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(plan, step, total)
            share, norm = _step(parallel, loss, batch, optimizer, plan)
            value, stopped = _mean_over_processes(share, stop.is_set())
            history.loss.append(value)
            history.gradient_norm.append(norm)
            history.seconds.append(time.perf_counter() - begin)
            bar.set_postfix(loss=f"{value:.3f}", refresh=False)
            bar.update()

            end_of_epoch = (step + 1) % steps_per_epoch == 0
            if end_of_epoch and evaluate:
                history.epochs.append(evaluate(model))
            if checkpoint and (end_of_epoch or stopped):
                checkpoint.save(model, optimizer, history)
            if stopped and step + 1 < total:
                history.interrupted = True
                return history
    if checkpoint:
        checkpoint.remove()
    return history


def learning_rate(plan: Plan, step: int, total: int) -> float:
    """The learning rate of a step: a straight rise during the warm-up, then half a cosine down to zero."""
    warmup = plan.warmup * total
    if step < warmup:
        return plan.learning_rate * (step + 1) / (warmup + 1)
    return plan.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor, batch_size: int = 500) -> Tensor:
    """The model's outputs for all of x, in evaluation mode, batch by batch."""
    model.eval()
    return torch.cat([model(batch) for batch in x.split(batch_size)])


# ------------------------------------------------------------------------------------------------- parts of the loop


def _steps_per_epoch(data: Sequence[Tensor], plan: Plan) -> int:
    examples = len(data[0])
    if plan.batch_size > examples:
        raise ValueError(f"a batch of {plan.batch_size} was asked for, but there are only {examples} examples")
    if plan.batch_size % world():
        raise UsageError(f"a batch of {plan.batch_size} cannot be shared equally by {world()} processes")
    return examples // plan.batch_size


def _batch(
    data: Sequence[Tensor],
    plan: Plan,
    step: int,
    steps_per_epoch: int,
    augment: Callable[[Tensor], Tensor] | None,
) -> list[Tensor]:
    """This process's share of the batch of a step. Every process makes the whole batch, so that all agree on it."""
    epoch, position = divmod(step, steps_per_epoch)
    order = _order(len(data[0]), plan.seed, epoch)
    chosen = order[position * plan.batch_size : (position + 1) * plan.batch_size].to(data[0].device)
    batch = [tensor[chosen] for tensor in data]
    _reseed(_seed(plan.seed, "step", step))
    if augment:
        batch[0] = augment(batch[0])
    if world() > 1:  # from here on (dropout) every process draws its own numbers
        _reseed(_seed(plan.seed, "step", step, rank()))
    return [tensor.chunk(world())[rank()] for tensor in batch]


@functools.lru_cache(maxsize=1)
def _order(examples: int, seed: int, epoch: int) -> Tensor:
    """The random order of the examples in an epoch."""
    return torch.randperm(examples, generator=torch.Generator().manual_seed(_seed(seed, "order", epoch)))


def _step(
    model: nn.Module, loss: Loss, batch: list[Tensor], optimizer: torch.optim.Optimizer, plan: Plan
) -> tuple[Tensor, float]:
    """One step of training: the loss before it, and the length of the gradient."""
    optimizer.zero_grad()
    with torch.autocast(batch[0].device.type, dtype=plan.autocast, enabled=plan.autocast is not None):
        value = loss(model, *batch)
    value.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), plan.clip_norm)
    optimizer.step()
    return value.detach(), norm.item()


def _seed(*parts: int | str) -> int:
    """Mix numbers and names into one well-spread 32-bit seed."""
    numbers = [part if isinstance(part, int) else int.from_bytes(part.encode(), "little") for part in parts]
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _reseed(seed: int) -> None:
    """torch.manual_seed, quickly: where there is no CUDA, that one keeps a traceback of every call for later."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


def _progress_bar(total: int, done: int, label: str) -> tqdm:
    """A bar of steps: shown by the first process only, and only on a terminal."""
    return tqdm(total=total, initial=done, desc=label, unit="step", leave=False, disable=None if rank() == 0 else True)


@contextlib.contextmanager
def _first_ctrl_c() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C sets; the second one interrupts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield stop
        return

    def handler(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


# ------------------------------------------------------------------------------------------------------- checkpoints


@dataclass(frozen=True)
class Checkpoint:
    """The file in which an unfinished training waits to be continued.

    Attributes:
        path: of the file.
        identity: everything that must be the same for a run to be continued (options, data); a file with another
            identity is left alone until it is overwritten.
    """

    path: Path
    identity: str

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, history: History) -> None:
        """Write the state of the training, in the first process only."""
        if rank() != 0:
            return
        state = {
            "identity": self.identity,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "history": asdict(history),
        }
        with atomic_path(self.path) as path:
            torch.save(state, path)

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> History:
        """Put the saved state back and return its history; a new history if there is nothing to continue."""
        if not self.path.exists():
            return History()
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            if state["identity"] != self.identity:
                return History()
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            return History(**state["history"])
        except Exception as error:
            raise DataError(f"{self.path}: not a readable checkpoint. Delete it and run again.") from error

    def remove(self) -> None:
        """Delete the file: there is nothing left to continue."""
        if rank() == 0:
            self.path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------- several processes


@contextlib.contextmanager
def distributed(device: str) -> Iterator[str]:
    """Join the other processes that torchrun started, if there are any; yields the device of this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process: 0 is the one that prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def say(*words: object) -> None:
    """Print, in the first process only."""
    if rank() == 0:
        print(*words, flush=True)


def _mean_over_processes(value: Tensor, stop: bool) -> tuple[float, bool]:
    """The mean of all processes' losses, and whether anyone wants to stop (then all stop at the same step)."""
    if world() == 1:
        return value.item(), stop
    both = torch.stack([value.double() / world(), torch.tensor(stop, dtype=torch.float64, device=value.device)])
    dist.all_reduce(both)
    return both[0].item(), both[1].item() > 0
