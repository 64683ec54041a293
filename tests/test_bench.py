"""The bench: its statistics, its order, what it refuses, its shapes and costs, its files. No test looks at a time."""

import argparse
import importlib.util
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import dlkernels
from dlkernels.bench import (
    cli,
    conv2d,
    conv_transpose2d,
    drop_norm,
    harness,
    machine,
    report,
    reset_gate_rnn,
    shapes,
    split_linear,
)

ROOT = Path(__file__).resolve().parent.parent
ROOFS = machine.Roofs({"FMA float32": 100e9, "AMX bfloat16": 800e9}, 10e9)


def tick(call, job, slot, batch):
    """A clock for tests: every call takes a made-up 10 ms, so that few repeats are enough."""
    for _ in range(batch):
        job.changed()
        outputs = call(slot)
    return 0.01, outputs


class Doubling:
    """A job: x + x by add (ours) and by mul (theirs)."""

    slots = 4
    ours_runs = ("aten::add",)
    ours_avoids = ("aten::mul",)

    def __init__(self, wrong=0.0):
        self.inputs = [torch.arange(1.0, 9.0) + 100 * slot for slot in range(self.slots)]
        self.wrong = wrong
        self.log = []

    def ours(self, slot):
        self.log.append(("ours", slot))
        return (torch.add(self.inputs[slot], self.inputs[slot]) if not self.wrong else self.inputs[slot] + self.wrong,)

    def theirs(self, slot):
        self.log.append(("theirs", slot))
        return (torch.mul(self.inputs[slot], 2),)

    def changed(self):
        self.log.append("changed")

    def exact(self, slot, ours, theirs):
        yield "output", ours[0], theirs[0], self.inputs[slot].double() * 2


def case_of(job, direction="forward"):
    return harness.Case("toys", "8", "plain", direction, torch.float32, 8.0, 64.0, lambda: job)


def small_case(layout="NCHW", bias=True, direction="forward+backward", dtype=torch.float32, **sizes):
    shape = conv2d.Shape(**{"N": 2, "C": 8, "H": 7, "W": 6, "K": 12, "R": 3, "S": 3, "padding": 1} | sizes)
    return conv2d.make_case("toys", shape, layout, bias, direction, dtype)


# ---- statistics -----------------------------------------------------------------------------------


def test_median_and_deviation():
    assert harness.timing([5.0, 1.0, 2.0, 3.0, 100.0]) == harness.Timing(3.0, 2.0)


def test_interval_brackets_the_known_ratio():
    random = np.random.default_rng(1)
    inside = 0
    for trial in range(40):
        weather = random.lognormal(0, 0.3, 40)  # what slows both sides of a pair at once
        ours, theirs = (t * weather * random.lognormal(0, 0.03, 40) for t in (2.0, 3.0))
        ratio, low, high = harness.ratio_interval(ours, theirs, seed=trial)
        assert low <= ratio <= high
        inside += low <= 1.5 <= high
    assert inside >= 34


def test_interval_of_constant_times_is_a_point_and_repeatable():
    assert harness.ratio_interval([2.0] * 8, [3.0] * 8) == (1.5, 1.5, 1.5)
    noisy = np.random.default_rng(0).random((2, 30))
    assert harness.ratio_interval(*noisy) == harness.ratio_interval(*noisy)


# ---- order ----------------------------------------------------------------------------------------


def test_rounds_go_a_b_b_a_and_each_side_meets_each_input_once():
    job = Doubling()
    row = harness.measure(case_of(job), tick)
    assert row.refused is None
    calls = [entry for entry in job.log if entry != "changed"][2 + 4 :]  # the profiled calls, then the warm-up
    rounds = [calls[i : i + 4] for i in range(0, len(calls), 4)]
    assert len(rounds) == harness.REPEATS_SLOW // 2 == row.repeats // 2
    for number, turn in enumerate(rounds):
        first, second = 2 * number % job.slots, (2 * number + 1) % job.slots
        assert turn == [("ours", first), ("theirs", second), ("theirs", first), ("ours", second)]


def test_fast_calls_are_repeated_and_timed_several_in_a_row():
    def fast(call, job, slot, batch):
        return 1e-5, call(slot)

    row = harness.measure(case_of(Doubling()), fast, row_s=0.0)
    assert row.repeats >= 30
    assert row.batch == 10


def test_weights_are_counted_as_changed_before_every_timed_call():
    job = Doubling()
    harness.measure(case_of(job), tick)
    timed = job.log[2:]
    assert timed[::2] == ["changed"] * (len(timed) // 2)
    assert "changed" not in timed[1::2]


def test_garbage_collection_is_off_while_timing_and_on_again_after():
    import gc

    seen = []

    def clock(call, job, slot, batch):
        seen.append(gc.isenabled())
        return tick(call, job, slot, batch)

    harness.measure(case_of(Doubling()), clock)
    assert not any(seen)
    assert gc.isenabled()


# ---- refusals -------------------------------------------------------------------------------------


def assert_refused(row, *words):
    assert row.refused is not None
    assert all(word in row.refused for word in words), row.refused
    assert math.isnan(row.ours.median)
    assert math.isnan(row.ratio)
    record = report.record(row, ROOFS)
    assert not any(isinstance(value, float) for value in record.values())
    assert "REFUSED" in report.line(record)
    assert "±" not in report.line(record)


def test_no_time_without_parity():
    assert_refused(harness.measure(case_of(Doubling(wrong=1e-3)), tick), "parity", "output")


def test_no_time_when_our_kernel_did_not_run():
    job = Doubling()
    job.ours_runs = ("dlkernels::doubling",)
    assert_refused(harness.measure(case_of(job), tick), "our kernel did not run", "dlkernels::doubling")


def test_no_time_when_torch_runs_our_kernel():
    job = Doubling()
    job.theirs = job.ours
    assert_refused(harness.measure(case_of(job), tick), "torch's side ran our kernel")


def test_no_time_when_we_run_torchs_kernel():
    job = Doubling()
    job.ours_avoids = ("aten::add",)
    assert_refused(harness.measure(case_of(job), tick), "our side ran torch's kernel aten::add")


def test_no_time_for_conv2d_on_another_backend():
    with dlkernels.backend("torch"):
        assert_refused(harness.measure(small_case(), tick), "our kernel did not run", "dlkernels::conv2d")


def test_an_operator_that_raises_is_a_refused_row():
    job = Doubling()

    def unsupported(slot):
        raise RuntimeError("no such\nthing")

    job.ours = unsupported
    assert_refused(harness.measure(case_of(job), tick), "RuntimeError: no such thing")


@pytest.mark.parametrize("which", range(4), ids=["output", "input", "weight", "bias"])
@pytest.mark.parametrize("groups", [1, 4])
def test_an_error_in_the_last_channel_is_found_though_only_parts_are_compared(which, groups, monkeypatch):
    case = small_case(groups=groups, N=5)
    monkeypatch.setattr(conv2d, "EXACT_FLOPS", case.flops / 3 / 10)
    job = case.build()
    ours, theirs = job.ours(1), job.theirs(1)
    harness.check_parity(case, job, 1, ours, theirs)
    bad = [tensor.detach().clone() for tensor in ours]
    bad[which][-1].add_(1e-2)
    with pytest.raises(
        harness.Refused, match=("output", "gradient of the input", "of the weight", "of the bias")[which]
    ):
        harness.check_parity(case, job, 1, bad, theirs)


def test_precision_loosens_parity_of_float32_only_as_far_as_it_says():
    case, job = case_of(Doubling()), Doubling()
    exact = job.inputs[0] * 2
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        harness.check_parity(case, job, 0, (exact * (1 + 5e-6),), (exact,))
        with pytest.raises(harness.Refused):
            harness.check_parity(case, job, 0, (exact * (1 + 5e-5),), (exact,))
    finally:
        torch.set_float32_matmul_precision(before)


# ---- conv2d ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", list(conv2d.FORMATS))
@pytest.mark.parametrize("direction", conv2d.DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv2d_rows(layout, direction, dtype):
    row = harness.measure(small_case(layout, direction=direction, dtype=dtype), tick)
    assert row.refused is None
    assert 0 < row.error_ours < 2e-2


def test_depthwise_and_strided_rows():
    for case in (small_case(groups=8, K=8, bias=False), small_case(stride=2, dilation=2, R=5, S=1)):
        assert harness.measure(case, tick).refused is None


def test_a_training_call_counts_the_weight_as_changed_and_a_forward_does_not():
    for direction, moves in (("forward", 0), ("forward+backward", 1)):
        job = small_case(direction=direction).build()
        before = job.torch_layer.weight._version
        job.changed()
        assert job.torch_layer.weight._version == before + moves
        assert job.layer.weight is job.torch_layer.weight


def test_both_sides_keep_the_memory_format():
    for layout, memory_format in conv2d.FORMATS.items():
        job = small_case(layout).build()
        for tensor in (*job.pool[0], job.layer.weight, job.ours(0)[0], job.theirs(0)[0]):
            assert tensor.is_contiguous(memory_format=memory_format)


def test_costs_by_hand():
    # 16 images, 3 -> 64 channels, 7x7 stride 2 padding 3, 224 x 224 -> 112 x 112
    shape = conv2d.Shape(16, 3, 224, 224, 64, 7, 7, stride=2, padding=3)
    assert (shape.P, shape.Q) == (112, 112)
    multiplications = 16 * 64 * 112 * 112 * 3 * 49
    assert shape.flops(backward=False) == 2 * multiplications == 3_776_446_464
    assert shape.flops(backward=True) == 6 * multiplications
    x, w, y = 16 * 3 * 224 * 224, 64 * 3 * 49, 16 * 64 * 112 * 112
    assert shape.bytes(False, True, 4) == 4 * (x + w + y + 64)
    assert shape.bytes(True, False, 2) == 2 * (3 * x + 3 * w + 2 * y)
    depthwise = conv2d.Shape(1, 96, 112, 112, 96, 3, 3, stride=2, padding=1, groups=96)
    assert depthwise.flops(backward=False) == 2 * 96 * 56 * 56 * 9
    assert depthwise.name == "1x dw 96 3x3 s2 @112"


# ---- conv_transpose2d -----------------------------------------------------------------------------


@pytest.mark.parametrize("flops", [conv2d.EXACT_FLOPS, 1e4])
@pytest.mark.parametrize("layout", list(conv2d.FORMATS))
@pytest.mark.parametrize("direction", conv2d.DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv_transpose2d_rows(layout, direction, dtype, flops, monkeypatch):
    monkeypatch.setattr(conv_transpose2d, "EXACT_FLOPS", flops)  # the smaller one: compared in parts
    shape = conv_transpose2d.Shape.of(3, 12, 5, 6, 8, 4, 3, stride=2, padding=1)
    row = harness.measure(conv_transpose2d.make_case("toys", shape, layout, True, direction, dtype), tick)
    assert row.refused is None
    assert 0 < row.error_ours < 2e-2


def test_conv_transpose2d_costs_by_hand():
    # 16 images, 128 -> 64 channels, 4x4 stride 2 padding 1, 16 x 16 -> 32 x 32: every input pixel lays down a kernel
    shape = conv_transpose2d.Shape.of(16, 128, 16, 16, 64, 4, 4, stride=2, padding=1)
    assert (shape.input, shape.output) == ((16, 128, 16, 16), (16, 64, 32, 32))
    assert shape.flops(backward=False) == 2 * 16 * 128 * 16 * 16 * 64 * 16
    x, w, y = 16 * 128 * 256, 128 * 64 * 16, 16 * 64 * 1024
    assert shape.bytes(False, True, 4) == 4 * (x + w + y + 64)
    assert shape.name == "16x 128->64 4x4 s2 p1 @16"


# ---- drop_norm ------------------------------------------------------------------------------------


def drop_norm_case(against, p, direction="forward+backward", dtype=torch.float32, N=40, M=96):
    return drop_norm.make_case("toys", drop_norm.Shape(N, M, p), against, direction, dtype)


OPPONENTS = [
    ("nn.Dropout+nn.LayerNorm", 0.1),
    ("nn.Dropout+nn.LayerNorm", 0.5),
    ("reference", 0.5),
    ("nn.LayerNorm", 0.0),
]


@pytest.mark.parametrize(("against", "p"), OPPONENTS)
@pytest.mark.parametrize("direction", drop_norm.DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drop_norm_rows(against, p, direction, dtype):
    row = harness.measure(drop_norm_case(against, p, direction, dtype), tick)
    assert row.refused is None
    assert 0 < row.error_ours < 2e-2


@pytest.mark.compile
def test_drop_norm_against_the_compiled_reference():
    for direction in drop_norm.DIRECTIONS:
        assert harness.measure(drop_norm_case("torch.compile", 0.5, direction), tick).refused is None


def test_drop_mask_row():
    row = harness.measure(drop_norm.make_mask_case(drop_norm.Shape(1, 100, 0.3), torch.float32), tick)
    assert row.refused is None


def test_a_mask_that_drops_too_many_is_refused():
    case = drop_norm.make_mask_case(drop_norm.Shape(1, 100, 0.3), torch.float32)
    job = case.build()
    right, wrong = job.theirs(0)[0], torch.arange(100) >= 31
    with pytest.raises(harness.Refused, match="drops 31 features, not 30"):
        harness.check_parity(case, job, 0, (wrong,), (right,))


@pytest.mark.parametrize(("against", "p"), OPPONENTS)
@pytest.mark.parametrize("which", range(4), ids=["output", "input", "weight", "bias"])
def test_an_error_of_ours_is_found_whatever_the_masks(against, p, which, monkeypatch):
    monkeypatch.setattr(drop_norm, "EXACT_ELEMENTS", 1000)  # ten of forty rows
    case = drop_norm_case(against, p)
    job = case.build()
    ours, theirs = job.ours(1), job.theirs(1)
    harness.check_parity(case, job, 1, ours, theirs)
    bad = [tensor.detach().clone() for tensor in ours]
    bad[which][bad[which].nonzero()[-1][0]] *= 1.01  # a row, or of a vector the last number that no mask made 0
    with pytest.raises(harness.Refused, match="parity"):
        harness.check_parity(case, job, 1, bad, theirs)


@pytest.mark.parametrize(("against", "p"), OPPONENTS[:3])
def test_a_mask_of_another_size_is_found(against, p):
    case = drop_norm_case(against, p, "forward")
    job = case.build()
    with torch.no_grad():
        ours, theirs = job.ours(0), job.theirs(0)
        also = int((ours[0] != 0).all(0).nonzero()[0])
        ours[0][:, also] = 0
        with pytest.raises(harness.Refused, match="our side drops"):
            harness.check_parity(case, job, 0, ours, theirs)


@pytest.mark.parametrize("direction", drop_norm.DIRECTIONS)
@pytest.mark.parametrize("missing", ["dropout", "norm"])
def test_a_torch_side_that_does_something_else_is_refused(direction, missing):
    """Dropout left out, or dropping less; or no normalisation after it."""
    job = (case := drop_norm_case("nn.Dropout+nn.LayerNorm", 0.5, direction)).build()
    side = job.torch_side
    if missing == "dropout":
        side[0].p = 0.4
    else:
        job.torch_side = lambda x: side[0](x) * side[1].weight + side[1].bias
    with torch.set_grad_enabled(case.backward):
        ours, theirs = job.ours(0), job.theirs(0)
    with pytest.raises(harness.Refused, match="torch's side"):
        harness.check_parity(case, job, 0, ours, theirs)


def test_no_time_for_drop_norm_on_another_backend():
    with dlkernels.backend("torch"):
        assert_refused(harness.measure(drop_norm_case("nn.LayerNorm", 0.0), tick), "our kernel did not run")


def test_drop_norm_costs_by_hand():
    shape = drop_norm.Shape(1024, 100, 0.1)
    assert shape.dropped == 10
    assert shape.bytes(False, 4) == 4 * (2 * 1024 * 100 + 2 * 100)
    assert shape.bytes(True, 2) == 2 * (5 * 1024 * 100 + 5 * 100)
    assert shape.flops(False) == 8 * 1024 * 90
    assert shape.flops(True) == 21 * 1024 * 90


def test_drop_norm_notes():
    def row(shape, direction, roof_percent, ours_ms, torch_ms):
        what = {"list": "eval", "shape": shape, "direction": direction, "roof": "copy"}
        return what | {"roof_percent": roof_percent, "ours_ms": ours_ms, "torch_ms": torch_ms}

    rows = [
        row("8192 x 2048", "forward", 80.0, 9.0, 9.0),
        row("1024 x 16384", "forward", 90.0, 9.0, 9.0),
        row("1 x 32", "forward", 1.0, 0.012, 0.01),
        row("1 x 32", "forward+backward", 1.0, 0.07, 0.06),
    ]
    assert drop_norm.notes(rows) == {
        "of copy bandwidth, N*M = 2^24, evaluation, forward": "85 % (least 80 %, 2 rows)",
        "tiny calls, forward": "at most +2.0 us against nn.LayerNorm (1 rows under 50 us)",
    }
    assert drop_norm.notes([{"list": "eval", "reason": "refused"}]) == {}


def test_drop_norm_suites():
    cases = {
        suite: drop_norm.cases(suite, "cpu", torch.float32) for suite in ("quick", "all", *shapes.lists("drop_norm"))
    }
    assert list(cases)[2:] == ["dropout", "reference", "compile", "eval", "mask"]
    assert set(cases["quick"]) <= set(cases["all"])
    assert len(set(cases["all"])) == len(cases["all"]) == sum(len(cases[name]) for name in list(cases)[2:])
    assert {case.name for case in cases["compile"]} == {
        *(f"{N} x {M}" for N in (128, 8192) for M in (256, 1024)),
        "128 x 4096",
    }


# ---- split_linear ---------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("direction", split_linear.DIRECTIONS)
def test_split_linear_rows(splits, direction):
    case = split_linear.make_case("toys", split_linear.Shape(12, 32, 48, splits), direction, torch.float32)
    row = harness.measure(case, tick)
    assert row.refused is None
    assert 0 < row.error_ours < 1e-6


def test_split_linear_parameters_are_the_layers():
    for splits in (1, 2, 4, 8):
        shape = split_linear.Shape(1, 64, 32, splits)
        layer = dlkernels.SplitLinear(64, 32, splits)
        assert shape.parameters == sum(p.numel() for p in layer.parameters())


# ---- reset_gate_rnn ---------------------------------------------------------------------------------


def rnn_case(against, reset="after", direction="forward+backward", dtype=torch.float32, T=6, B=5, I=7, H=18):  # noqa: E741
    shape = reset_gate_rnn.Shape(T, B, I, H, against.endswith("packed"))
    return reset_gate_rnn.make_case("grid", shape, against, reset, direction, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("direction", reset_gate_rnn.DIRECTIONS)
@pytest.mark.parametrize(
    ("against", "reset"),
    [("nn.GRU", "after"), ("nn.GRU packed", "after"), ("nn.RNN", "after"), ("nn.RNN", "before")]
    + [("Python loop", reset) for reset in ("after", "before", "output")],
)
def test_reset_gate_rnn_rows(against, reset, direction, dtype):
    row = harness.measure(rnn_case(against, reset, direction, dtype), tick)
    assert row.refused is None
    assert row.error_ours > 0
    record = report.record(row, ROOFS)
    assert record["ours_us_per_step"] == pytest.approx(1e4 / 6)
    assert "us/step" in report.line(record)


@pytest.mark.parametrize("which", range(7))
def test_an_error_of_our_rnn_is_found(which, monkeypatch):
    def wrong(self, layer, inputs):
        outputs = list(right(self, layer, inputs))
        if layer is self.layer and outputs[0].dtype == torch.float32:
            outputs[which] = outputs[which] * 1.001
        return tuple(outputs)

    right = reset_gate_rnn.RnnJob._run
    monkeypatch.setattr(reset_gate_rnn.RnnJob, "_run", wrong)
    assert_refused(harness.measure(rnn_case("nn.GRU"), tick), "parity", reset_gate_rnn.NAMES[which])


def test_an_nn_rnn_that_does_something_else_is_refused(monkeypatch):
    monkeypatch.setattr(reset_gate_rnn, "TORCH_SIDE", 0.0)
    assert_refused(harness.measure(rnn_case("nn.RNN"), tick), "torch's side is wrong")


def test_no_time_for_the_rnn_on_another_backend():
    with dlkernels.backend("torch"):
        assert_refused(harness.measure(rnn_case("nn.GRU"), tick), "our kernel did not run")


def test_reset_gate_rnn_costs_by_hand():
    shape = reset_gate_rnn.Shape(T=8, B=3, I=5, H=7)
    products = 2 * (8 * 3) * (2 * 7) * (5 + 7)
    assert shape.flops(False) == products
    assert shape.flops(True) == 3 * products
    weights = 2 * 7 * 5 + 2 * 7 * 7 + 4 * 7
    assert shape.bytes(False, 4) == 4 * (8 * 3 * (5 + 7) + weights)
    packed = reset_gate_rnn.Shape(T=8, B=3, I=5, H=7, packed=True)
    assert packed.lengths == [8, 5, 2]
    assert packed.flops(False) == products * 15 / 24


def test_reset_gate_rnn_notes():
    row = {"list": "small", "variant": "nn.GRU, 1.5x ours, after", "direction": "forward", "ours_gflops": 10.0}
    rows = [row | {"ratio": ratio, "ours_us_per_step": 2.0} for ratio in (3.0, 12.0)]
    (text,) = reset_gate_rnn.notes([*rows, {"reason": "refused"}]).values()
    assert text.startswith("4.00 per operation")
    assert "us/step" in text


def test_reset_gate_rnn_suites():
    suites = {
        suite: reset_gate_rnn.cases(suite, "cpu", torch.float32)
        for suite in ("quick", "all", "small", "large", "rest", "packed", "loop", "loop_large", "rnn")
    }
    names = {suite: [(case.name, case.variant, case.direction) for case in rows] for suite, rows in suites.items()}
    assert 10 <= len(names["quick"]) <= 20
    assert set(names["quick"]) <= set(names["all"])
    assert len(set(names["all"])) == len(names["all"])
    assert sum(map(len, names.values())) == 2 * len(names["all"]) + len(names["quick"])
    grid = {name for list_ in ("small", "large", "rest") for name, *_ in names[list_]}
    assert len(grid) == 3 * 4 * 7  # every T, B and H of the grid


# ---- shapes ---------------------------------------------------------------------------------------


def conv2d_shapes(suite, device):
    lines = shapes.select("conv2d", suite, device)
    return [conv2d.Shape(**{key: int(line[key]) for key in conv2d.Shape.__dataclass_fields__}) for line in lines]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_convolution_is_valid_and_fits_into_8_gib(device):
    for shape in conv2d_shapes("all", device):
        assert min(shape.N, shape.P, shape.Q) >= 1
        assert shape.C % shape.groups == shape.K % shape.groups == 0
        assert shape.memory(itemsize=4) <= 8 << 30, shape.name


def test_the_suites():
    assert shapes.lists("conv2d") == ["lenet", "cifar_resnet", "imagenet_resnet", "mobilenet_v2", "odd"]
    assert 10 <= len(conv2d_shapes("quick", "cpu")) <= 14
    everything = conv2d_shapes("all", "cpu")
    assert len(everything) == sum(len(conv2d_shapes(name, "cpu")) for name in shapes.lists("conv2d"))
    assert set(conv2d_shapes("quick", "cpu")) <= set(everything)
    for name in shapes.lists("conv2d"):
        assert len(set(conv2d_shapes(name, "cuda"))) == len(conv2d_shapes(name, "cuda")), f"{name} has a shape twice"


def test_entries_that_the_lists_are_known_for():
    everything = set(conv2d_shapes("all", "cpu"))
    assert conv2d.Shape(8, 512, 7, 7, 512, 3, 3, padding=1) in everything  # ResNet
    assert conv2d.Shape(1, 960, 7, 7, 960, 3, 3, padding=1, groups=960) in everything  # MobileNetV2
    assert conv2d.Shape(4, 1, 161, 700, 32, 5, 20, stride=2) in everything  # DeepBench: the kernel is 5 high, 20 wide
    assert conv2d.Shape(16, 1, 48, 480, 16, 3, 3, padding=1) in everything


@pytest.mark.parametrize("operator", shapes.operators())
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_list_parses(operator, device):
    for line in shapes.select(operator, "all", device):
        assert not any("," in cell for key, cell in line.items() if key != "source")
        assert not any(key.endswith(("_cpu", "_cuda")) for key in line)


def test_drop_norm_and_rnn_sizes_keep_their_limits():
    for device, most in (("cpu", 2**24), ("cuda", 2**28)):
        assert all(int(line["N"]) * int(line["M"]) <= most for line in shapes.select("drop_norm", "all", device))
        for line in shapes.select("reset_gate_rnn", "all", device):
            wide = max(int(line["H"]), 0 if line["I"] == "H" else int(line["I"]))
            assert int(line["T"]) * int(line["B"]) * wide <= 2**27


# ---- files ----------------------------------------------------------------------------------------


@pytest.fixture
def records():
    case = case_of(None)
    fast = harness.Row(
        case, None, harness.Timing(1e-3, 1e-5), harness.Timing(2e-3, 2e-5), 2.0, 1.9, 2.1, 30, 1, 1e-7, 2e-7
    )
    slow = harness.Row(
        case, None, harness.Timing(4e-3, 1e-5), harness.Timing(2e-3, 2e-5), 0.5, 0.4, 0.6, 30, 1, 1e-7, 2e-7
    )
    return [report.record(row, ROOFS) for row in (fast, slow, harness.Row(case, "parity: no"))]


def test_a_record_is_in_physical_units(records):
    assert records[0]["ours_gflops"] == pytest.approx(8 / 1e-3 * 1e-9)
    assert records[0]["ours_gbs"] == pytest.approx(64 / 1e-3 * 1e-9)
    assert records[0]["roof"] == "copy"  # 64 B at 10 GB/s take 6.4 ns, 8 FLOP at 100 GFLOP/s 0.08 ns
    assert records[0]["roof_percent"] == pytest.approx(6.4e-9 / 1e-3 * 100)


def test_summary(records):
    (line,) = report.summarise(records)
    assert line == {
        "list": "toys",
        "format": "plain",
        "direction": "forward",
        "rows": 2,
        "geomean": pytest.approx(1.0),
        "min": 0.5,
        "below_1": 1,
        "surely_below_0.90": 1,
        "refused": 1,
    }
    assert "toys" in report.summary_text(records)


def test_table_round_trip(records, tmp_path):
    path = tmp_path / "t.tsv"
    report.write_table(path, {"processor": "a: b", "operator": "toys"}, ROOFS, records)
    facts, rows = report.read_table(path)
    assert facts["processor"] == "a: b"
    assert "copy_ 10.0 GB/s" in facts["roofs"]
    assert rows[0]["ratio"] == 2.0
    assert rows[2]["reason"] == "parity: no"
    assert "ours_ms" not in rows[2]
    assert report.summarise(rows) == report.summarise(records)


def test_a_long_table_keeps_the_summary(records, tmp_path):
    path = tmp_path / "t.tsv"
    report.write_table(path, {}, ROOFS, records * 50)
    assert report.read_summary(path)[1] == report.summarise(records * 50)
    report.write_table(path, {}, ROOFS, records)
    assert report.read_summary(path)[1] == report.summarise(records)
    assert len(report.read_table(path)[1]) == 3


def test_json_is_json(records, tmp_path):
    path = tmp_path / "r.json"
    report.write_json(path, {"threads": "2"}, ROOFS, {"toys": records[2:]})
    content = json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN and Infinity are not JSON
    assert content["operators"]["toys"]["summary"][0]["geomean"] is None
    assert content["machine"] == {"threads": "2"}


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    report.write_atomically(path, "old")

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        report.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_roofline_is_drawn(records, tmp_path):
    pytest.importorskip("matplotlib")
    report.draw_roofline(tmp_path / "roof.png", ROOFS, records, "toys")
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")


def test_units():
    """A dtype without a unit of its own is computed in float32."""
    assert ROOFS.unit(torch.float32) == ROOFS.unit(torch.float16) == "FMA float32"
    assert ROOFS.unit(torch.bfloat16) == "AMX bfloat16"
    assert ROOFS.seconds(8e9, 1.0, torch.bfloat16) == (0.01, "AMX")


# ---- command line ---------------------------------------------------------------------------------


def parse(*words):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    "words",
    [
        ("conv3d",),
        ("conv2d", "--suite", "nosuch"),
        ("all", "--suite", "nosuch"),
        ("conv2d", "--dtype", "int8"),
        ("conv2d", "--precision", "low"),
        ("conv2d", "--threads", "0"),
        ("conv2d", "--device", "tpu"),
        ("conv2d", "--json", "/no/such/folder/file.json"),
    ],
)
def test_a_wrong_argument_is_one_clear_line_and_status_2(words, capsys):
    assert cli.run(parse(*words)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dlkernels bench: ")
    assert err.count("\n") == 1
    assert words[-1].split("/")[-2 if "/" in words[-1] else -1] in err


@pytest.fixture
def two_cases(monkeypatch):
    monkeypatch.setattr(machine, "measure_roofs", lambda dtype, device: ROOFS)
    monkeypatch.setattr(harness, "make_clock", lambda device: tick)
    jobs = [case_of(Doubling()), case_of(Doubling(wrong=1.0))]
    monkeypatch.setattr(conv2d, "cases", lambda suite, device, dtype: jobs)
    monkeypatch.setattr(cli, "operators", lambda: ["conv2d"])
    return jobs


def test_a_run_prints_writes_and_restores(two_cases, tmp_path, capsys):
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    path, table = tmp_path / "r.json", tmp_path / "r.tsv"
    words = ("conv2d", "--threads", "1", "--precision", "high", "--json", f"{path}", "--table", f"{table}")
    assert cli.run(parse(*words)) == 1  # one row was refused
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before
    out = capsys.readouterr().out
    assert out.count("REFUSED") == 1
    assert "geomean" in out
    content = json.loads(path.read_text())
    assert content["machine"]["threads"] == "1"
    assert content["machine"]["float32 precision"] == "high"
    assert len(content["operators"]["conv2d"]["rows"]) == 2
    facts, rows = report.read_table(table)
    assert {"processor", "cores", "instruction set", "torch", "date", "others", "roofs"} <= set(facts)
    assert len(rows) == 2
    two_cases.pop()
    assert cli.run(parse("all")) == 0


def test_rows_beyond_the_time_are_said_to_be_missing(two_cases, monkeypatch, capsys):
    monkeypatch.setitem(cli.BUDGET_S, "quick", -1.0)
    assert cli.run(parse("conv2d")) == 0
    assert "2 rows were not measured" in capsys.readouterr().out


def test_an_interrupted_run_keeps_what_it_has(two_cases, tmp_path):
    class Cases(list):
        def __iter__(self):
            yield two_cases[0]
            raise KeyboardInterrupt

    conv2d.cases = lambda suite, device, dtype: Cases(two_cases)  # two_cases puts the old one back
    path = tmp_path / "r.json"
    assert cli.run(parse("conv2d", "--json", f"{path}")) == 130
    assert len(json.loads(path.read_text())["operators"]["conv2d"]["rows"]) == 1


def test_the_watch_counts_others():
    watch = machine.Watch()
    sum(range(10**6))
    part = watch.others()
    assert math.isnan(part) or 0 <= part <= 1


def test_a_row_beside_a_busy_neighbour_is_marked(records):
    assert report.disturbed(records[0] | {"others_percent": 30.0})
    assert report.line(records[0] | {"others_percent": 30.0}).endswith("disturbed")
    assert not report.line(records[0] | {"others_percent": 3.0}).endswith("disturbed")


# ---- README tables --------------------------------------------------------------------------------


@pytest.fixture
def readme_tables():
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "tools" / "readme_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def project(tmp_path, records, readme_tables):
    (tmp_path / "bench" / "results").mkdir(parents=True)
    facts = {key: key.upper() for key in ("operator", "dtype", "suite", "threads", "float32 precision", "processor")}
    facts |= {"instruction set": "avx2", "torch": "2.13", "date": "2026-01-02"}
    report.write_table(tmp_path / "bench" / "results" / "toys.tsv", facts, ROOFS, records)
    (tmp_path / "README.md").write_text(f"before\n{readme_tables.BEGIN}\nold\n{readme_tables.END}\nafter\n")
    return tmp_path


def test_readme_tables_replace_and_check(project, readme_tables, capsys):
    assert readme_tables.main(["--check"], project) == 1
    assert "out of date" in capsys.readouterr().err
    assert "old" in (project / "README.md").read_text()
    assert readme_tables.main([], project) == 0
    text = (project / "README.md").read_text()
    assert text.startswith(f"before\n{readme_tables.BEGIN}\nSuite SUITE, DTYPE, ")
    assert text.endswith(f"{readme_tables.END}\nafter\n")
    assert "| OPERATOR | toys | plain | 1.00x (0.50x) |  | 1 of 2 |" in text
    assert readme_tables.main(["--check"], project) == 0


def test_readme_tables_want_their_markers(project, readme_tables, capsys):
    (project / "README.md").write_text("no markers")
    assert readme_tables.main([], project) == 2
    assert "speed:begin" in capsys.readouterr().err
    assert (project / "README.md").read_text() == "no markers"
