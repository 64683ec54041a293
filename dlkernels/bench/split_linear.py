"""split_linear's bench: SplitLinear of 1, 2, 4, 8 groups against one nn.Linear of the same features.

They are different functions (but for one group): what is compared is what a layer costs, in parameters and in time.
Ours is compared with float64 by the usual rule, torch's own error being the reference's; nn.Linear with its own result
in float64. Letters: N rows, I and O features in and out, G groups.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import linear

from dlkernels.bench import shapes
from dlkernels.bench.harness import Case, Refused
from dlkernels.testing import relative_error

DIRECTIONS = ("forward", "forward+backward")
SLOTS = 4
LINEAR = 2e-2  # relative error that nn.Linear may have: bfloat16 stays below


@dataclass(frozen=True)
class Shape:
    N: int
    I: int  # noqa: E741
    O: int  # noqa: E741
    splits: int

    @property
    def name(self) -> str:
        return f"{self.N} x {self.I}->{self.O}"

    @property
    def parameters(self) -> int:
        """(I/G) (O/G) weights and O/G biases."""
        return (self.I // self.splits) * (self.O // self.splits) + self.O // self.splits

    def flops(self, backward: bool) -> float:
        """2 N I O/G for the forward; as much again for the input's and for the weight's gradient."""
        return 2.0 * self.N * self.I * self.O / self.splits * (3 if backward else 1)

    def bytes(self, backward: bool, itemsize: int) -> float:
        """Forward: X, W, b in, Y out. Backward: X, W, dY in, dX, dW, db out."""
        x, y = self.N * self.I, self.N * self.O
        forward, after = x + self.parameters + y, 2 * x + 2 * self.parameters + y
        return itemsize * float(forward + after * backward)


def cases(suite: str, device: str, dtype: torch.dtype) -> list[Case]:
    """The suite's rows: every size and number of groups, in both directions."""
    lines = shapes.select("split_linear", suite, device)
    return [
        make_case(line["list"], Shape(*(int(line[key]) for key in ("N", "I", "O", "splits"))), direction, dtype, device)
        for line in lines
        for direction in DIRECTIONS
    ]


def make_case(list_, shape: Shape, direction, dtype, device="cpu") -> Case:
    backward = direction != "forward"
    return Case(
        list=list_,
        name=shape.name,
        variant=f"splits {shape.splits}, {shape.parameters} parameters",
        direction=direction,
        dtype=dtype,
        flops=shape.flops(backward),
        bytes=shape.bytes(backward, dtype.itemsize),
        build=lambda: SplitLinearJob(shape, backward, dtype, device),
    )


class SplitLinearJob:
    """dlkernels.SplitLinear against torch.nn.Linear, both without activation; a backward gives every gradient."""

    slots = SLOTS
    ours_runs: tuple[str, ...] = ()  # no kernel of its own
    ours_avoids: tuple[str, ...] = ()

    def __init__(self, shape: Shape, backward: bool, dtype: torch.dtype, device: str):
        import dlkernels

        self.shape, self.backward = shape, backward
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer = dlkernels.SplitLinear(shape.I, shape.O, shape.splits, activation="none").to(device, dtype)
            self.linear = nn.Linear(shape.I, shape.O).to(device, dtype)
            draw = [(torch.randn(shape.N, shape.I), torch.randn(shape.N, shape.O)) for _ in range(SLOTS)]
        self.pool = [(x.to(device, dtype).requires_grad_(backward), dy.to(device, dtype)) for x, dy in draw]

    def ours(self, slot):
        return self._run(self.layer, self.layer, *self.pool[slot])

    def theirs(self, slot):
        return self._run(self.linear, self.linear, *self.pool[slot])

    def _run(self, function, layer, x, dy):
        y = function(x)
        return (y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)) if self.backward else (y,)

    def changed(self):
        if self.backward:
            torch.autograd.graph.increment_version([self.layer.weight, self.linear.weight])

    def exact(self, slot, ours, theirs):
        import dlkernels

        G = self.shape.splits
        with dlkernels.backend("reference"), torch.set_grad_enabled(self.backward):
            others = self.ours(slot)
        for result, right in zip(theirs, self._in_float64(self.linear, slot, 1), strict=True):
            if (error := relative_error(result, right)) > LINEAR:
                raise Refused(f"torch's side is wrong: relative error {error:.3g}")
        names = ("output", "gradient of the input", "gradient of the weight", "gradient of the bias")
        exact = self._in_float64(self.layer, slot, G)
        yield from zip(names[: len(ours)], ours, others, exact, strict=True)

    @torch.no_grad()
    def _in_float64(self, layer, slot, groups):
        (x, dy), weight = self.pool[slot], layer.weight.double()
        x, dy = (t.double().reshape(self.shape.N * groups, -1) for t in (x, dy))
        y = linear(x, weight, layer.bias.double()).reshape(self.shape.N, -1)
        return (y, (dy @ weight).reshape(self.shape.N, -1), dy.T @ x, dy.sum(0)) if self.backward else (y,)
