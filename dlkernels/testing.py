"""What "right" means, in one place: devices, dtypes, tolerances and cases, for tests, benchmarks and `dlkernels check`.

The rule: against a float64 result on the very same (already rounded) inputs, our error may be at most a small factor
times the error that torch makes in the same dtype, plus a floor for the cases where torch happens to be exact.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def devices() -> list:
    """Names of the devices of this machine that kernels can run on: "cpu", and "cuda" when there is one."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


# ---- memory layouts -------------------------------------------------------------------------------


def sliced(t):
    """The values of t (any shape) at an offset, and every second one along the last dimension of a larger tensor."""
    big = t.new_full((*(n + 3 for n in t.shape[:-1]), 2 * t.shape[-1] + 3), 1)
    view = big[(*(slice(2, 2 + n) for n in t.shape[:-1]), slice(1, 1 + 2 * t.shape[-1], 2))]
    return view.copy_(t)


# Ways for a tensor to lie in memory, each a function of a tensor. Expanded ones repeat some of its values.
VIEWS = {
    "sliced": sliced,
    "row_of_a_wider_one": lambda t: torch.cat([t, t, t], -1)[..., 1 : 1 + t.shape[-1]],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded_last": lambda t: t[..., :1].expand_as(t),
    "expanded_first": lambda t: t[:1].expand_as(t),
    "expanded_scalar": lambda t: t.flatten()[0].expand_as(t),
    "every_third": lambda t: torch.stack([t, t, t], -1)[..., 1],
}


# ---- tolerances -----------------------------------------------------------------------------------


class Tolerance(NamedTuple):
    factor: float  # times torch's own error, for outputs
    gradient_factor: float  # times torch's own error, for gradients
    floor: float  # relative Frobenius norm that is always allowed


TOLERANCES = {
    # The yardstick itself is float64, so torch's own error may come out as 0: a few tens of roundings of 1.1e-16.
    torch.float64: Tolerance(2.0, 3.0, 5e-15),
    # Two sums of the same numbers in another order differ by a factor of about sqrt(2); gradients sum over more terms
    # (weight: every pixel of the batch). The floor is three roundings of 6e-8, for sums too short for statistics.
    torch.float32: Tolerance(2.0, 3.0, 2e-7),
    # Sums are in float32, so nearly all of the error is the one rounding at the end (at most 3.9e-3), the same for
    # both. A quarter of that rounding is the floor: in a tensor of few elements torch may be lucky.
    torch.bfloat16: Tolerance(2.0, 3.0, 1e-3),
    # As bfloat16, with a rounding of 4.9e-4.
    torch.float16: Tolerance(2.0, 3.0, 1.2e-4),
}


def relative_error(a, exact) -> float:
    """Relative Frobenius norm ||a - exact|| / ||exact||, in float64; ||a|| where exact is 0; inf for NaN."""
    a, exact = a.detach().cpu().double(), exact.detach().cpu().double()
    size = torch.linalg.vector_norm(exact).item()
    error = torch.linalg.vector_norm(a - exact).item() / (size or 1.0)
    return math.inf if math.isnan(error) else error


def compare(ours, theirs, exact, dtype, gradient=False, name="output") -> None:
    """Asserts that `ours` is as close to `exact` (float64) as `theirs`, torch's own result, allows for this dtype.

    Args:
        ours, theirs: results in `dtype`, of the same shape.
        exact: float64 result for the same inputs.
        gradient: whether this is a gradient, which TOLERANCES allows a larger factor.
        name: of the tensor, for the message.

    Raises:
        AssertionError: another shape or dtype; NaN or infinity in other places or of another kind than `exact` rounded
            to `dtype`; an error above the bound. The message names the tensor, both errors and the bound.
    """
    for who, tensor, expected in (("ours", ours, dtype), ("theirs", theirs, dtype), ("exact", exact, torch.float64)):
        assert tensor.dtype == expected, f"{name}: {who} is {tensor.dtype}, expected {expected}"
        assert tensor.shape == exact.shape, f"{name}: {who} has shape {list(tensor.shape)}, not {list(exact.shape)}"
    ours, theirs, exact = (tensor.detach().cpu() for tensor in (ours, theirs, exact))
    _check_non_finite(ours, exact.to(dtype), name)
    finite = exact.to(dtype).isfinite()
    usable = finite & theirs.isfinite()
    error = relative_error(ours[finite], exact[finite])
    torch_error = relative_error(theirs[usable], exact[usable])
    tolerance = TOLERANCES[dtype]
    factor = tolerance.gradient_factor if gradient else tolerance.factor
    bound = factor * torch_error + tolerance.floor
    assert error <= bound, (
        f"{name}: relative error {error:.3g} in {dtype} is above {bound:.3g} "
        f"({factor:g} x torch's own {torch_error:.3g} + {tolerance.floor:g})"
    )


def _check_non_finite(ours, exact, name):
    for kind, is_kind in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = is_kind(ours) != is_kind(exact)
        assert not wrong.any(), (
            f"{name}: {int(wrong.sum())} elements are {kind} in one result only, first at {wrong.nonzero()[0].tolist()}"
        )


# ---- cases ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conv2dCase:
    """One convolution: the shape of its input and weight, and its arguments."""

    name: str
    input: tuple  # N, C, H, W
    weight: tuple  # K, C/G, R, S
    stride: int | tuple = 1
    padding: int | tuple | str = 0
    dilation: int | tuple = 1
    groups: int = 1
    bias: bool = True

    @property
    def arguments(self) -> dict:
        """Everything after the tensors, as conv2d takes it."""
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    def make_inputs(
        self, dtype, device="cpu", memory_format=torch.contiguous_format, generator=None, integers=False
    ) -> tuple:
        """Random (input, weight, bias or None); the same numbers on every device.

        With `integers`, all numbers lie in -2..2: every sum of products is exact, so only one result is right.
        """

        def draw(*shape, scale=1.0):
            if integers:
                return torch.randint(-2, 3, shape, generator=generator).to(device, dtype)
            return (torch.randn(shape, dtype=torch.float64, generator=generator) * scale).to(device, dtype)

        input = draw(*self.input).contiguous(memory_format=memory_format)
        weight = draw(*self.weight, scale=self.fan_in**-0.5).contiguous(memory_format=memory_format)
        return input, weight, draw(self.output_channels) if self.bias else None

    @property
    def output_channels(self) -> int:
        return self.weight[0]

    @property
    def fan_in(self) -> int:
        """Products that an output pixel sums."""
        return math.prod(self.weight[1:])


@dataclass(frozen=True)
class ConvTranspose2dCase(Conv2dCase):
    """One transposed convolution: input is (N, K, P, Q), weight (K, C/G, R, S), output (N, C, H, W)."""

    output_padding: int | tuple = 0

    @property
    def arguments(self) -> dict:
        return super().arguments | {"output_padding": self.output_padding}

    @property
    def output_channels(self) -> int:
        return self.weight[1] * self.groups

    @property
    def fan_in(self) -> int:
        """Products that an output pixel sums where the stride is 1."""
        return self.weight[0] // self.groups * math.prod(self.weight[2:])


# Small, and every one for a reason: each proves that something is not mixed up, skipped or assumed.
_CONV2D_CASES = (
    # the everyday layers
    Conv2dCase("3x3", (2, 8, 9, 11), (8, 8, 3, 3), padding=1),
    Conv2dCase("3x3_no_padding_no_bias", (2, 8, 9, 11), (8, 8, 3, 3), bias=False),
    Conv2dCase("3x3_stride_2", (2, 8, 12, 12), (16, 8, 3, 3), stride=2, padding=1),
    Conv2dCase("7x7_stride_2_stem", (1, 3, 32, 32), (16, 3, 7, 7), stride=2, padding=3, bias=False),
    Conv2dCase("1x1", (2, 16, 7, 7), (32, 16, 1, 1)),
    Conv2dCase("1x1_stride_2", (2, 16, 8, 8), (32, 16, 1, 1), stride=2, bias=False),
    Conv2dCase("1x1_padding", (2, 5, 4, 4), (3, 5, 1, 1), padding=1),
    Conv2dCase("5x5", (1, 6, 14, 14), (16, 6, 5, 5), padding=2),
    Conv2dCase("64_channels", (1, 64, 14, 14), (64, 64, 3, 3), padding=1),
    Conv2dCase("one_image_one_channel", (1, 1, 28, 28), (8, 1, 5, 5)),
    Conv2dCase("one_output_channel", (2, 9, 8, 8), (1, 9, 3, 3), padding=1),
    # rows and columns must not be swapped
    Conv2dCase("asymmetric_kernel", (2, 3, 9, 14), (5, 3, 2, 5)),
    Conv2dCase("asymmetric_stride", (2, 3, 13, 9), (5, 3, 3, 3), stride=(3, 1)),
    Conv2dCase("asymmetric_padding", (2, 3, 6, 8), (5, 3, 3, 3), padding=(0, 2)),
    Conv2dCase("asymmetric_dilation", (2, 3, 12, 9), (5, 3, 3, 3), dilation=(3, 1)),
    Conv2dCase(
        "asymmetric_all", (2, 4, 17, 13), (6, 2, 3, 2), stride=(2, 3), padding=(3, 1), dilation=(2, 4), groups=2
    ),
    Conv2dCase("row_kernel", (2, 4, 6, 19), (4, 4, 1, 7), padding=(0, 3)),
    Conv2dCase("column_kernel", (2, 4, 19, 6), (4, 4, 7, 1), padding=(3, 0)),
    # groups
    Conv2dCase("groups_2", (2, 6, 8, 8), (10, 3, 3, 3), padding=1, groups=2),
    Conv2dCase("groups_odd", (2, 15, 7, 7), (9, 5, 3, 3), padding=1, groups=3),
    Conv2dCase("groups_1x1", (2, 12, 5, 5), (8, 3, 1, 1), groups=4),
    Conv2dCase("depthwise", (2, 19, 9, 10), (19, 1, 3, 3), padding=1, groups=19),
    Conv2dCase("depthwise_stride_2", (2, 16, 11, 11), (16, 1, 3, 3), stride=2, padding=1, groups=16, bias=False),
    Conv2dCase("depthwise_5x5_dilated", (1, 8, 15, 13), (8, 1, 5, 5), padding=4, dilation=2, groups=8),
    Conv2dCase("depthwise_multiplier_3", (2, 5, 8, 8), (15, 1, 3, 3), padding=1, groups=5),
    # padding="same" and "valid"
    Conv2dCase("same_odd", (2, 3, 7, 9), (4, 3, 3, 5), padding="same"),
    Conv2dCase("same_even", (2, 3, 7, 9), (4, 3, 2, 4), padding="same"),
    Conv2dCase("same_even_dilated", (2, 3, 9, 8), (4, 3, 4, 2), padding="same", dilation=(1, 3)),
    Conv2dCase("valid", (2, 3, 7, 9), (4, 3, 3, 2), padding="valid"),
    # sizes that leave tails in every vector width
    Conv2dCase("17_to_23_channels", (3, 17, 10, 11), (23, 17, 3, 3), padding=1),
    Conv2dCase("67x43_map", (1, 5, 67, 43), (7, 5, 3, 3), padding=1),
    Conv2dCase("33_to_65_channels_1x1", (1, 33, 5, 7), (65, 33, 1, 1)),
    Conv2dCase("width_1", (2, 4, 11, 1), (4, 4, 3, 3), padding=1),
    # the edges of what is allowed
    Conv2dCase("kernel_is_the_input", (2, 3, 6, 5), (8, 3, 6, 5)),
    Conv2dCase("one_output_pixel", (2, 8, 3, 3), (12, 8, 3, 3), stride=2),
    Conv2dCase("one_pixel_input", (2, 4, 1, 1), (6, 4, 3, 3), padding=1),
    Conv2dCase("stride_larger_than_kernel", (2, 3, 14, 15), (4, 3, 2, 2), stride=(5, 4)),
    Conv2dCase("stride_skips_the_end", (2, 3, 8, 9), (4, 3, 3, 3), stride=4),
    Conv2dCase("padding_larger_than_kernel", (2, 3, 4, 4), (4, 3, 2, 3), padding=(4, 5)),
    Conv2dCase("dilation_larger_than_input", (2, 3, 5, 5), (4, 3, 3, 3), padding=6, dilation=6),
    Conv2dCase("empty_batch", (0, 3, 8, 8), (4, 3, 3, 3), padding=1),
)


def conv2d_cases() -> tuple:
    """The convolutions that tests, benchmarks and `dlkernels check` go through."""
    return _CONV2D_CASES


_CONV_TRANSPOSE2D_CASES = (
    # the everyday layers of decoders
    ConvTranspose2dCase("4x4_stride_2", (2, 16, 5, 7), (16, 8, 4, 4), stride=2, padding=1),
    ConvTranspose2dCase("4x4_stride_2_to_image", (2, 32, 9, 8), (32, 3, 4, 4), stride=2, padding=1),
    ConvTranspose2dCase("2x2_stride_2", (2, 16, 7, 7), (16, 8, 2, 2), stride=2),
    ConvTranspose2dCase("3x3_stride_2", (2, 8, 6, 6), (8, 12, 3, 3), stride=2, padding=1, output_padding=1),
    ConvTranspose2dCase("3x3_no_bias", (2, 8, 9, 11), (8, 8, 3, 3), padding=1, bias=False),
    ConvTranspose2dCase("from_one_pixel", (2, 20, 1, 1), (20, 16, 4, 4), bias=False),
    ConvTranspose2dCase("1x1", (2, 16, 7, 7), (16, 32, 1, 1)),
    ConvTranspose2dCase("64_channels", (1, 64, 14, 14), (64, 64, 3, 3), padding=1),
    # groups
    ConvTranspose2dCase("groups_2", (2, 8, 7, 7), (8, 6, 3, 3), padding=1, groups=2),
    ConvTranspose2dCase("groups_odd", (2, 9, 6, 7), (9, 5, 3, 3), stride=2, groups=3),
    ConvTranspose2dCase("depthwise", (2, 16, 9, 9), (16, 1, 3, 3), padding=1, groups=16),
    ConvTranspose2dCase("depthwise_stride_2", (2, 8, 6, 6), (8, 1, 4, 4), stride=2, padding=1, groups=8),
    ConvTranspose2dCase("depthwise_multiplier_3", (2, 4, 5, 6), (4, 3, 3, 3), groups=4),
    # rows and columns each with their own numbers
    ConvTranspose2dCase(
        "asymmetric_all", (2, 6, 7, 8), (6, 2, 3, 2), (2, 3), (1, 2), (3, 1), groups=2, output_padding=(0, 2)
    ),
    ConvTranspose2dCase("dilation", (2, 4, 7, 6), (4, 6, 3, 3), dilation=2, padding=2),
    # output_padding as far as it goes: rows and columns that no input pixel reaches
    ConvTranspose2dCase("output_padding_below_stride", (2, 4, 4, 5), (4, 3, 2, 2), stride=4, output_padding=3),
    ConvTranspose2dCase("output_padding_below_dilation", (2, 4, 5, 6), (4, 3, 3, 3), dilation=3, output_padding=2),
    ConvTranspose2dCase("1x1_output_padding", (2, 16, 6, 7), (16, 8, 1, 1), dilation=2, output_padding=1),
    ConvTranspose2dCase("3x3_output_padding", (2, 16, 8, 8), (16, 16, 3, 3), padding=2, dilation=2, output_padding=1),
    ConvTranspose2dCase("depthwise_output_padding", (2, 8, 6, 7), (8, 1, 3, 3), dilation=2, groups=8, output_padding=1),
    # sizes that leave tails in every vector width
    ConvTranspose2dCase("17_to_23_channels", (3, 17, 10, 11), (17, 23, 3, 3), stride=2, padding=1),
    ConvTranspose2dCase("67x43_map", (1, 5, 67, 43), (5, 7, 3, 3), padding=1),
    ConvTranspose2dCase("33_to_65_channels_1x1", (1, 33, 5, 7), (33, 65, 1, 1)),
    ConvTranspose2dCase("width_1", (2, 4, 11, 1), (4, 4, 3, 3), padding=1),
    # the edges of what is allowed
    ConvTranspose2dCase("1x1_stride_2", (2, 8, 5, 6), (8, 4, 1, 1), stride=2),
    ConvTranspose2dCase("stride_larger_than_kernel", (2, 3, 4, 5), (3, 4, 2, 2), stride=(5, 4)),
    ConvTranspose2dCase("padding_leaves_one_pixel", (2, 4, 5, 5), (4, 6, 3, 3), padding=3),
    ConvTranspose2dCase("padding_larger_than_kernel", (2, 3, 9, 9), (3, 4, 2, 3), padding=(4, 3)),
    ConvTranspose2dCase("dilation_larger_than_input", (2, 3, 4, 4), (3, 4, 3, 3), padding=6, dilation=6),
    ConvTranspose2dCase("empty_batch", (0, 4, 8, 8), (4, 3, 3, 3), padding=1),
)


def conv_transpose2d_cases() -> tuple:
    """The transposed convolutions that tests, benchmarks and `dlkernels check` go through."""
    return _CONV_TRANSPOSE2D_CASES


@dataclass(frozen=True)
class DropNormCase:
    """One DropNorm: the rows and features of its input, how many features are dropped, and its arguments."""

    name: str
    rows: tuple  # leading dimensions, N together
    features: tuple  # trailing dimensions, M together
    dropped: int | None = None  # features; None: no mask
    weight: bool = True
    bias: bool = True
    eps: float = 1e-5
    rescale: bool = True

    @property
    def arguments(self) -> dict:
        """Everything after the tensors, as drop_norm takes it."""
        return {"eps": self.eps, "rescale": self.rescale}

    @property
    def kept(self) -> int:
        """How many features are kept."""
        return math.prod(self.features) - (self.dropped or 0)

    def make_inputs(self, dtype, device="cpu", generator=None, parameter_dtype=None) -> tuple:
        """Random (input, keep or None, weight or None, bias or None); the same numbers on every device.

        weight and bias are in `parameter_dtype`, by default the input's.
        """

        def draw(shape, dtype):
            return torch.randn(shape, dtype=torch.float64, generator=generator).to(device, dtype)

        parameter_dtype = parameter_dtype or dtype
        input = 2 * draw((*self.rows, *self.features), dtype) + 1
        keep = None
        if self.dropped is not None:
            order = torch.randperm(math.prod(self.features), generator=generator)
            keep = (order >= self.dropped).reshape(self.features).to(device)
        weight = 1 + draw(self.features, parameter_dtype) / 2 if self.weight else None
        return input, keep, weight, draw(self.features, parameter_dtype) if self.bias else None


# As above, every one for a reason. Narrow features come with many rows: the error of a few numbers is luck.
_DROP_NORM_CASES = (
    # the everyday layers, and everything that may be left out
    DropNormCase("half_dropped", (4, 7), (64,), 32),
    DropNormCase("tenth_dropped", (4, 7), (64,), 6),
    DropNormCase("no_rescale", (4, 7), (64,), 32, rescale=False),
    DropNormCase("no_mask", (4, 7), (64,)),
    DropNormCase("no_weight", (4, 7), (64,), 20, weight=False),
    DropNormCase("no_bias", (4, 7), (64,), 20, bias=False),
    DropNormCase("mask_only", (4, 7), (64,), 20, weight=False, bias=False),
    DropNormCase("weight_only", (4, 7), (64,), bias=False),
    DropNormCase("bias_only", (4, 7), (64,), weight=False),
    DropNormCase("input_only", (4, 7), (64,), weight=False, bias=False),
    DropNormCase("large_eps", (4, 7), (64,), 20, eps=0.5),
    DropNormCase("no_eps", (4, 7), (64,), 20, eps=0.0),
    # any number of dimensions on either side
    DropNormCase("no_leading_dimension", (), (40,), 13),
    DropNormCase("four_leading_dimensions", (2, 3, 1, 2), (40,), 13),
    DropNormCase("two_feature_dimensions", (5,), (6, 11), 30),
    DropNormCase("three_feature_dimensions", (2, 4), (3, 1, 17), 25),
    DropNormCase("all_dimensions", (), (4, 3, 10), 55),
    # the edges of what may be dropped
    DropNormCase("none_dropped", (9,), (37,), 0),
    DropNormCase("one_dropped", (9,), (37,), 1),
    DropNormCase("two_kept", (300,), (37,), 35, eps=0.1),
    DropNormCase("one_kept", (9,), (37,), 36),
    DropNormCase("none_kept", (9,), (37,), 37),
    # features that leave tails in every vector width
    *(
        DropNormCase(f"width_{M}", (1 + min(600 // M, 99),), (M,), M // 3, eps=0.1)
        for M in (1, 2, 3, 7, 8, 15, 16, 17, 31)
    ),
    *(DropNormCase(f"width_{M}", (1 + 2000 // M,), (M,), M // 3) for M in (33, 63, 65, 100, 1000, 4099)),
    *(DropNormCase(f"width_{M}_no_mask", (1 + min(2000 // M, 99),), (M,), eps=1e-2) for M in (1, 3, 17, 100, 1000)),
    # rows that leave tails in what works on several at once
    DropNormCase("one_row", (1,), (50,), 25),
    DropNormCase("one_row_no_mask", (1,), (50,)),
    DropNormCase("3_rows", (3,), (50,), 25),
    DropNormCase("1027_rows", (1027,), (5,), 2, eps=0.1),
    # nothing at all
    DropNormCase("empty_batch", (0, 3), (8,), 4),
    DropNormCase("empty_batch_no_mask", (3, 0), (8,)),
    DropNormCase("no_features", (3,), (0,), 0),
)


def drop_norm_cases() -> tuple:
    """The DropNorms that tests, benchmarks and `dlkernels check` go through."""
    return _DROP_NORM_CASES


@dataclass(frozen=True)
class ResetGateRnnCase:
    """One layer of the reset-gate RNN: its sizes, its form, and its arguments."""

    name: str
    sizes: tuple  # T, B, I, H
    reset: str = "after"
    batch_sizes: tuple | None = None  # T numbers, the first of them B; None: every sequence has every step
    reverse: bool = False
    bias_ih: bool = True
    bias_hh: bool = True

    @property
    def arguments(self) -> dict:
        """Everything after the tensors, as reset_gate_rnn takes it."""
        batch_sizes = None if self.batch_sizes is None else torch.tensor(self.batch_sizes, dtype=torch.int64)
        return {"reset": self.reset, "batch_sizes": batch_sizes, "reverse": self.reverse}

    def make_inputs(self, dtype, device="cpu", generator=None) -> tuple:
        """Random (input, h0, weight_ih, weight_hh, bias_ih or None, bias_hh or None); the same on every device."""
        T, B, I, H = self.sizes  # noqa: E741

        def draw(*shape, scale=1.0):
            return (torch.randn(shape, dtype=torch.float64, generator=generator) * scale).to(device, dtype)

        rows = (T, B) if self.batch_sizes is None else (sum(self.batch_sizes),)
        input, h0 = draw(*rows, I), draw(B, H, scale=0.5)
        weight_ih, weight_hh = draw(2 * H, I, scale=(I or 1) ** -0.5), draw(2 * H, H, scale=H**-0.5)
        bias_ih, bias_hh = (draw(2 * H, scale=0.5) if there else None for there in (self.bias_ih, self.bias_hh))
        return input, h0, weight_ih, weight_hh, bias_ih, bias_hh


def _reset_gate_rnn_cases_of(reset) -> tuple:
    return (
        # the everyday layer, and everything that may be left out or turned around
        ResetGateRnnCase(f"{reset}", (9, 4, 10, 20), reset),
        ResetGateRnnCase(f"{reset}_reverse", (9, 4, 10, 20), reset, reverse=True),
        ResetGateRnnCase(f"{reset}_packed", (9, 6, 10, 20), reset, (6, 6, 5, 3, 3, 3, 2, 1, 1)),
        ResetGateRnnCase(f"{reset}_packed_reverse", (9, 6, 10, 20), reset, (6, 6, 5, 3, 3, 3, 2, 1, 1), reverse=True),
        ResetGateRnnCase(f"{reset}_no_bias", (9, 4, 10, 20), reset, bias_ih=False, bias_hh=False),
        ResetGateRnnCase(f"{reset}_bias_ih", (9, 4, 10, 20), reset, bias_hh=False),
        ResetGateRnnCase(f"{reset}_bias_hh", (9, 4, 10, 20), reset, bias_ih=False),
        # the edges of what is allowed
        ResetGateRnnCase(f"{reset}_one_step", (1, 5, 10, 20), reset),
        ResetGateRnnCase(f"{reset}_one_sequence", (12, 1, 10, 20), reset),
        ResetGateRnnCase(f"{reset}_one_input_feature", (9, 9, 1, 20), reset),
        ResetGateRnnCase(f"{reset}_no_step", (0, 3, 4, 5), reset),
        ResetGateRnnCase(f"{reset}_no_packed_step", (0, 3, 4, 5), reset, ()),
        ResetGateRnnCase(f"{reset}_no_sequence", (3, 0, 4, 5), reset),
        ResetGateRnnCase(f"{reset}_no_input_feature", (5, 9, 0, 20), reset),
        # sizes that leave tails in vectors and in what works on several rows or panels at once
        *(ResetGateRnnCase(f"{reset}_hidden_{H}", (6, 11, 7, H), reset) for H in (1, 3, 8, 15, 16, 17, 33, 100, 130)),
        *(ResetGateRnnCase(f"{reset}_{B}_sequences", (5, B, 6, 18), reset) for B in (2, 3, 5, 8, 9, 17)),
        ResetGateRnnCase(f"{reset}_300_input_features", (5, 3, 300, 18), reset),
        ResetGateRnnCase(f"{reset}_long", (60, 3, 5, 12), reset),
    )


_RESET_GATE_RNN_CASES = sum(map(_reset_gate_rnn_cases_of, ("after", "before", "output")), start=())


def reset_gate_rnn_cases() -> tuple:
    """The reset-gate RNNs that tests, benchmarks and `dlkernels check` go through."""
    return _RESET_GATE_RNN_CASES
