"""conv2d's strategies on the CPU, each forced by conv2d_by: right at its borders, whatever the chooser says.

test_conv2d.py calls conv2d as users do; here the chooser is overruled.
"""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from test_conv2d import FORMATS, GRADIENTS, VIEWS_OF_IMAGES, doubled, each_case, random_grad, results, same_bits

from dlkernels.testing import DTYPES, Conv2dCase, compare

# ---- strategies -----------------------------------------------------------------------------------

# in the order that conv2d_by counts them in
STRATEGIES = (
    "direct",
    "pointwise",
    "depthwise",
    "winograd",
    "small_channels",
    "unfold",
    "across_images",
)


def depthwise_cases():
    """At the borders of the strategy: maps around a vector's width (4, 8 or 16), every way to step and to pad."""
    maps = [(1, 1), (3, 2), (5, 7), (7, 8), (9, 15), (8, 16), (6, 17), (14, 14), (33, 31), (2, 70), (90, 40)]
    for height, width in maps:
        yield f"{height}x{width}", (2, 19, height, width), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)
        yield f"{height}x{width}_stride_2", (2, 19, height, width), (3, 3), (2, 2), (1, 1, 1, 1), (1, 1)
    for channels in (1, 2, 7, 8, 15, 16, 17, 32, 50):
        yield f"{channels}_channels", (3, channels, 9, 18), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)
    yield "no_padding", (2, 5, 20, 37), (3, 3), (1, 1), (0, 0, 0, 0), (1, 1)
    yield "more_padding_than_kernel", (2, 5, 6, 18), (3, 3), (1, 1), (4, 5, 7, 3), (1, 1)
    yield "more_padding_than_kernel_stride_2", (2, 5, 6, 18), (3, 3), (2, 2), (4, 5, 7, 3), (1, 1)
    yield "only_after", (1, 4, 8, 21), (3, 3), (1, 1), (0, 2, 0, 2), (1, 1)
    yield "only_before", (1, 4, 8, 21), (3, 3), (2, 2), (2, 0, 2, 0), (1, 1)
    yield "stride_2_1", (2, 6, 12, 40), (3, 3), (2, 1), (1, 1, 1, 1), (1, 1)
    yield "stride_1_2", (2, 6, 12, 40), (3, 3), (1, 2), (1, 1, 1, 1), (1, 1)
    yield "stride_3", (2, 6, 17, 40), (3, 3), (3, 3), (1, 1, 1, 1), (1, 1)
    yield "stride_5_skips", (2, 6, 17, 41), (3, 2), (5, 5), (1, 0, 0, 1), (1, 1)
    yield "dilation_2", (2, 6, 17, 40), (3, 3), (1, 1), (2, 2, 2, 2), (2, 2)
    yield "dilation_3_stride_2", (2, 6, 17, 40), (3, 3), (2, 2), (3, 3, 3, 3), (3, 3)
    yield "dilation_2_stride_2", (2, 6, 17, 40), (3, 3), (2, 2), (2, 2, 2, 2), (2, 2)
    yield "dilation_4_stride_6", (2, 6, 23, 40), (3, 3), (6, 6), (4, 4, 4, 4), (4, 4)
    yield "1x1", (2, 6, 9, 20), (1, 1), (1, 1), (0, 0, 0, 0), (1, 1)
    yield "1x1_stride_2", (2, 6, 9, 21), (1, 1), (2, 2), (0, 0, 0, 0), (1, 1)
    yield "2x2_stride_2", (2, 6, 8, 36), (2, 2), (2, 2), (0, 0, 0, 0), (1, 1)
    yield "5x5", (2, 18, 15, 23), (5, 5), (1, 1), (2, 2, 2, 2), (1, 1)
    yield "7x7_stride_2", (2, 18, 15, 35), (7, 7), (2, 2), (3, 3, 3, 3), (1, 1)
    yield "1x9", (2, 5, 4, 33), (1, 9), (1, 1), (0, 0, 4, 4), (1, 1)
    yield "9x1", (2, 5, 33, 4), (9, 1), (1, 1), (4, 4, 0, 0), (1, 1)
    yield "kernel_is_the_input", (2, 20, 6, 17), (6, 17), (1, 1), (0, 0, 0, 0), (1, 1)
    yield "no_images", (0, 20, 6, 17), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)


@dataclass(frozen=True)
class StrategyCase:
    """A convolution as the operators take it, for one strategy."""

    strategy: str
    name: str
    input: tuple  # N, C, H, W
    weight: tuple  # K, C/G, R, S
    stride: tuple
    padding: tuple  # top, bottom, left, right
    dilation: tuple
    groups: int

    def make_tensors(self, dtype, memory_format=torch.contiguous_format, integers=False):
        """Random input, weight, bias and gradient of the output."""

        def draw(*shape):
            values = torch.randint(-2, 3, shape) if integers else torch.randn(shape)
            return values.to(dtype).contiguous(
                memory_format=memory_format if len(shape) == 4 else torch.contiguous_format
            )

        input, weight, bias = draw(*self.input), draw(*self.weight), draw(self.weight[0])
        return input, weight, bias, draw(*self.by_torch(input.double(), weight.double(), bias.double()).shape)

    def by_torch(self, input, weight, bias):
        top, bottom, left, right = self.padding
        padded = F.pad(input, (left, right, top, bottom))
        return F.conv2d(padded, weight, bias, self.stride, 0, self.dilation, self.groups)

    def results_of_torch(self, input, weight, bias, grad):
        leaves = [t.detach().requires_grad_() for t in (input, weight, bias)]
        output = self.by_torch(*leaves)
        return output.detach(), *torch.autograd.grad(output, leaves, grad)

    def exact_results(self, *tensors):
        return self.results_of_torch(*(t.double() for t in tensors))

    def results(self, input, weight, bias, grad):
        """output, grad_input, grad_weight, grad_bias by this strategy."""
        number = STRATEGIES.index(self.strategy)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        output = torch.ops.dlkernels.conv2d_by(number, input, weight, bias, *geometry)
        return output, *torch.ops.dlkernels.conv2d_backward_by(number, grad, input, weight, *geometry, [True] * 3)


def pointwise_cases():
    """Around a panel of pixels (16, 32 or 64), the terms summed at a time (144) and whole tiles of channels."""
    for pixels in (1, 15, 16, 17, 49, 63, 64, 65, 130):
        yield f"{pixels}_pixels", (2, 5, 1, pixels), 7, 1, 1
    for pixels in (96, 196):  # vectors that whole panels do not divide: full to the last (written in place), or not
        yield f"{pixels}_pixels_of_one_image", (1, 5, 1, pixels), 7, 1, 1
    for channels in (143, 144, 145, 600):
        yield f"{channels}_channels", (1, channels, 5, 13), 9, 1, 1
    yield "many_channels_out", (1, 20, 7, 7), 70, 1, 1
    yield "stride_2", (3, 6, 9, 12), 8, 2, 1
    yield "stride_3_leaves_pixels", (2, 6, 9, 11), 8, 3, 1
    yield "groups", (2, 12, 6, 11), 20, 1, 4
    yield "no_images", (0, 12, 6, 11), 20, 1, 1


def across_images_cases():
    """Around a vector of images (4, 8 or 16), its tiles of 4 or 6 channels and 3 or 4 pixels, and blocks of terms."""
    for images in (1, 3, 4, 7, 8, 15, 16, 17, 33):
        yield f"{images}_images", (images, 5, 6, 7), (7, 3, 3), (1, 1, 1, 1), (1, 1)
    for width in (1, 2, 3, 4, 5, 11, 17):
        yield f"5x{width}", (5, 3, 5, width), (4, 3, 3), (1, 1, 1, 1), (1, 1)
    for channels in (1, 2, 3, 4, 5, 9, 20, 64):
        yield f"{channels}_channels", (5, channels, 4, 6), (7, 3, 3), (1, 1, 1, 1), (1, 1)
        yield f"{channels}_channels_out", (5, 6, 4, 6), (channels, 3, 2), (1, 0, 0, 1), (1, 1)
    yield "no_padding", (18, 10, 12, 12), (20, 5, 5), (0, 0, 0, 0), (1, 1)
    yield "more_pixels_than_summed_at_a_time", (4, 2, 20, 17), (5, 3, 3), (1, 1, 1, 1), (1, 1)
    yield "more_padding_than_kernel", (5, 5, 3, 4), (6, 3, 3), (4, 5, 7, 3), (1, 1)
    yield "more_padding_than_a_small_kernel", (5, 2, 3, 4), (3, 1, 2), (2, 2, 3, 3), (1, 1)
    yield "only_after", (5, 4, 8, 9), (3, 3, 3), (0, 2, 0, 2), (1, 1)
    yield "only_before", (5, 4, 8, 9), (3, 3, 3), (2, 0, 2, 0), (1, 1)
    yield "dilation_2", (5, 17, 9, 8), (6, 3, 3), (2, 2, 2, 2), (2, 2)
    yield "dilation_wider_than_the_image", (5, 3, 4, 4), (6, 3, 3), (5, 5, 5, 5), (5, 5)
    yield "1x1", (9, 6, 5, 5), (7, 1, 1), (0, 0, 0, 0), (1, 1)
    yield "7x7", (5, 30, 7, 7), (8, 7, 7), (3, 3, 3, 3), (1, 1)
    yield "1x7", (5, 4, 2, 20), (3, 1, 7), (0, 0, 3, 3), (1, 1)
    yield "kernel_is_the_input", (5, 20, 6, 17), (9, 6, 17), (0, 0, 0, 0), (1, 1)


def unfold_cases():
    """Around a panel of pixels or of terms (16, 32 or 64), and the terms and channels summed at a time (144)."""
    for width in (1, 7, 8, 15, 16, 17, 31):
        yield f"1x{width}", (1, 5, 3, width), (6, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1
    for channels in (7, 16, 17, 145):
        yield f"{channels}_channels", (1, channels, 4, 4), (9, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1
    for channels in (3, 64, 145):
        yield f"{channels}_channels_out", (1, 16, 4, 4), (channels, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1
    yield "many_panels_of_pixels", (3, 9, 7, 8), (10, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1
    yield "stride_2", (2, 18, 8, 7), (20, 3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 1
    yield "stride_2_1", (2, 6, 9, 11), (8, 3, 3), (2, 1), (1, 1, 1, 1), (1, 1), 1
    yield "stride_5_skips", (2, 6, 11, 11), (8, 3, 2), (5, 5), (1, 0, 0, 1), (1, 1), 1
    yield "dilation_2", (2, 17, 9, 8), (6, 3, 3), (1, 1), (2, 2, 2, 2), (2, 2), 1
    yield "more_padding_than_kernel", (1, 5, 3, 4), (6, 3, 3), (1, 1), (4, 5, 7, 3), (1, 1), 1
    yield "1x1", (1, 40, 7, 7), (70, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1
    yield "1x1_stride_2", (1, 40, 7, 7), (20, 1, 1), (2, 2), (0, 0, 0, 0), (1, 1), 1
    yield "5x5", (1, 20, 7, 7), (18, 5, 5), (1, 1), (2, 2, 2, 2), (1, 1), 1
    yield "1x7", (2, 4, 2, 20), (3, 1, 7), (1, 1), (0, 0, 3, 3), (1, 1), 1
    yield "kernel_is_the_input", (2, 20, 6, 17), (9, 6, 17), (1, 1), (0, 0, 0, 0), (1, 1), 1
    yield "groups", (2, 12, 6, 5), (20, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 4


def small_channels_cases():
    """Rows around a vector's width, tiles of 4 and 8 rows and of 1 to 4 channels, kernels of known and other rows."""
    for height, width in [(1, 1), (3, 16), (4, 17), (9, 15), (12, 33), (90, 40)]:
        yield f"{height}x{width}", (2, 3, height, width), 5, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)
    yield "8x16_stride_2", (2, 3, 8, 16), 6, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1)
    yield "dilation_2_stride_2", (2, 3, 17, 40), 7, (3, 3), (2, 2), (2, 2, 2, 2), (2, 2)
    for channels in (1, 2, 4, 7, 16):
        yield f"{channels}_channels", (3, channels, 13, 18), 9, (5, 5), (1, 1), (2, 2, 2, 2), (1, 1)
    for channels_out in (1, 2, 4, 33):
        yield f"{channels_out}_channels_out", (2, 1, 13, 18), channels_out, (3, 3), (1, 1), (0, 0, 0, 0), (1, 1)
    for rows in (1, 2, 4, 5, 6):
        yield f"{rows}_rows_of_kernel", (2, 2, 15, 20), 6, (rows, 2), (1, 1), (1, 0, 0, 1), (1, 1)
    yield "long_sums", (1, 2, 10, 12), 100, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)
    yield "many_weights", (2, 16, 13, 18), 12, (7, 7), (1, 1), (3, 3, 3, 3), (1, 1)
    yield "more_padding_than_kernel", (2, 3, 6, 18), 5, (3, 3), (2, 2), (4, 5, 7, 3), (1, 1)
    yield "stride_2_1", (2, 3, 12, 40), 5, (3, 3), (2, 1), (1, 1, 1, 1), (1, 1)
    yield "stride_3_leaves_pixels", (2, 3, 17, 41), 5, (2, 2), (3, 3), (0, 0, 0, 0), (1, 1)
    yield "stride_5_skips", (2, 3, 17, 41), 5, (3, 2), (5, 5), (1, 0, 0, 1), (1, 1)
    yield "7x7_stride_2", (2, 3, 21, 35), 8, (7, 7), (2, 2), (3, 3, 3, 3), (1, 1)
    yield "dilation_3", (2, 3, 17, 40), 5, (3, 3), (1, 1), (3, 3, 3, 3), (3, 3)
    yield "kernel_is_the_input", (2, 3, 6, 17), 5, (6, 17), (1, 1), (0, 0, 0, 0), (1, 1)
    yield "no_images", (0, 3, 6, 17), 5, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)
    for height, width in ((8, 8), (9, 4), (13, 7), (8, 2), (21, 1), (10, 9)):  # two rows to a vector, or just not
        for kernel in (3, 5):
            pad = (kernel // 2,) * 4
            yield (
                f"{kernel}x{kernel}_narrow_{height}x{width}",
                (2, 7, height, width),
                5,
                (kernel, kernel),
                (1, 1),
                pad,
                (1, 1),
            )


def small_groups_cases():
    """Groups that fill a vector together, or do not: with channels side by side, some share a task."""
    yield "2_groups_of_2", (2, 4, 9, 20), 6, 2, 1
    yield "32_groups_of_4", (2, 128, 7, 18), 128, 32, 1
    yield "6_groups_of_5", (2, 30, 9, 17), 12, 6, 1
    yield "3_groups_of_16", (1, 48, 9, 17), 48, 3, 1
    yield "8_groups_of_8_stride_2", (2, 64, 11, 19), 64, 8, 2
    yield "groups_of_1_of_many_channels_out", (2, 3, 9, 17), 60, 3, 1


def direct_cases():
    """Channels gathered in parts, whole or not; blocks of few pixels; tiles of one vector; taps far apart in memory."""
    yield "700_channels", (1, 700, 9, 9), 20, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)
    yield "700_channels_stride_2", (2, 700, 14, 14), 72, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1)
    yield "700_channels_1x1", (2, 700, 9, 23), 20, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1)
    yield "300_channels_5x5", (1, 300, 8, 30), 100, (5, 5), (1, 1), (2, 2, 2, 2), (1, 1)
    yield "33_channels_out_of_runs", (1, 33, 20, 40), 10, (3, 3), (1, 1), (0, 0, 0, 0), (1, 1)
    for columns in (1, 2, 7, 13, 14, 15, 28, 29):
        yield f"{columns}_columns_of_one_vector", (2, 20, 3, columns), 16, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1)
    yield "one_vector_stride_2", (2, 20, 9, 41), 12, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1)
    yield "strided_planes", (3, 40, 15, 22), 24, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1)
    yield "stride_1_2_planes", (2, 7, 9, 22), 5, (3, 3), (1, 2), (1, 1, 1, 1), (1, 1)
    yield "stride_3_skips_in_planes", (2, 7, 10, 22), 5, (2, 2), (3, 3), (0, 0, 0, 0), (1, 1)
    yield "many_strided_planes", (3, 70, 90, 90), 8, (1, 1), (2, 2), (0, 0, 0, 0), (1, 1)
    yield "only_padding_around", (2, 40, 7, 9), 20, (1, 1), (2, 2), (3, 4, 3, 2), (1, 1)
    yield "only_padding", (2, 10, 3, 3), 20, (1, 1), (9, 9), (4, 4, 4, 4), (1, 1)
    yield "shared_pixels", (1, 30, 9, 9), 300, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1)
    yield "many_weights_of_few_channels_out", (1, 700, 14, 14), 48, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1)
    yield "7x7_cut_by_taps", (1, 20, 12, 12), 20, (7, 7), (2, 2), (3, 3, 3, 3), (1, 1)
    yield "taps_far_apart", (1, 130, 9, 300), 20, (3, 3), (2, 2), (0, 0, 0, 0), (1, 1)


STRATEGY_CASES = [
    StrategyCase("depthwise", name, input, (input[1], 1, *kernel), stride, padding, dilation, input[1])
    for name, input, kernel, stride, padding, dilation in depthwise_cases()
] + [
    StrategyCase("pointwise", name, input, (K, input[1] // groups, 1, 1), (step, step), (0, 0, 0, 0), (1, 1), groups)
    for name, input, K, step, groups in pointwise_cases()
]
STRATEGY_CASES += [
    StrategyCase("small_channels", name, input, (K, input[1], *kernel), stride, padding, dilation, 1)
    for name, input, K, kernel, stride, padding, dilation in small_channels_cases()
]
STRATEGY_CASES += [
    StrategyCase("small_channels", name, input, (K, input[1] // groups, 3, 3), (step, step), (1,) * 4, (1, 1), groups)
    for name, input, K, groups, step in small_groups_cases()
]
STRATEGY_CASES += (
    [
        StrategyCase("unfold", name, input, (K, input[1] // groups, *kernel), stride, padding, dilation, groups)
        for name, input, (K, *kernel), stride, padding, dilation, groups in unfold_cases()
    ]
    + [
        StrategyCase("across_images", name, input, (K, input[1], *kernel), (1, 1), padding, dilation, 1)
        for name, input, (K, *kernel), padding, dilation in across_images_cases()
    ]
    + [
        StrategyCase("direct", name, input, (K, input[1], *kernel), stride, padding, dilation, 1)
        for name, input, K, kernel, stride, padding, dilation in direct_cases()
    ]
)
each_strategy_case = pytest.mark.parametrize("case", STRATEGY_CASES, ids=lambda case: f"{case.strategy}-{case.name}")


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@each_strategy_case
def test_strategy_is_exact_for_small_integers(case, dtype, memory_format):
    tensors = case.make_tensors(dtype, FORMATS[memory_format], integers=True)
    for name, ours, exact in zip(
        ("output", *GRADIENTS), case.results(*tensors), case.exact_results(*tensors), strict=True
    ):
        assert torch.equal(ours, exact.to(dtype)), name


@pytest.mark.parametrize("memory_format", FORMATS)
@each_strategy_case
def test_strategy_is_accurate(case, memory_format):
    tensors = case.make_tensors(torch.float32, FORMATS[memory_format])
    exact = case.exact_results(*tensors)
    by_torch = case.results_of_torch(*tensors)
    for name, ours, theirs, expected in zip(
        ("output", *GRADIENTS), case.results(*tensors), by_torch, exact, strict=True
    ):
        compare(ours, theirs, expected, torch.float32, gradient=name != "output", name=name)


@pytest.mark.parametrize("argument", ["input", "weight", "bias", "grad", "all"])
@pytest.mark.parametrize("view", VIEWS_OF_IMAGES)
@pytest.mark.parametrize("name", ["9x15", "8x16_stride_2", "dilation_2_stride_2", "17_images"])
def test_strategy_takes_any_strides(name, view, argument):
    for case in (case for case in STRATEGY_CASES if case.name == name):
        tensors = dict(
            zip(("input", "weight", "bias", "grad"), case.make_tensors(torch.float32, integers=True), strict=True)
        )
        for key in tensors if argument == "all" else [argument]:
            tensors[key] = VIEWS_OF_IMAGES[view](tensors[key])
        exact = case.exact_results(*(t.contiguous() for t in tensors.values()))
        for ours, expected in zip(case.results(*tensors.values()), exact, strict=True):
            assert torch.equal(ours.double(), expected)


@pytest.mark.parametrize("memory_format", FORMATS)
@each_strategy_case
def test_strategy_has_the_same_bits_for_any_number_of_threads(case, memory_format):
    larger = replace(case, input=(4 * case.input[0], *case.input[1:]))
    tensors = larger.make_tensors(torch.float32, FORMATS[memory_format])
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(larger.results(*tensors))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("case", [case for case in STRATEGY_CASES if sum(case.padding) == 0 and case.input[0]], ids=str)
def test_strategy_spreads_what_is_not_finite_no_further_than_the_formula(case, memory_format, value):
    for spoiled in (0, 3):
        tensors = case.make_tensors(torch.float32, FORMATS[memory_format])
        tensors[spoiled][-1, -1, -1, -1] = value
        for ours, exact in zip(case.results(*tensors), case.exact_results(*tensors), strict=True):
            assert torch.equal(ours.isfinite(), exact.isfinite())


@pytest.mark.parametrize(("groups", "channels_out"), [(1, 4), (2, 4), (4, 8)])
def test_depthwise_refuses_other_groups(groups, channels_out):
    input, weight = torch.randn(1, 4, 6, 6), torch.randn(channels_out, 4 // groups, 3, 3)
    number = STRATEGIES.index("depthwise")
    with pytest.raises(RuntimeError, match="strategy cannot do this shape"):
        torch.ops.dlkernels.conv2d_by(number, input, weight, None, (1, 1), (1,) * 4, (1, 1), groups)


@pytest.mark.parametrize(("channels", "groups"), [(17, 1), (34, 2)])
def test_small_channels_refuses_groups_of_many_channels(channels, groups):
    input, weight = torch.randn(1, channels, 6, 6), torch.randn(4, channels // groups, 3, 3)
    number = STRATEGIES.index("small_channels")
    with pytest.raises(RuntimeError, match="strategy cannot do this shape"):
        torch.ops.dlkernels.conv2d_by(number, input, weight, None, (1, 1), (1,) * 4, (1, 1), groups)


@pytest.mark.parametrize(("stride", "groups", "channels"), [(2, 1, 4), (1, 2, 4), (1, 1, 65)])
def test_across_images_refuses_strides_groups_and_many_channels(stride, groups, channels):
    input, weight = torch.randn(4, channels, 6, 6), torch.randn(4, channels // groups, 3, 3)
    number = STRATEGIES.index("across_images")
    with pytest.raises(RuntimeError, match="strategy cannot do this shape"):
        torch.ops.dlkernels.conv2d_by(number, input, weight, None, (stride, stride), (1,) * 4, (1, 1), groups)


def test_small_channels_takes_no_channels():
    """Forced, and where the chooser takes it for grad_weight: rows that fill a vector."""
    input, weight, grad = torch.randn(2, 0, 20, 20), torch.randn(3, 0, 3, 3), torch.randn(2, 3, 20, 20)
    arguments = (grad, input, weight, (1, 1), (1,) * 4, (1, 1), 1, [True] * 3)
    forced = torch.ops.dlkernels.conv2d_backward_by(STRATEGIES.index("small_channels"), *arguments)
    chosen = torch.ops.dlkernels.conv2d_backward(*arguments)
    for grad_input, grad_weight, grad_bias in (forced, chosen):
        assert (grad_input.shape, grad_weight.shape) == (input.shape, weight.shape)
        torch.testing.assert_close(grad_bias, grad.sum((0, 2, 3)))


def test_there_are_as_many_strategies_as_names():
    with pytest.raises(RuntimeError, match=f"strategy must be below {len(STRATEGIES)}, got {len(STRATEGIES)}"):
        torch.ops.dlkernels.conv2d_by(
            len(STRATEGIES), torch.randn(1, 1, 3, 3), torch.randn(1, 1, 1, 1), None, (1, 1), (0,) * 4, (1, 1), 1
        )


# ---- winograd ---------------------------------------------------------------------------------------

DIRECT, WINOGRAD = STRATEGIES.index("direct"), STRATEGIES.index("winograd")

# Whole and overhanging tiles, blocks of tiles that end within a row or an image, channels around the blocks of 64, few
# tiles and many, every padding; all of a kernel of 3 x 3 that steps by 1.
WINOGRAD_CASES = (
    Conv2dCase("one_tile", (1, 3, 2, 2), (5, 3, 3, 3), padding=1),
    Conv2dCase("one_pixel", (3, 16, 1, 1), (16, 16, 3, 3), padding=1),
    Conv2dCase("odd_map", (2, 17, 13, 7), (23, 17, 3, 3), padding=1),
    Conv2dCase("no_padding", (2, 32, 9, 12), (48, 32, 3, 3)),
    Conv2dCase("more_padding_than_kernel", (1, 8, 5, 6), (16, 8, 3, 3), padding=4),
    Conv2dCase("other_padding_each_way", (2, 16, 8, 9), (16, 16, 3, 3), padding=(0, 2)),
    Conv2dCase("two_blocks_of_channels", (2, 70, 10, 10), (130, 70, 3, 3), padding=1),
    Conv2dCase("small_maps", (33, 24, 4, 4), (40, 24, 3, 3), padding=1),
    Conv2dCase("wide_map", (1, 20, 5, 131), (16, 20, 3, 3), padding=1),
    Conv2dCase("many_tiles", (4, 32, 29, 30), (80, 32, 3, 3), padding=1),
    Conv2dCase("groups", (2, 48, 11, 11), (60, 16, 3, 3), padding=1, groups=3),
    Conv2dCase("no_images", (0, 16, 6, 6), (16, 16, 3, 3), padding=1),
)


def results_by(strategy, case, input, weight, bias, grad):
    """output, grad_input, grad_weight, grad_bias by this strategy."""
    height, width = case.padding if isinstance(case.padding, tuple) else (case.padding, case.padding)
    geometry = ((1, 1), (height, height, width, width), (1, 1), case.groups)
    output = torch.ops.dlkernels.conv2d_by(strategy, input, weight, bias, *geometry)
    gradients = torch.ops.dlkernels.conv2d_backward_by(strategy, grad, input, weight, *geometry, [True] * 3)
    return dict(zip(("output", *GRADIENTS), (output, *gradients), strict=True))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
@each_case(WINOGRAD_CASES)
def test_winograd_is_as_accurate_as_torch(case, dtype, memory_format):
    inputs = case.make_inputs(dtype, memory_format=FORMATS[memory_format])
    grad = random_grad(case, inputs)
    exact = results(F.conv2d, case, doubled(inputs), grad.double())
    theirs = results(F.conv2d, case, inputs, grad)
    ours = results_by(WINOGRAD, case, *inputs, grad)
    for name in exact:
        compare(ours[name], theirs[name], exact[name], dtype, gradient=name != "output", name=name)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@each_case(WINOGRAD_CASES)
def test_winograd_is_exact_for_small_integers(case, dtype, memory_format):
    inputs = case.make_inputs(dtype, memory_format=FORMATS[memory_format], integers=True)
    grad = random_grad(case, inputs, integers=True)
    exact = results(F.conv2d, case, doubled(inputs), grad.double())
    for name, ours in results_by(WINOGRAD, case, *inputs, grad).items():
        assert torch.equal(ours, exact[name].to(dtype)), name


@pytest.mark.parametrize("view", VIEWS_OF_IMAGES)
@each_case(WINOGRAD_CASES[2:5])
def test_winograd_takes_any_strides(case, view):
    inputs = case.make_inputs(torch.float32, integers=True)
    viewed = [VIEWS_OF_IMAGES[view](tensor) for tensor in (*inputs, random_grad(case, inputs, integers=True))]
    plain = [tensor.clone(memory_format=torch.contiguous_format) for tensor in viewed]
    assert same_bits(results_by(WINOGRAD, case, *viewed), results_by(WINOGRAD, case, *plain))


@pytest.mark.parametrize("memory_format", FORMATS)
@each_case(WINOGRAD_CASES)
def test_winograd_has_the_same_bits_for_any_number_of_threads(case, memory_format):
    inputs = case.make_inputs(torch.float32, memory_format=FORMATS[memory_format])
    grad = random_grad(case, inputs)
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(results_by(WINOGRAD, case, *inputs, grad))
    assert all(same_bits(run, runs[0]) for run in runs)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38], ids=str)
@pytest.mark.parametrize("place", ["input", "weight", "grad"])
def test_winograd_leaves_what_is_not_finite_or_overflows_to_direct(place, value, memory_format):
    """Three numbers near the largest float32 overflow in a transform, and alone do not in the definition."""
    case = Conv2dCase("3x3", (2, 32, 13, 12), (40, 32, 3, 3), padding=1)
    inputs = case.make_inputs(torch.float32, memory_format=FORMATS[memory_format])
    tensors = {"input": inputs[0], "weight": inputs[1], "grad": random_grad(case, inputs)}
    tensors[place][-1, -1] = value
    arguments = (tensors["input"], tensors["weight"], inputs[2], tensors["grad"])
    winograd, direct = (results_by(strategy, case, *arguments) for strategy in (WINOGRAD, DIRECT))
    for name in GRADIENTS[:2] if place == "grad" else ("output",):
        torch.testing.assert_close(winograd[name], direct[name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("option", [{"stride": 2}, {"dilation": 2}, {"kernel": 5}], ids=str)
def test_winograd_refuses_other_kernels(option):
    input, weight = torch.randn(1, 4, 9, 9), torch.randn(4, 4, *[option.get("kernel", 3)] * 2)
    stride, dilation = [option.get("stride", 1)] * 2, [option.get("dilation", 1)] * 2
    with pytest.raises(RuntimeError, match="strategy cannot do this shape"):
        torch.ops.dlkernels.conv2d_by(WINOGRAD, input, weight, None, stride, [1] * 4, dilation, 1)
