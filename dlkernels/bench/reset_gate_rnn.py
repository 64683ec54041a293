"""reset_gate_rnn's bench: how ours and torch's side are made for a case, what they cost, what is compared with float64.

Letters as everywhere: T time steps, B sequences, I input features, H hidden features; one layer, one direction.

Torch's sides, by their names in a table, with the arithmetic they do for one operation of ours:

    nn.GRU          1.5: three gates, not two. With its update gate held at 0 it is our form "after".
    nn.GRU packed   1.5: the same on a PackedSequence; lengths are spread evenly from T/4 to T
    Python loop     1: our function on the backend "torch", F.linear for all of the input at once and a loop
    nn.RNN          0.5: one gate, tanh; another function

What is asserted. Output and all gradients against float64 by the usual rule. nn.GRU's gradients are compared without
the update gate's. nn.RNN computes another function: there torch's own error is that of the backend "torch", and nn.RNN
has to agree with itself in float64.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from dlkernels.bench import shapes
from dlkernels.bench.harness import Case, Refused
from dlkernels.testing import relative_error

DIRECTIONS = ("forward", "forward+backward")
POOL_BYTES = 256 << 20  # of inputs and output gradients: four of each where they fit, else two
TORCH_SIDE = 2e-2  # relative error that nn.RNN may have: bfloat16 stays below, another function does not
ARITHMETIC = {"nn.GRU": 1.5, "nn.GRU packed": 1.5, "Python loop": 1.0, "nn.RNN": 0.5}  # torch's, ours being 1


@dataclass(frozen=True)
class Shape:
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    packed: bool = False

    @property
    def name(self) -> str:
        return f"T {self.T} B {self.B} I {self.I} H {self.H}"

    @property
    def lengths(self) -> list[int]:
        """Of the sequences, the longest first; all are T where they are not packed."""
        if not self.packed or self.B == 1:
            return [self.T] * self.B
        shortest = max(1, self.T // 4)
        return [self.T - (self.T - shortest) * b // (self.B - 1) for b in range(self.B)]

    @property
    def rows(self) -> int:
        return sum(self.lengths)

    def flops(self, backward: bool) -> float:
        """Of the products: x and h with two gates' weights; the backward has two products for each of them."""
        return 4.0 * self.rows * self.H * (self.I + self.H) * (3 if backward else 1)

    def bytes(self, backward: bool, itemsize: int) -> float:
        """Forward: x, output and weights. Backward: x, output, dy in, dx out, weights and their gradients."""
        rows, weights = self.rows * (self.I + self.H), 2 * self.H * (self.I + self.H + 2)
        return itemsize * float(rows + weights + (2 * rows + 2 * weights if backward else 0))


def cases(suite: str, device: str, dtype: torch.dtype) -> list[Case]:
    """The suite's rows: every size against its opponent, in both directions."""
    rows = []
    for line in shapes.select("reset_gate_rnn", suite, device):
        T, B, H = (int(line[name]) for name in "TBH")
        shape = Shape(T, B, H if line["I"] == "H" else int(line["I"]), H, line["against"].endswith("packed"))
        for direction in DIRECTIONS:
            rows.append(make_case(line["list"], shape, line["against"], line["reset"], direction, dtype, device))
    return rows


def make_case(list_, shape: Shape, against: str, reset: str, direction, dtype, device="cpu") -> Case:
    backward = direction != "forward"
    return Case(
        list=list_,
        name=shape.name,
        variant=f"{against}, {ARITHMETIC[against]:g}x ours, {reset}",
        direction=direction,
        dtype=dtype,
        flops=shape.flops(backward),
        bytes=shape.bytes(backward, dtype.itemsize),
        build=lambda: JOBS[against](shape, reset, backward, dtype, device),
        steps=shape.T,
    )


def notes(records: list[dict]) -> dict[str, str]:
    """What the summary cannot say: the ratio with torch's arithmetic taken out, and the time of a step."""
    texts = {}
    groups: dict[tuple, list[dict]] = {}
    for row in records:
        if not row.get("reason"):
            groups.setdefault((row["list"], row["variant"].split(",")[0], row["direction"]), []).append(row)
    for (list_, against, direction), rows in groups.items():
        log_ratios = torch.tensor([row["ratio"] for row in rows], dtype=torch.float64).log()
        per_flop = log_ratios.mean().exp().item() / ARITHMETIC[against]
        steps = [row["ours_us_per_step"] for row in rows]
        gflops = [row["ours_gflops"] for row in rows]
        texts[f"{list_}, {against}, {direction}"] = (
            f"{per_flop:.2f} per operation ({against} does {ARITHMETIC[against]:g} for each of ours); "
            f"{min(steps):.2f} to {max(steps):.0f} us/step, {min(gflops):.0f} to {max(gflops):.0f} GFLOP/s"
        )
    return texts


# ---- the two sides ----------------------------------------------------------------------------------


class RnnJob:
    """dlkernels.ResetGateRNN against one of torch's sides; a backward gives every gradient."""

    ours_avoids: tuple[str, ...] = ("aten::gru", "aten::rnn_tanh", "aten::linear", "aten::addmm", "aten::mm")

    def __init__(self, shape: Shape, reset: str, backward: bool, dtype: torch.dtype, device: str):
        import dlkernels  # here, so that shapes and costs can be read without the native library

        self.shape, self.backward = shape, backward
        self.ours_runs: tuple[str, ...] = ("dlkernels::reset_gate_rnn", "dlkernels::reset_gate_rnn_backward")[
            : 1 + backward
        ]
        T, B, I, H = shape.T, shape.B, shape.I, shape.H  # noqa: E741
        self.slots = 4 if 4 * T * B * (I + H) * dtype.itemsize <= POOL_BYTES else 2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer = dlkernels.ResetGateRNN(I, H, reset=reset).to(device, dtype)
            self.torch_side = self.make_torch_side().to(device, dtype)
            self.pool = [self._draw(dtype, device) for _ in range(self.slots)]

    def _draw(self, dtype, device):
        """input, what gradients are taken of, and the gradient of the output."""
        shape = self.shape
        x = torch.randn(shape.T, shape.B, shape.I).to(device, dtype)
        if not shape.packed:
            x.requires_grad_(self.backward)
            return x, x, torch.randn(shape.T, shape.B, shape.H).to(device, dtype)
        packed = pack_padded_sequence(x, torch.tensor(shape.lengths))
        leaf = packed.data.detach().requires_grad_(self.backward)
        return packed._replace(data=leaf), leaf, torch.randn(shape.rows, shape.H).to(device, dtype)

    def make_torch_side(self) -> nn.Module:
        raise NotImplementedError

    def ours(self, slot):
        return self._run(self.layer, self.pool[slot])

    def theirs(self, slot):
        return self._run(self.torch_side, self.pool[slot])

    def _run(self, layer, inputs):
        input, leaf, grad = inputs
        output, h_n = layer(input)
        output = output.data if isinstance(output, PackedSequence) else output
        if not self.backward:
            return output, h_n
        return output, h_n, *torch.autograd.grad(output, (leaf, *layer.parameters()), grad)

    def changed(self):
        if self.backward:
            torch.autograd.graph.increment_version([*self.layer.parameters(), *self.torch_side.parameters()])

    def exact(self, slot, ours, theirs):
        yield from zip(NAMES, ours, self.comparable(theirs), self.in_float64(slot, self.layer), strict=False)

    def comparable(self, theirs):
        """Torch's results as ours have them."""
        return theirs

    def in_float64(self, slot, layer):
        """The same call in float64 by torch's operators."""
        import dlkernels

        input, leaf, grad = self.pool[slot]
        wide = leaf.detach().double().requires_grad_(self.backward)
        wide_input = input._replace(data=wide) if isinstance(input, PackedSequence) else wide
        with dlkernels.backend("torch"):
            return self._run(copy.deepcopy(layer).double(), (wide_input, wide, grad.double()))


NAMES = (
    "output",
    "h_n",
    "gradient of the input",
    *(f"gradient of {w}_{s}" for w in ("weight", "bias") for s in ("ih", "hh")),
)


class AgainstGRU(RnnJob):
    def make_torch_side(self):
        gru = nn.GRU(self.shape.I, self.shape.H)
        with torch.no_grad():
            for (name, theirs), ours in zip(gru.named_parameters(), self.layer.parameters(), strict=True):
                r, z, n = theirs.chunk(3)
                r.copy_(ours.chunk(2)[0])
                n.copy_(ours.chunk(2)[1])
                z.fill_(-1e9 if name.startswith("bias_ih") else 0.0)
        return gru

    def comparable(self, theirs):
        """Without the update gate's gradients."""
        H = self.shape.H
        return *theirs[:3], *(torch.cat([g[:H], g[2 * H :]]) for g in theirs[3:])


class AgainstLoop(RnnJob):
    def make_torch_side(self):
        import dlkernels

        class Loop(nn.Module):
            def __init__(self, layer):
                super().__init__()
                self.layer = layer

            def forward(self, x):
                with dlkernels.backend("torch"):
                    return self.layer(x)

        return Loop(self.layer)


class AgainstRNN(RnnJob):
    def make_torch_side(self):
        return nn.RNN(self.shape.I, self.shape.H)

    def exact(self, slot, ours, theirs):
        import dlkernels

        for name, result, right in zip(NAMES, theirs, self.in_float64(slot, self.torch_side), strict=False):
            error = relative_error(result, right)
            if error > TORCH_SIDE:
                raise Refused(f"torch's side is wrong: relative error {error:.3g} of {name}")
        with dlkernels.backend("torch"):
            own = self._run(self.layer, self.pool[slot])
        yield from zip(NAMES, ours, own, self.in_float64(slot, self.layer), strict=False)


JOBS: dict[str, type[RnnJob]] = {
    "nn.GRU": AgainstGRU,
    "nn.GRU packed": AgainstGRU,
    "Python loop": AgainstLoop,
    "nn.RNN": AgainstRNN,
}
