"""conv2d's bench: how ours and theirs are made for a case, what they cost, and their float64 result.

Letters as everywhere: N batch; C, H, W input channels, rows, columns; K output channels; R, S kernel; P, Q output rows,
columns; G groups.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import grad as derivative
from torch.nn.functional import conv2d

from dlkernels.bench import shapes
from dlkernels.bench.harness import Case

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DIRECTIONS = ("forward", "forward+backward")
POOL_BYTES = 256 << 20  # of inputs and output gradients: four of each where they fit, else two
EXACT_FLOPS = 3e8  # of a float64 result: a larger convolution is compared in some of its images and channels


@dataclass(frozen=True)
class Shape:
    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1

    @property
    def P(self) -> int:
        return (self.H + 2 * self.padding - self.dilation * (self.R - 1) - 1) // self.stride + 1

    @property
    def Q(self) -> int:
        return (self.W + 2 * self.padding - self.dilation * (self.S - 1) - 1) // self.stride + 1

    @property
    def input(self) -> tuple[int, int, int, int]:
        return self.N, self.C, self.H, self.W

    @property
    def output(self) -> tuple[int, int, int, int]:
        return self.N, self.K, self.P, self.Q

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Elements of the input, the weight and the output."""
        weight = self.K, self.C // self.groups, self.R, self.S
        return math.prod(self.input), math.prod(weight), math.prod(self.output)

    @property
    def name(self) -> str:
        channels = f"dw {self.C}" if self.groups == self.C > 1 else f"{self.C}->{self.K}"
        full = self.padding * 2 == self.dilation * (self.R - 1) == self.dilation * (self.S - 1)
        extra = [f"s{self.stride}"] * (self.stride > 1) + [f"d{self.dilation}"] * (self.dilation > 1)
        extra += [f"p{self.padding}"] * (not full) + [f"g{self.groups}"] * (1 < self.groups < self.C)
        size = f"{self.H}" if self.H == self.W else f"{self.H}x{self.W}"
        return " ".join([f"{self.N}x", channels, f"{self.R}x{self.S}", *extra, f"@{size}"])

    def flops(self, backward: bool) -> float:
        """2 N K P Q C/G R S for the forward; as much again for the input's and for the weight's gradient."""
        once = 2.0 * self.N * self.K * self.P * self.Q * (self.C // self.groups) * self.R * self.S
        return once * 3 if backward else once

    def bytes(self, backward: bool, bias: bool, itemsize: int) -> float:
        """Forward: X, W, b in, Y out. Backward: X, W, dY in, dX, dW, db out."""
        x, w, y = self.sizes
        b = bias * self.output[1]
        forward, after = x + w + y + b, 2 * x + 2 * w + y + b
        return itemsize * float(forward + after * backward)

    def slots(self, itemsize: int) -> int:
        """How many inputs the pool holds."""
        x, _, y = self.sizes
        return 4 if 4 * (x + y) * itemsize <= POOL_BYTES else 2

    def memory(self, itemsize: int) -> float:
        """Bytes that a forward+backward case holds: the pool, each side's kept results, and one call under way."""
        x, w, y = self.sizes
        return itemsize * (self.slots(itemsize) * (x + y) + 3 * (x + w + y))

    def job(self, *settings) -> "Conv2dJob":
        """What makes and calls both sides."""
        return Conv2dJob(self, *settings)


def cases(suite: str, device: str, dtype: torch.dtype) -> list[Case]:
    """The suite's rows: both memory formats, both directions, without and with bias (quick: as in the network)."""
    rows = []
    for line in shapes.select("conv2d", suite, device):
        shape = Shape(**{key: int(line[key]) for key in Shape.__dataclass_fields__})
        for bias in [line["bias"] == "yes"] if suite == "quick" else [False, True]:
            for layout in FORMATS:
                for direction in DIRECTIONS:
                    rows.append(make_case(line["list"], shape, layout, bias, direction, dtype, device))
    return rows


def make_case(list_, shape: Shape, layout, bias, direction, dtype, device="cpu") -> Case:
    backward = direction != "forward"
    return Case(
        list=list_,
        name=shape.name,
        variant=f"{layout}, bias" if bias else layout,
        direction=direction,
        dtype=dtype,
        flops=shape.flops(backward),
        bytes=shape.bytes(backward, bias, dtype.itemsize),
        build=lambda: shape.job(layout, bias, backward, dtype, device),
    )


class Conv2dJob:
    """dlkernels.Conv2d against torch.nn.Conv2d on the same parameters; a backward gives every gradient."""

    layer_name, operator = "Conv2d", "dlkernels::conv2d"
    ours_avoids: tuple[str, ...] = ("aten::convolution", "aten::convolution_backward")

    def __init__(self, shape: Shape, layout: str, bias: bool, backward: bool, dtype: torch.dtype, device: str):
        import dlkernels  # here, so that shapes and costs can be read without the native library

        s, self.shape, self.backward = shape, shape, backward
        self.ours_runs: tuple[str, ...] = (self.operator, f"{self.operator}_backward")[: 1 + backward]
        self.slots = s.slots(dtype.itemsize)
        how: dict[str, Any] = {"stride": s.stride, "padding": s.padding, "dilation": s.dilation, "groups": s.groups}
        arguments = {"kernel_size": (s.R, s.S), "bias": bias} | how
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            theirs, ours = getattr(torch.nn, self.layer_name), getattr(dlkernels, self.layer_name)
            self.torch_layer = theirs(s.input[1], s.output[1], **arguments).to(device, dtype)
            self.torch_layer.to(memory_format=FORMATS[layout])
            self.layer = ours(s.input[1], s.output[1], **arguments, device="meta", dtype=dtype)
            draw = [(torch.randn(s.input), torch.randn(s.output)) for _ in range(self.slots)]
        self.layer.weight, self.layer.bias = self.torch_layer.weight, self.torch_layer.bias
        pool = [[t.to(device, dtype).contiguous(memory_format=FORMATS[layout]) for t in pair] for pair in draw]
        self.pool = [(x.requires_grad_(backward), dy) for x, dy in pool]

    def ours(self, slot):
        return self._run(self.layer, slot)

    def theirs(self, slot):
        return self._run(self.torch_layer, slot)

    def _run(self, layer, slot):
        x, dy = self.pool[slot]
        y = layer(x)
        return (y, *torch.autograd.grad(y, (x, *layer.parameters()), dy)) if self.backward else (y,)

    def changed(self):
        if self.backward:
            torch.autograd.graph.increment_version(self.torch_layer.weight)

    @torch.no_grad()
    def exact(self, slot, ours, theirs):
        """Cuts the output in images and output channels, the input's gradient in images and input channels, the
        weight's gradient in both channels; a grouped convolution in whole groups. First and last are kept."""
        s, (x, dy), w = self.shape, self.pool[slot], self.torch_layer.weight
        how: dict[str, Any] = {"stride": s.stride, "padding": s.padding, "dilation": s.dilation}
        part = min(1.0, EXACT_FLOPS / s.flops(False))

        images, rest = self._images(part)
        c, k, g = self._channels(1.0, rest)
        weight = w[k] if s.groups > 1 else w[k][:, c]
        exact = conv2d(x[images][:, c].double(), weight.double(), **how, groups=g)
        if self.torch_layer.bias is not None:
            exact += self.torch_layer.bias[k].double()[:, None, None]
        yield "output", ours[0][images][:, k], theirs[0][images][:, k], exact
        if not self.backward:
            return

        c, k, g = self._channels(rest, 1.0)
        weight = w[k] if s.groups > 1 else w[k][:, c]
        size = (len(images), len(c), s.H, s.W)
        exact = derivative.conv2d_input(size, weight.double(), dy[images][:, k].double(), **how, groups=g)
        yield "gradient of the input", ours[1][images][:, c], theirs[1][images][:, c], exact

        c, k, g = self._channels(math.sqrt(part), math.sqrt(part)) if s.groups == 1 else self._channels(part, part)
        size = (len(k), len(c) // g, s.R, s.S)
        exact = derivative.conv2d_weight(x[:, c].double(), size, dy[:, k].double(), **how, groups=g)
        cut = [grad[k] if s.groups > 1 else grad[k][:, c] for grad in (ours[2], theirs[2])]
        yield "gradient of the weight", *cut, exact

        if self.torch_layer.bias is not None:
            yield "gradient of the bias", ours[3], theirs[3], dy.sum((0, 2, 3), dtype=torch.float64)

    def _images(self, part):
        """The images to look at for this part of the work, and the part of each image that keeps to it."""
        images = spread(self.shape.N, part)
        return images, min(1.0, part * self.shape.N / len(images))

    def _channels(self, part_in, part_out):
        """Input channels, output channels, groups."""
        s = self.shape
        if s.groups == 1:
            return spread(s.C, part_in), spread(s.K, part_out), 1
        groups = spread(s.groups, min(part_in, part_out))
        inside = [groups[:, None] * (size // s.groups) + torch.arange(size // s.groups) for size in (s.C, s.K)]
        return inside[0].flatten(), inside[1].flatten(), len(groups)


def spread(size, part):
    """Evenly spread indices below size, about this part of them, first and last among them."""
    return torch.linspace(0, size - 1, min(size, max(2, round(size * part)))).long()
