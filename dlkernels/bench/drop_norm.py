"""drop_norm's bench: how ours and torch's side are made for a case, what they cost, and what is compared with float64.

Letters as everywhere: N rows, M features, p the part of them that is dropped.

Torch's sides, by their names in a table:

    nn.Dropout+nn.LayerNorm   what DropNorm takes the place of
    reference                 DropNorm on the backend "reference"
    torch.compile             dlkernels.reference.drop_norm compiled by inductor, with dlkernels.drop_mask before it
    nn.LayerNorm              against DropNorm in evaluation, the same function
    torch.randperm            list `mask`: the mask alone, against the shortest way to draw one with torch

What is asserted. Every call draws a new mask, so two sides that drop cannot be compared with each other. Ours: exactly
int(p * M) features are 0 in every row; that is its mask, and with it the output and every gradient are compared with
float64 by the usual rule, torch's own error being that of torch's operators (the backend "torch") with the same mask.
The reference and its compiled form: the same for their own masks. nn.Dropout+nn.LayerNorm drops single elements: where
there are gradients, those it dropped are where the gradient of the input is 0, and the output and all gradients are
compared with float64 for that mask; without gradients every row of the output, weight and bias taken out, must have
mean 0 and variance 1, and the part that is kept is counted in one more call of the same nn.Dropout.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from dlkernels import reference
from dlkernels.bench import shapes
from dlkernels.bench.harness import Case, Refused
from dlkernels.testing import relative_error

DIRECTIONS = ("forward", "forward+backward")
POOL_BYTES = 256 << 20  # of inputs and output gradients: four of each where they fit, else two
EXACT_ELEMENTS = 1 << 21  # of an output and an input's gradient that are compared; and of a piece of float64 work
EPS = 1e-5
FLOPS_FORWARD = 8  # an element's: one in the mean, three in the variance, four in the result
FLOPS_BACKWARD = (
    13  # two for the normalised value, one for g, three in two sums, three for the parameters, four at last
)
COPY_ELEMENTS = 1 << 24  # rows of this size are held against the bandwidth of copy_
TINY_MS = 0.05  # rows that torch needs less for are judged by the difference, not by the ratio
SIGMAS = 6  # a kept part further than this from 1 - p is no accident
TORCH_SIDE = 2e-2  # relative error that torch's side may have: bfloat16 stays below, another function does not


@dataclass(frozen=True)
class Shape:
    N: int
    M: int
    p: float

    @property
    def dropped(self) -> int:
        return int(self.p * self.M)

    @property
    def name(self) -> str:
        return f"{self.N} x {self.M}"

    def flops(self, backward: bool) -> float:
        """Of the kept elements."""
        return float(self.N * (self.M - self.dropped) * (FLOPS_FORWARD + FLOPS_BACKWARD * backward))

    def bytes(self, backward: bool, itemsize: int) -> float:
        """Forward: X in, Y out, weight and bias. Backward: X and dY in, dX out, weight, dweight and dbias."""
        return itemsize * float((5 if backward else 2) * self.N * self.M + (5 if backward else 2) * self.M)


def cases(suite: str, device: str, dtype: torch.dtype) -> list[Case]:
    """The suite's rows: every size against its opponent, in both directions."""
    rows = []
    for line in shapes.select("drop_norm", suite, device):
        shape = Shape(int(line["N"]), int(line["M"]), float(line["p"]))
        if line["list"] == "mask":
            rows.append(make_mask_case(shape, dtype, device))
            continue
        for direction in DIRECTIONS:
            rows.append(make_case(line["list"], shape, line["against"], direction, dtype, device))
    return rows


def make_case(list_, shape: Shape, against: str, direction, dtype, device="cpu") -> Case:
    backward = direction != "forward"
    return Case(
        list=list_,
        name=shape.name,
        variant=f"{against}, p {shape.p:g}" if shape.p else against,
        direction=direction,
        dtype=dtype,
        flops=shape.flops(backward),
        bytes=shape.bytes(backward, dtype.itemsize),
        build=lambda: JOBS[against](shape, backward, dtype, device),
    )


def make_mask_case(shape: Shape, dtype, device="cpu") -> Case:
    return Case(
        list="mask",
        name=f"{shape.M}",
        variant=f"torch.randperm, p {shape.p:g}",
        direction="forward",
        dtype=dtype,
        flops=0.0,
        bytes=5.0 * shape.M,  # a key of four bytes in, a bool out
        build=lambda: MaskJob(shape, device),
    )


def notes(records: list[dict]) -> dict[str, str]:
    """What the summary cannot say: the part of the copy bandwidth at 2^24 elements, and the delay of tiny calls."""
    measured = [row for row in records if not row.get("reason") and row["list"] != "mask"]
    texts = {}
    for direction in DIRECTIONS:
        for mode, lists in (("training", ("dropout", "reference")), ("evaluation", ("eval",))):
            rows = [row for row in measured if row["list"] in lists and row["direction"] == direction]
            large = [row["roof_percent"] for row in rows if _elements(row) == COPY_ELEMENTS and row["roof"] == "copy"]
            if large:
                text = f"{sum(large) / len(large):.0f} % (least {min(large):.0f} %, {len(large)} rows)"
                texts[f"of copy bandwidth, N*M = 2^24, {mode}, {direction}"] = text
            late = [(row["ours_ms"] - row["torch_ms"]) * 1e3 for row in rows if row["torch_ms"] < TINY_MS]
            if late and mode == "evaluation":
                text = (
                    f"at most {max(late):+.1f} us against nn.LayerNorm ({len(late)} rows under {TINY_MS * 1e3:.0f} us)"
                )
                texts[f"tiny calls, {direction}"] = text
    return texts


def _elements(row):
    return math.prod(int(size) for size in row["shape"].split(" x "))


# ---- the two sides ----------------------------------------------------------------------------------


class Parameters(nn.Module):
    """weight and bias as they look in the middle of a training: neither ones nor zeros."""

    def __init__(self, M, dtype, device):
        super().__init__()
        self.weight = nn.Parameter((0.5 + torch.rand(M)).to(device, dtype))
        self.bias = nn.Parameter((torch.randn(M) / 4).to(device, dtype))


class DropNormJob:
    """dlkernels.DropNorm against one of torch's sides on the same parameters; a backward gives every gradient."""

    ours_avoids: tuple[str, ...] = ("aten::native_layer_norm", "aten::native_dropout", "aten::bernoulli_")

    def __init__(self, shape: Shape, backward: bool, dtype: torch.dtype, device: str):
        import dlkernels  # here, so that shapes and costs can be read without the native library

        self.shape, self.backward = shape, backward
        # drop_mask is missing here because the reference's side uses it, too
        self.ours_runs: tuple[str, ...] = ("dlkernels::drop_norm", "dlkernels::drop_norm_backward")[: 1 + backward]
        N, M = shape.N, shape.M
        self.slots = 4 if 8 * N * M * dtype.itemsize <= POOL_BYTES else 2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            parameters = Parameters(M, dtype, device)
            self.weight, self.bias = parameters.weight, parameters.bias
            self.layer = dlkernels.DropNorm(M, shape.p, eps=EPS, device="meta", dtype=dtype)
            self.layer.weight, self.layer.bias = self.weight, self.bias
            self.pool = []
            for _ in range(self.slots):
                x, dy = (torch.randn(N, M).to(device, dtype) for _ in "xy")
                self.pool.append((x.requires_grad_(backward), dy))
        self.torch_side = self.make_torch_side()

    def make_torch_side(self):
        """Torch's side as a function of the input."""
        raise NotImplementedError

    def ours(self, slot):
        return self._run(self.layer, slot)

    def theirs(self, slot):
        return self._run(self.torch_side, slot)

    def _run(self, layer, slot):
        x, dy = self.pool[slot]
        y = layer(x)
        return (y, *torch.autograd.grad(y, (x, self.weight, self.bias), dy)) if self.backward else (y,)

    def changed(self):
        pass  # nothing is packed from a vector

    def exact(self, slot, ours, theirs):
        """Compares evenly spread rows, first and last among them; the parameters' gradients are sums over all rows."""
        keep = read_mask(ours, self.shape, "our side")
        self.check_torch_side(slot, theirs)
        others = self.by_torch(slot, keep)
        rows, *exact = self.in_float64(slot, keep)
        names = ("output", "gradient of the input", "gradient of the weight", "gradient of the bias")
        for name, mine, other, right in zip(names, ours, others, exact, strict=False):
            whole = right.dim() == 1
            yield name, mine if whole else mine[rows], other if whole else other[rows], right

    def check_torch_side(self, slot, theirs):
        """Refuses when torch's side, a DropNorm itself, is not right for its own mask."""
        keep = read_mask(theirs, self.shape, "torch's side")
        rows, *exact = self.in_float64(slot, keep)
        check_torch_side(theirs, rows, exact)

    def by_torch(self, slot, keep):
        """The same function of the same mask by torch's operators: torch's own error."""
        import dlkernels

        with dlkernels.backend("torch"), torch.set_grad_enabled(self.backward):
            return self._run(lambda x: dlkernels.drop_norm(x, keep, self.weight, self.bias, EPS), slot)

    @torch.no_grad()
    def in_float64(self, slot, keep):
        """The rows that are looked at; their output, input's gradient; gradients of weight and bias over all rows.

        keep: (M), or (N, M) bool: then elements are dropped, and statistics are those of all elements.
        """
        x, dy = self.pool[slot]
        N, M = self.shape.N, self.shape.M
        function = drop_norm_in_float64 if keep.dim() == 1 else dropout_layer_norm_in_float64
        arguments = [self.weight.double(), self.bias.double(), self.shape.p]
        look = torch.linspace(0, N - 1, min(N, max(2, EXACT_ELEMENTS // M)), dtype=torch.float64).long().unique()
        masks = keep if keep.dim() == 1 else keep[look]
        y, grad_x, *_ = function(x[look].double(), dy[look].double(), masks, *arguments)
        if not self.backward:
            return look, y
        sums = [torch.zeros(M, dtype=torch.float64, device=x.device) for _ in range(2)]
        for piece in torch.arange(N).split(max(1, EXACT_ELEMENTS // M)):
            cut = slice(int(piece[0]), int(piece[-1]) + 1)
            masks = keep if keep.dim() == 1 else keep[cut]
            _, _, *some = function(x[cut].double(), dy[cut].double(), masks, *arguments)
            for total, part in zip(sums, some, strict=True):
                total += part
        return look, y, grad_x, *sums


class AgainstReference(DropNormJob):
    def make_torch_side(self):
        import dlkernels

        def side(x):
            with dlkernels.backend("reference"):
                return self.layer(x)

        return side


class AgainstCompiled(DropNormJob):
    """The mask is drawn outside, so that inductor sees one graph; compiling happens here and is not counted."""

    def make_torch_side(self):
        import dlkernels

        torch._dynamo.reset()  # it gives up on a function that it has compiled for eight shapes
        compiled = torch.compile(reference.drop_norm, fullgraph=True, dynamic=False)

        def side(x):
            keep = dlkernels.drop_mask(self.shape.M, self.shape.p, device=x.device)
            return compiled(x, keep, self.weight, self.bias, EPS)

        with torch.set_grad_enabled(self.backward):
            self._run(side, 0)
        return side


class AgainstDropoutAndLayerNorm(DropNormJob):
    def make_torch_side(self):
        self.dropout = nn.Dropout(self.shape.p)
        norm = nn.LayerNorm(self.shape.M, EPS, device="meta")
        norm.weight, norm.bias = self.weight, self.bias
        return nn.Sequential(self.dropout, norm)

    def check_torch_side(self, slot, theirs):
        p, x = self.shape.p, self.pool[slot][0].detach()
        if self.backward:
            kept = theirs[1] != 0
            rows, *exact = self.in_float64(slot, kept | (x == 0))
            check_torch_side(theirs, rows, exact)
        else:
            kept = (self.dropout(x) != 0) | (x == 0)
            check_rows_are_normalised(theirs[0], self.weight, self.bias)
        part, spread = kept.double().mean().item(), math.sqrt(p * (1 - p) / x.numel())
        if abs(part - (1 - p)) > SIGMAS * spread + 1 / x.numel():
            raise Refused(f"torch's side kept {part:.4f} of the elements, not {1 - p:g}")


class AgainstLayerNorm(DropNormJob):
    """Evaluation: the same function, so torch's side is compared directly."""

    def make_torch_side(self):
        self.layer.eval()
        norm = nn.LayerNorm(self.shape.M, EPS, device="meta").eval()
        norm.weight, norm.bias = self.weight, self.bias
        return norm

    def exact(self, slot, ours, theirs):
        rows, *exact = self.in_float64(slot, torch.ones(self.shape.M, dtype=torch.bool, device=ours[0].device))
        names = ("output", "gradient of the input", "gradient of the weight", "gradient of the bias")
        for name, mine, other, right in zip(names, ours, theirs, exact, strict=False):
            whole = right.dim() == 1
            yield name, mine if whole else mine[rows], other if whole else other[rows], right


JOBS: dict[str, type[DropNormJob]] = {
    "nn.Dropout+nn.LayerNorm": AgainstDropoutAndLayerNorm,
    "reference": AgainstReference,
    "torch.compile": AgainstCompiled,
    "nn.LayerNorm": AgainstLayerNorm,
}


class MaskJob:
    """dlkernels.drop_mask against torch.randperm and a comparison, which drops exactly as many."""

    ours_runs: tuple[str, ...] = ("dlkernels::drop_mask",)
    ours_avoids: tuple[str, ...] = ("aten::randperm",)
    slots = 2

    def __init__(self, shape: Shape, device: str):
        import dlkernels

        self.shape, self.device, self.draw = shape, device, dlkernels.drop_mask

    def ours(self, slot):
        return (self.draw(self.shape.M, self.shape.p, device=self.device),)

    def theirs(self, slot):
        return (torch.randperm(self.shape.M, device=self.device) >= self.shape.dropped,)

    def changed(self):
        pass

    def exact(self, slot, ours, theirs):
        """Nothing to compare with float64: a mask is right when it drops as many as it should."""
        for side, (mask,) in (("our", ours), ("torch's", theirs)):
            if mask.dtype != torch.bool or int((~mask).sum()) != self.shape.dropped:
                raise Refused(f"{side} mask drops {int((~mask).sum())} features, not {self.shape.dropped}")
        yield from ()


# ---- what is right ----------------------------------------------------------------------------------


def read_mask(outputs: tuple[Tensor, ...], shape: Shape, side: str) -> Tensor:
    """The features that are not 0 in every row; refuses unless exactly int(p * M) are."""
    keep = (outputs[0].detach() != 0).any(0)
    dropped = int((~keep).sum())
    if dropped != shape.dropped:
        raise Refused(f"parity: {side} drops {dropped} features in every row, not {shape.dropped}")
    return keep


def check_torch_side(theirs, rows, exact) -> None:
    """Refuses when an output or gradient of torch's side is far from float64: then it measured something else.

    Not the gradients of 16-bit parameters: torch adds up rows in 16 bits, and over 131072 of them loses a quarter.
    """
    for result, right in zip(theirs, exact, strict=True):
        if right.dim() == 1 and result.element_size() == 2:
            continue
        error = relative_error(result if right.dim() == 1 else result[rows], right)
        if error > TORCH_SIDE:
            raise Refused(f"torch's side is wrong: relative error {error:.3g}")


@torch.no_grad()
def check_rows_are_normalised(y, weight, bias) -> None:
    """Refuses when a row, weight and bias taken out, has not mean 0 and variance 1 (rows far above eps)."""
    rows = torch.linspace(0, len(y) - 1, min(len(y), max(2, EXACT_ELEMENTS // y.shape[1])), dtype=torch.float64).long()
    z = (y[rows].double() - bias.double()) / weight.double()
    mean, variance = z.mean(1).abs().max().item(), (z.var(1, unbiased=False) - 1).abs().max().item()
    if max(mean, variance) > TORCH_SIDE:
        raise Refused(f"torch's side has rows of mean {mean:.3g}, and variance {variance:.3g} away from 1")


def drop_norm_in_float64(x, dy, keep, weight, bias, p) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, and gradients of input, weight and bias, by the reference."""
    grads = reference.drop_norm_backward(dy, x, keep, weight, bias, EPS)
    return reference.drop_norm(x, keep, weight, bias, EPS), grads[0], grads[2], grads[3]


def dropout_layer_norm_in_float64(x, dy, kept, weight, bias, p) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same of layer_norm(x * kept / (1 - p)) for the elements kept (rows, M)."""
    factor = kept.double() / (1 - p)
    everything = torch.ones_like(weight, dtype=torch.bool)
    grads = reference.drop_norm_backward(dy, x * factor, everything, weight, bias, EPS)
    return layer_norm(x * factor, weight.shape, weight, bias, EPS), grads[0] * factor, grads[2], grads[3]
