"""conv_transpose2d's bench: conv2d's, with input and output having changed places.

Letters are those of the convolution it turns around: N batch; K, P, Q input channels, rows, columns; R, S kernel;
C, H, W output channels, rows, columns.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import conv2d, conv_transpose2d
from torch.nn.grad import conv2d_weight

from dlkernels.bench import shapes
from dlkernels.bench.conv2d import DIRECTIONS, EXACT_FLOPS, FORMATS, Conv2dJob, make_case, spread
from dlkernels.bench.conv2d import Shape as Conv2dShape
from dlkernels.bench.harness import Case


@dataclass(frozen=True)
class Shape(Conv2dShape):
    """One without groups and dilation, as decoders have them."""

    @classmethod
    def of(cls, N, K, P, Q, C, R, S, stride=1, padding=0) -> "Shape":
        H, W = (P - 1) * stride - 2 * padding + R, (Q - 1) * stride - 2 * padding + S
        return cls(N, C, H, W, K, R, S, stride, padding)

    @property
    def input(self) -> tuple[int, int, int, int]:
        return super().output

    @property
    def output(self) -> tuple[int, int, int, int]:
        return super().input

    @property
    def name(self) -> str:
        extra = [f"s{self.stride}"] * (self.stride > 1) + [f"p{self.padding}"] * (self.padding > 0)
        size = f"{self.P}" if self.P == self.Q else f"{self.P}x{self.Q}"
        return " ".join([f"{self.N}x", f"{self.K}->{self.C}", f"{self.R}x{self.S}", *extra, f"@{size}"])

    def job(self, *settings) -> "ConvTranspose2dJob":
        return ConvTranspose2dJob(self, *settings)


def cases(suite: str, device: str, dtype: torch.dtype) -> list[Case]:
    """The suite's rows: both memory formats, both directions, with bias as in the network."""
    rows = []
    for line in shapes.select("conv_transpose2d", suite, device):
        numbers = ("N", "K", "P", "Q", "C", "R", "S", "stride", "padding")
        shape = Shape.of(**{key: int(line[key]) for key in numbers})
        for layout in FORMATS:
            for direction in DIRECTIONS:
                rows.append(make_case(line["list"], shape, layout, line["bias"] == "yes", direction, dtype, device))
    return rows


class ConvTranspose2dJob(Conv2dJob):
    """dlkernels.ConvTranspose2d against torch.nn's on the same parameters; a backward gives every gradient."""

    layer_name, operator = "ConvTranspose2d", "dlkernels::conv_transpose2d"

    @torch.no_grad()
    def exact(self, slot, ours, theirs):
        """Cuts the output in images and output channels, the input's gradient in images and input channels, the
        weight's gradient in both channels. First and last are kept."""
        s, (x, dy), w = self.shape, self.pool[slot], self.torch_layer.weight
        how: dict[str, Any] = {"stride": s.stride, "padding": s.padding}
        part = min(1.0, EXACT_FLOPS / s.flops(False))
        images, rest = self._images(part)

        c = spread(s.C, rest)
        exact = conv_transpose2d(x[images].double(), w[:, c].double(), **how)
        if self.torch_layer.bias is not None:
            exact += self.torch_layer.bias[c].double()[:, None, None]
        yield "output", ours[0][images][:, c], theirs[0][images][:, c], exact
        if not self.backward:
            return

        k = spread(s.K, rest)
        exact = conv2d(dy[images].double(), w[k].double(), **how)
        yield "gradient of the input", ours[1][images][:, k], theirs[1][images][:, k], exact

        k, c = spread(s.K, math.sqrt(part)), spread(s.C, math.sqrt(part))
        exact = conv2d_weight(dy[:, c].double(), (len(k), len(c), s.R, s.S), x[:, k].double(), **how)
        yield "gradient of the weight", ours[2][k][:, c], theirs[2][k][:, c], exact

        if self.torch_layer.bias is not None:
            yield "gradient of the bias", ours[3], theirs[3], dy.sum((0, 2, 3), dtype=torch.float64)
