"""Derivatives by bookkeeping, and drawing by two tables

How does loss.backward() find all derivatives in one walk, and is an engine of our own, Python over NumPy, as exact as
torch's? How does torch.multinomial turn uniform random numbers into draws with given weights, how do we know that
they are right, and what does a draw cost when there are a million categories?
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.benchmark import Timer
from tqdm import tqdm

from dlkernels.experiments import Options, UsageError, data
from dlkernels.experiments.report import COLOURS, Report, figure, interval
from dlkernels.experiments.training import rank, say
from dlkernels.learn.autograd import (
    MLP,
    AliasTable,
    InverseCDF,
    Node,
    Scalar,
    Tensor,
    chi_square,
    cross_entropy,
    draw_graph,
    grad,
    multinomial,
    no_grad,
    topological_order,
)

HIDDEN = 64
# Twenty categories, some of them impossible, none of them rare: Pearson's test wants at least five draws of each.
WEIGHTS = torch.tensor(
    [8, 0, 5, 1, 13, 3, 0, 2, 21, 1, 6, 4, 0, 9, 2, 1, 17, 0, 3, 5], dtype=torch.float64
)  # fmt: skip


def run(options: Options, report: Report) -> None:
    """Differentiate, train, sample and measure, in the order in which it should be read."""
    images = load(options)
    sizes = f"{len(images.train_y):,} images to learn from, {len(images.test_y):,} to be tested on."
    note = f" {images.note}" if images.note else ""
    report.data_name = f"{images.name}: {sizes}{note} Derivatives are computed in float64 by NumPy, on the CPU."
    say(report.data_name)
    tell_expression(report)
    tell_orders(options, report)
    tell_training(images, options, report)
    tell_chains(options, report)
    tell_histograms(options, report)
    tell_pairs(options, report)
    tell_cost(options, report)


def load(options: Options) -> data.Images:
    """The images; the quick and the smoke form take a part of large sets."""
    if options.data in data.SENTENCE_SETS:
        raise UsageError(
            f"'{options.data}' is a set of sentences; this topic needs one of {', '.join(data.IMAGE_SETS)}"
        )
    images = data.images(options.data or "digits", options.root, options.seed)
    unlimited = len(images.train_y) + len(images.test_y)
    return images.shortened(options.pick(unlimited, 6000, 600), options.pick(unlimited, 1000, 200))


def _bar(count: int, label: str) -> Any:
    """A progress bar, on a terminal."""
    return tqdm(range(count), desc=label, leave=False, disable=None if rank() == 0 else True)


# ----------------------------------------------------------------------------------------------------- one expression


def expression(x: Any, y: Any) -> Any:
    """The function that is drawn; of Scalars or of torch's tensors."""
    return (x * y + x.sin()) * y.tanh()


def tell_expression(report: Report) -> None:
    """A graph with every value and every derivative, and both derivatives checked."""
    at = (1.5, 0.8)
    x, y = Scalar(at[0], label="x"), Scalar(at[1], label="y")
    output = expression(x, y)
    ours = [float(derivative) for derivative in grad(output, [x, y])]
    leaves = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in at]
    theirs = [derivative.item() for derivative in torch.autograd.grad(expression(*leaves), leaves)]
    step = 1e-6
    slopes = []
    for i in range(2):
        above, below = ([Scalar(v + s * (i == j)) for j, v in enumerate(at)] for s in (step, -step))
        slopes.append((float(expression(*above)) - float(expression(*below))) / (2 * step))
    report.metrics["expression"] = {"ours": ours, "torch": theirs, "finite_differences": slopes}
    report.section(
        "What is a graph?",
        "Computing (x y + sin x) tanh y leaves a trace: which operation made which number of which others. That trace "
        "is the graph. To differentiate, walk it backwards, from the output (whose derivative by itself is 1) to the "
        "inputs. Every node multiplies its own derivative, d, with its local one, and hands the product to its "
        "parents; a node with several children adds up what it gets. One walk gives all derivatives.",
    )
    report.figure(
        "graph",
        draw_expression(output),
        "Every box: the operation or name, the value, and d, the derivative of the output by this node. Blue: inputs. "
        "Green: the output. Check one by hand: the derivative by tanh is the other factor, the value of the sum.",
        "The graph of (x y + sin x) tanh y with values and derivatives.",
    )
    report.table(
        "The derivatives by x and y from our graph, from torch's, and from moving the input by a millionth.",
        ("", "ours", "torch.autograd", "finite difference"),
        [
            (f"d / d{name}", f"{a:.15f}", f"{b:.15f}", f"{c:.9f}")
            for name, a, b, c in zip("xy", ours, theirs, slopes, strict=True)
        ],
    )


def draw_expression(output: Node) -> Any:
    with figure(9.6, 3.2) as drawn:
        draw_graph(output, drawn.subplots())
        return drawn


# ------------------------------------------------------------------------------------------------- higher derivatives


def tell_orders(options: Options, report: Report) -> None:
    """Derivatives of derivatives of tanh, and how the graph grows."""
    x, curves, nodes = repeated_derivatives(options.pick(6, 6, 4))
    exact = exact_derivatives(x, len(curves))
    apart = [float(np.abs(curve - known).max()) for curve, known in zip(curves, exact, strict=True)]
    report.metrics["orders"] = {"largest_difference_from_the_formula": apart, "nodes": nodes}
    say(f"  derivatives of tanh up to order {len(curves) - 1}: at most {max(apart):.0e} from the formula")
    report.section(
        "Can a derivative be differentiated?",
        "Yes, if differentiating is done with the same operations. Here the pullback of tanh is g * (1 - y * y), "
        "written with the engine's own * and -, so the derivative is a graph too, and can be walked again. "
        "The price: every order walks the graph that the one before has left, and leaves a larger one.",
    )
    report.figure(
        "orders",
        draw_orders(x, curves, nodes),
        "Left: tanh and its derivatives, each found by differentiating the graph of the one before, and scaled to a "
        "largest value of 1. Right, in the same colours: how many nodes the graph of each has, constants included, on "
        "a logarithmic axis.",
        "tanh and its derivatives, and the number of nodes of their graphs.",
    )


def repeated_derivatives(highest: int) -> tuple[np.ndarray, list[np.ndarray], list[int]]:
    """x, the derivatives of tanh at x of order 0 to `highest`, and the number of nodes of each one's graph."""
    x = Tensor(np.linspace(-4, 4, 401))
    y = x.tanh()
    curves, nodes = [y.value], [len(topological_order(y))]
    for _ in range(highest):
        (y,) = grad(y.sum(), x, create_graph=True)
        curves.append(y.value)
        nodes.append(len(topological_order(y)))
    return x.value, curves, nodes


def exact_derivatives(x: np.ndarray, count: int) -> list[np.ndarray]:
    """The same by algebra: with t = tanh x, every derivative is a polynomial in t, and d/dx p(t) = p'(t) (1 - t^2)."""
    polynomial, found = np.polynomial.Polynomial([0.0, 1.0]), []
    for _ in range(count):
        found.append(polynomial(np.tanh(x)))
        polynomial = polynomial.deriv() * np.polynomial.Polynomial([1.0, 0.0, -1.0])
    return found


def draw_orders(x: np.ndarray, curves: list[np.ndarray], nodes: list[int]) -> Any:
    with figure(9.6, 3.6) as drawn:
        left, right = drawn.subplots(1, 2, width_ratios=(3, 2))
        for curve in curves:
            left.plot(x, curve / np.abs(curve).max())
        left.set(xlabel="x", ylabel="derivative, scaled to 1", title="Derivatives of tanh")
        right.bar(range(len(nodes)), nodes, color=COLOURS[: len(nodes)])
        right.set(yscale="log", ylim=(1, 3 * nodes[-1]), xlabel="order", ylabel="nodes", title="Size of the graph")
        for order, count in enumerate(nodes):
            right.text(order, count * 1.1, f"{count:,}", ha="center", va="bottom", fontsize=9)
        right.set_xticks(range(len(nodes)))
        right.grid(False, axis="x")
        return drawn


# ---------------------------------------------------------------------------------------------------------- a network


@dataclass
class Training:
    """What happened, step by step, and epoch by epoch.

    Attributes:
        loss: of every batch, before the step.
        accuracy: on the test images, after every epoch.
        difference: of every step, the largest difference between our gradient and torch's at the same weights.
        largest: of every step, the largest entry of torch's gradient.
        ours, theirs: seconds for one forward and backward.
    """

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    difference: list[float] = field(default_factory=list)
    largest: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)


def train(images: data.Images, options: Options) -> Training:
    """Train an MLP by our engine; at every step, ask torch for the gradient at the same weights on the same batch."""
    x, test_x = (part.reshape(len(part), -1) / images.white for part in (images.train_x, images.test_x))
    model = MLP([x.shape[1], HIDDEN, len(images.classes)], seed=options.seed)
    velocity = [np.zeros(parameter.shape) for parameter in model.parameters]
    random = np.random.default_rng(options.seed)
    batch_size = 32 if len(x) < 10_000 else 128
    epochs = max(options.pick(3, 1, 1), options.pick(60_000, 40_000, 3000) // len(x))
    total, found = epochs * (len(x) // batch_size), Training()
    for _ in _bar(epochs, "training"):
        order = random.permutation(len(x))
        for start in range(0, len(x) - batch_size + 1, batch_size):
            batch = order[start : start + batch_size]
            gradients = measured_gradients(model, x[batch], images.train_y[batch], found)
            rate = 0.1 * (1 - len(found.loss) / total)
            for i, (parameter, gradient) in enumerate(zip(model.parameters, gradients, strict=True)):
                velocity[i] = 0.9 * velocity[i] + gradient
                parameter.value = parameter.value - rate * velocity[i]
        with no_grad():
            found.accuracy.append(float((model(test_x).value.argmax(axis=1) == images.test_y).mean()))
    return found


def measured_gradients(model: MLP, x: np.ndarray, y: np.ndarray, found: Training) -> list[np.ndarray]:
    """The gradients of a batch's loss by our engine; everything else about the step is added to `found`."""
    begin = time.perf_counter()
    loss = cross_entropy(model(x), y)
    ours = [gradient.value for gradient in grad(loss, model.parameters)]
    found.ours.append(time.perf_counter() - begin)

    leaves = [torch.tensor(parameter.value, requires_grad=True) for parameter in model.parameters]
    images, labels = torch.tensor(x), torch.tensor(y)
    begin = time.perf_counter()
    hidden = images
    for weight, bias in zip(leaves[:-2:2], leaves[1:-2:2], strict=True):
        hidden = (hidden @ weight + bias).relu()
    expected = torch.nn.functional.cross_entropy(hidden @ leaves[-2] + leaves[-1], labels)
    theirs = [gradient.numpy() for gradient in torch.autograd.grad(expected, leaves)]
    found.theirs.append(time.perf_counter() - begin)

    found.loss.append(loss.item())
    found.difference.append(max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True)))
    found.largest.append(max(float(np.abs(b).max()) for b in theirs))
    return ours


def tell_training(images: data.Images, options: Options, report: Report) -> None:
    """A network that learns by our derivatives, and its gradients beside torch's."""
    found = train(images, options)
    tests = len(images.test_y)
    low, high = interval(round(found.accuracy[-1] * tests), tests)
    milliseconds = [1000 * statistics.median(times) for times in (found.ours, found.theirs)]
    report.metrics["training"] = {
        "accuracy": found.accuracy[-1],
        "interval": [low, high],
        "accuracy_after_each_epoch": found.accuracy,
        "loss": found.loss,
        "steps": len(found.loss),
        "largest_difference_from_torch": max(found.difference),
        "largest_gradient": max(found.largest),
        "milliseconds_per_step": {"ours": milliseconds[0], "torch": milliseconds[1]},
    }
    say(f"  MLP by our engine: {100 * found.accuracy[-1]:.1f} % right after {len(found.loss):,} steps")
    say(f"  its gradients: at most {max(found.difference):.0e} from torch's in all steps")
    report.headline(
        f"{100 * found.accuracy[-1]:.1f} %", "of unseen images are named rightly by a net that our engine trained"
    )
    report.headline(
        f"{max(found.difference):.0e}", f"largest difference from torch's gradient in {len(found.loss):,} steps"
    )
    report.section(
        "Does it train a network?",
        f"An MLP with one hidden layer of {HIDDEN} units and ReLU, trained by gradient descent with momentum. Every "
        "derivative comes from our engine: the same walk, now over arrays. At each step torch is asked for its "
        "gradient at the same weights, on the same batch, and only the difference from ours is kept.",
    )
    report.figure(
        "training",
        draw_training(found),
        "Left: the loss of every batch (thin) and the share of test images that are named wrongly (thick). Right: "
        "the largest difference between an entry of our gradient and of torch's, at every step, with the size of "
        "the gradient itself above it. The two engines add the same products in another order, so they differ by "
        "roundings of float64, some 1e-16 of the largest number involved.",
        "The training of an MLP by our engine, and the difference of its gradients from torch's.",
    )
    report.table(
        "A step: forward and backward of one batch, medians; both in float64 on this machine's CPU. Ours is Python "
        "that calls NumPy for every node, torch's is C++.",
        ("", "time of a step", "largest difference of the gradient", f"accuracy on {tests:,} test images"),
        [
            ("our engine", f"{milliseconds[0]:.2f} ms", f"{max(found.difference):.1e}",
             f"{100 * found.accuracy[-1]:.1f} % ({100 * low:.1f} to {100 * high:.1f} %)"),
            ("torch.autograd", f"{milliseconds[1]:.2f} ms", "", ""),
        ],
    )  # fmt: skip


def draw_training(found: Training) -> Any:
    steps = np.arange(1, len(found.loss) + 1)
    epoch_ends = np.linspace(0, len(steps), len(found.accuracy) + 1)[1:]
    with figure(9.6, 3.9) as drawn:
        left, right = drawn.subplots(1, 2)
        left.plot(steps, found.loss, color=COLOURS[5], linewidth=0.7, label="loss of the batch [nats]")
        wrong = 1 - np.array(found.accuracy)
        left.plot(epoch_ends, wrong, color=COLOURS[1], label="wrong, of the test images [share]")
        left.set(xlabel="step", yscale="log", ylim=(min(found.loss) / 20, None), title="Learning")
        left.legend(loc="lower left")
        right.plot(steps, found.largest, color=COLOURS[5], linewidth=0.7, label="largest entry of the gradient")
        right.axhline(1e-10, color=COLOURS[1], linestyle="--", linewidth=1.5, label="1e-10")
        right.plot(
            steps, np.maximum(found.difference, 1e-19), color=COLOURS[0], linewidth=0.7, label="difference from torch"
        )
        right.set(xlabel="step", yscale="log", ylim=(1e-19, 1e3), title="Our gradient and torch's")
        right.legend(fontsize=9, loc="center right", bbox_to_anchor=(1, 0.6))
        return drawn


# ------------------------------------------------------------------------------------------------------------- depth


def recursive_order(node: Node, met: set[Node], order: list[Node]) -> None:
    """The topological order as most people write it first; Python ends it where a chain is too long."""
    if node not in met:
        met.add(node)
        for parent in node.parents:
            recursive_order(parent, met, order)
        order.append(node)


def chain(length: int) -> tuple[Scalar, Scalar]:
    """A Scalar, and the last of `length` operations that follow from it one after the other."""
    x = Scalar(1.0)
    y = x
    for _ in range(length // 2):
        y = y * 0.9999 + 0.1
    return x, y


def tell_chains(options: Options, report: Report) -> None:
    """Chains of up to a hundred thousand operations, forward and backward, by a walk without recursion."""
    lengths = [10**power for power in range(2, options.pick(5, 5, 4) + 1)]
    forward, backward = [], []
    for length in lengths:
        begin = time.perf_counter()
        x, y = chain(length)
        forward.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        y.backward()
        backward.append(time.perf_counter() - begin)
        assert x.grad is not None
        assert math.isclose(float(x.grad), 0.9999 ** (length // 2), rel_tol=1e-8)
    limit = longest_by_recursion()
    report.metrics["chains"] = {
        "length": lengths,
        "forward": forward,
        "backward": backward,
        "longest_by_recursion": limit,
    }
    say(f"  chain of {lengths[-1]:,} operations: {forward[-1]:.2f} s forward, {backward[-1]:.2f} s backward")
    report.section(
        "How deep may a graph be?",
        "The walk visits every node once, so its time grows in proportion to the graph. The usual way to write it, a "
        f"function that calls itself for every parent, ends in a RecursionError: here at a chain of {limit:,} "
        f"operations, because Python allows {sys.getrecursionlimit():,} calls inside each other. Ours keeps the nodes "
        "that wait in a list of its own, and the limit is memory.",
    )
    report.figure(
        "chains",
        draw_chains(lengths, forward, backward, limit),
        "Time to build a chain of operations and to walk it backwards, both axes logarithmic. The dashed line is where "
        "a recursive walk stopped.",
        "Time against the length of a chain.",
    )


def longest_by_recursion() -> int:
    """How many operations a chain may have for the recursive walk, to the nearest 10."""

    def fails(length: int) -> bool:
        try:
            recursive_order(chain(length)[1], set(), [])
        except RecursionError:
            return True
        return False

    lengths = range(0, 2 * sys.getrecursionlimit(), 10)
    return lengths[bisect_left(lengths, True, key=fails) - 1]


def draw_chains(lengths: list[int], forward: list[float], backward: list[float], limit: int) -> Any:
    with figure(9.6, 3.4) as drawn:
        axes = drawn.subplots()
        axes.plot(lengths, forward, "o-", color=COLOURS[5], label="build the chain")
        axes.plot(lengths, backward, "s-", color=COLOURS[0], label="walk it backwards")
        axes.axvline(limit, color=COLOURS[1], linestyle="--", linewidth=1.5, label="end of a recursive walk")
        axes.set(xscale="log", yscale="log", xlabel="operations in the chain", ylabel="seconds", title="Depth")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend()
        return drawn


# ---------------------------------------------------------------------------------------------------------- histograms

Draw = Callable[[torch.Tensor, int, torch.Generator], torch.Tensor]

SAMPLERS: dict[str, Draw] = {
    "inverse CDF": lambda weights, count, generator: multinomial(weights, count, True, generator=generator),
    "alias table": lambda weights, count, generator: AliasTable(weights).draw(count, generator),
    "torch.multinomial": lambda weights, count, generator: torch.multinomial(weights, count, True, generator=generator),
}
SAMPLER_COLOURS = dict(zip(SAMPLERS, (COLOURS[0], COLOURS[4], COLOURS[2]), strict=True))


def slightly_wrong(weights: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """A sampler with a flaw, to see whether the test notices: the heaviest category is five percent too heavy."""
    wrong = weights.clone()
    wrong[wrong.argmax()] *= 1.05
    return multinomial(wrong, count, True, generator=generator)


def _generator(options: Options, stream: int) -> torch.Generator:
    return torch.Generator(options.device).manual_seed(1000 * options.seed + stream)


def tell_histograms(options: Options, report: Report) -> None:
    """Do the draws have the right frequencies?"""
    count = options.pick(10**6, 10**6, 10**5)
    repeats = options.pick(2000, 500, 25)
    weights = WEIGHTS.to(options.device)
    rows, counts = [], {}
    for stream, (name, draw) in enumerate(SAMPLERS.items()):
        drawn = draw(weights, count, _generator(options, stream))
        counts[name] = torch.bincount(drawn, minlength=len(WEIGHTS)).cpu()
        statistic, p_value = chi_square(counts[name], WEIGHTS)
        impossible = int(counts[name][WEIGHTS == 0].sum())
        rows.append((name, f"{statistic:.1f}", f"{p_value:.3f}", impossible))
        report.metrics.setdefault("histograms", {})[name] = {
            "counts": counts[name].tolist(),
            "chi_square": statistic,
            "p_value": p_value,
            "draws_of_weight_0": impossible,
        }
        say(f"  {count:,} draws by {name}: chi-square {statistic:.1f}, p = {p_value:.3f}")
    freedom = int((WEIGHTS > 0).sum()) - 1
    report.section(
        "Are the draws right?",
        f"{len(WEIGHTS)} categories with the given weights, {int((WEIGHTS == 0).sum())} of them 0; {count:,} draws by "
        "each of three samplers. Two are ours: the inverse CDF lays the weights end to end and looks where a random "
        "point falls; the alias table looks once into a bucket that holds at most two categories.",
        "A right sampler does not hit its probabilities exactly: a count with mean m strays by about the square root "
        "of m. Pearson's chi-square adds up how far all counts strayed, in these units, and p says how often a right "
        f"sampler strays at least as far. Around {freedom} is normal here ({freedom} degrees of freedom); p below "
        "0.001 would be a reason to look for a mistake.",
    )
    report.table(
        f"{count:,} draws each.",
        ("", f"chi-square ({freedom} degrees of freedom)", "p", "draws of a category of weight 0"),
        rows,
    )
    report.figure(
        "histograms",
        draw_histograms(counts, count),
        "Top: how often each category was drawn (bars, inverse CDF), and its probability (dots). Bottom: how far the "
        "count of each sampler is from its mean, in standard deviations. About one in twenty should lie outside of the "
        "dotted lines, and three in a thousand outside of the grey band. Crosses: weight 0, never drawn.",
        "Frequencies of the draws beside the probabilities, and their deviations.",
    )
    tell_p_values(repeats, options, report)


def draw_histograms(counts: dict[str, torch.Tensor], total: int) -> Any:
    p = (WEIGHTS / WEIGHTS.sum()).numpy()
    places = np.arange(len(p))
    with figure(9.6, 5.0) as drawn:
        top, bottom = drawn.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        top.bar(places, counts["inverse CDF"].numpy() / total, color=COLOURS[5], label="drawn, share")
        top.plot(places, p, "o", color="black", markersize=4, label="probability")
        top.plot(places[p == 0], p[p == 0], "x", color=COLOURS[1], markersize=8, label="weight 0")
        top.set(ylabel="share of the draws", title=f"{total:,} draws")
        top.legend()
        bottom.axhspan(-3, 3, color="#eef1f4")
        for line in (-1.96, 1.96):
            bottom.axhline(line, color="#5f6b76", linestyle=":", linewidth=1)
        possible = p > 0
        deviation = np.sqrt(total * p * (1 - p))[possible]
        for shift, (name, drawn_counts) in zip((-0.2, 0, 0.2), counts.items(), strict=True):
            strayed = (drawn_counts.numpy() - total * p)[possible] / deviation
            bottom.plot(places[possible] + shift, strayed, "o", markersize=5, color=SAMPLER_COLOURS[name], label=name)
        bottom.set(xlabel="category", ylabel="standard deviations", ylim=(-4.2, 4.2))
        bottom.set_xticks(places)
        drawn.legend(*bottom.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return drawn


def tell_p_values(repeats: int, options: Options, report: Report) -> None:
    """One p-value says little; the p-values of many runs must be spread evenly."""
    size = 20_000
    weights = WEIGHTS.to(options.device)
    p_values: dict[str, list[float]] = {}
    for stream, (name, draw) in enumerate({**SAMPLERS, "a flawed sampler": slightly_wrong}.items()):
        generator = _generator(options, 10 + stream)
        p_values[name] = []
        for _ in _bar(repeats, name):
            counts = torch.bincount(draw(weights, size, generator), minlength=len(WEIGHTS)).cpu()
            p_values[name].append(chi_square(counts, WEIGHTS)[1])
    # Kolmogorov and Smirnov: the largest distance from evenly spread, which a right sampler exceeds once in a hundred.
    allowed = 1.63 / math.sqrt(repeats)
    distance = {name: _distance_from_uniform(values) for name, values in p_values.items()}
    report.metrics["p_values"] = {"repeats": repeats, "allowed": allowed, "distance": distance}
    report.text(
        "One p says little: a small flaw can hide in it. So each sampler was tested "
        f"{repeats:,} times, with {size:,} draws each. If it is right, all values of p from 0 to 1 are equally "
        "frequent. A fourth sampler was put among them on purpose: its heaviest category is five percent too heavy."
    )
    report.figure(
        "p_values",
        draw_p_values(p_values, allowed),
        "The share of tests with a p up to the value on the axis. A right sampler follows the diagonal; it leaves the "
        "grey band, anywhere, in one of a hundred experiments like this. The flawed one has too many small values.",
        "Distribution of the p-values of many chi-square tests for four samplers.",
    )


def _distance_from_uniform(values: list[float]) -> float:
    ordered, count = np.sort(values), len(values)
    return float(max((np.arange(1, count + 1) / count - ordered).max(), (ordered - np.arange(count) / count).max()))


def draw_p_values(p_values: dict[str, list[float]], allowed: float) -> Any:
    with figure(9.6, 4.2) as drawn:
        axes = drawn.subplots()
        axes.fill_between([0, 1], [-allowed, 1 - allowed], [allowed, 1 + allowed], color="#e3e7eb", label="chance")
        for name, values in p_values.items():
            share = np.arange(1, len(values) + 1) / len(values)
            axes.step(np.sort(values), share, where="post", color=SAMPLER_COLOURS.get(name, COLOURS[1]), label=name)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="p", ylabel="share of tests with at most this p", title="Many tests")
        axes.legend(loc="lower right")
        return drawn


# ------------------------------------------------------------------------------------------------- without replacement


def tell_pairs(options: Options, report: Report) -> None:
    """Pairs that are drawn without replacement, against their exact probabilities."""
    count = options.pick(10**6, 10**6, 10**5)
    weights = torch.tensor([1, 2, 3, 5, 8, 0, 13], dtype=torch.float64)
    exact = pair_probabilities(weights)
    rows, counts = [], {}
    for stream, (name, function) in enumerate({"ours": multinomial, "torch.multinomial": torch.multinomial}.items()):
        generator = _generator(options, 20 + stream)
        drawn = function(weights.to(options.device).expand(count, -1), 2, generator=generator)
        codes = drawn[:, 0] * len(weights) + drawn[:, 1]
        counts[name] = torch.bincount(codes, minlength=len(weights) ** 2).cpu().reshape(exact.shape)
        statistic, p_value = chi_square(counts[name].flatten(), exact.flatten())
        twice = int(counts[name].diagonal().sum())
        rows.append((name, f"{statistic:.1f}", f"{p_value:.3f}", twice))
        report.metrics.setdefault("pairs", {})[name] = {"chi_square": statistic, "p_value": p_value, "twice": twice}
    freedom = int((exact > 0).sum()) - 1
    report.section(
        "And without replacement?",
        "Now a category that was drawn is gone: the probability of first i, then j is w_i / W times w_j / (W - w_i). "
        "Nothing needs to be taken out and added up again for that. Let every category start to run, and arrive after "
        "an exponential time divided by its weight; the first to arrive are the draws, in order, and a category of "
        "weight 0 never arrives. One sort, all draws.",
    )
    report.table(
        f"{count:,} pairs.",
        ("", f"chi-square ({freedom} degrees of freedom)", "p", "the same category twice"),
        rows,
    )
    report.figure(
        "pairs",
        draw_pairs(counts["ours"].numpy(), exact.numpy(), weights.int().tolist()),
        "Left: how many percent of our pairs were first i (row), then j (column). The diagonal and everything of the "
        "category of weight 0 are empty. Right: by how many standard deviations each count misses its mean.",
        "Frequencies of ordered pairs drawn without replacement, and their deviations from the exact probabilities.",
    )


def pair_probabilities(weights: torch.Tensor) -> torch.Tensor:
    """(K, K): of drawing first i, then j, without replacement."""
    total = weights.sum()
    exact = weights[:, None] / total * weights[None, :] / (total - weights[:, None])
    return exact.fill_diagonal_(0)


def draw_pairs(counts: np.ndarray, exact: np.ndarray, weights: list[int]) -> Any:
    total = counts.sum()
    deviation = np.sqrt(total * exact * (1 - exact))
    strayed = np.divide(counts - total * exact, deviation, out=np.full(exact.shape, np.nan), where=exact > 0)
    with figure(9.6, 4.2) as drawn:
        for axes, values, look, title, form in zip(
            drawn.subplots(1, 2),
            (np.where(counts > 0, 100 * counts / total, np.nan), strayed),
            ({"cmap": "Blues", "vmin": 0}, {"cmap": "RdBu", "vmin": -4, "vmax": 4}),
            ("Share of the pairs [%]", "Deviation [standard deviations]"),
            (".1f", "+.1f"),
            strict=True,
        ):
            axes.imshow(values, **look)
            limit = np.nanmax(np.abs(values))
            for (i, j), value in np.ndenumerate(values):
                if np.isfinite(value):
                    dark = abs(value) > 0.6 * (4 if form == "+.1f" else limit)
                    axes.text(
                        j,
                        i,
                        f"{value:{form}}",
                        ha="center",
                        va="center",
                        fontsize=9,
                        color="white" if dark else "black",
                    )
            axes.set(xlabel="weight of the second", ylabel="weight of the first", title=title)
            axes.set_xticks(range(len(weights)), weights)
            axes.set_yticks(range(len(weights)), weights)
            axes.grid(False)
        return drawn


# ---------------------------------------------------------------------------------------------------------------- cost


def tell_cost(options: Options, report: Report) -> None:
    """What a draw costs, and what its table costs, against the number of categories."""
    sizes = [4**power for power in range(1, options.pick(11, 10, 5) + 1)]
    draws, seconds = options.pick(10**5, 10**5, 10**4), options.pick(200, 30, 1) / 1000
    cost: dict[str, dict[str, list[float]]] = {name: {"draw": [], "setup": []} for name in SAMPLERS}
    for size in (sizes[i] for i in _bar(len(sizes), "categories")):
        weights = torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(options.seed))
        for name, (setup, draw) in measured_cost(weights.to(options.device), draws, seconds).items():
            cost[name]["setup"].append(setup)
            cost[name]["draw"].append(draw)
    report.metrics["cost"] = {"categories": sizes, "draws_per_call": draws, "seconds": cost}
    inverse, alias, theirs = (cost[name]["draw"][-1] * 1e9 for name in SAMPLERS)
    say(f"  a draw from {sizes[-1]:,}: {inverse:.0f} ns inverse CDF, {alias:.0f} ns alias, {theirs:.0f} ns torch")
    report.headline(
        f"{alias:.0f} ns", f"a draw from {sizes[-1]:,} categories by the alias table; inverse CDF {inverse:.0f} ns"
    )
    report.section(
        "What does a draw cost?",
        "The inverse CDF searches: with twice as many categories, one more comparison per draw, and from some size on "
        "every comparison waits for memory. The alias table looks once, at a random place, however many categories "
        "there are; only the time for reaching that place grows, when the table no longer fits into the processor's "
        "caches. "
        f"Draws were made {draws:,} at a time.",
        "Both need a table first. torch.multinomial builds its table (also a running sum) in every call; so its "
        "setup is the time of a call for two draws, and its draw what a longer call takes beyond that.",
        *break_even(sizes[-1], cost),
    )
    report.figure(
        "cost",
        draw_cost(sizes, cost),
        f"Left: time of one draw when the table is there, on a logarithmic axis of categories; {_threads()}. Right: "
        "time to build the table.",
        "Cost of a draw, and of the table, against the number of categories.",
    )
    shown = range(0, len(sizes), 3) if len(sizes) > 6 else range(len(sizes))
    report.table(
        "Draws are what one draw takes when the table is there; medians of repeated calls.",
        ("categories", *(f"draw: {name} [ns]" for name in SAMPLERS), *(f"table: {name} [µs]" for name in SAMPLERS)),
        [
            (
                f"{sizes[i]:,}",
                *(f"{cost[name]['draw'][i] * 1e9:.1f}" for name in SAMPLERS),
                *(f"{cost[name]['setup'][i] * 1e6:.0f}" for name in SAMPLERS),
            )
            for i in shown
        ],
    )


def break_even(size: int, cost: dict[str, dict[str, list[float]]]) -> list[str]:
    """After how many draws the alias table has earned back its setup, in a sentence; nothing where it never does."""
    inverse, alias = (cost[name] for name in ("inverse CDF", "alias table"))
    saved = inverse["draw"][-1] - alias["draw"][-1]
    extra = alias["setup"][-1] - inverse["setup"][-1]
    if saved <= 0 or extra <= 0:
        return []
    draws = float(f"{extra / saved:.1g}")
    return [
        f"Building the alias table takes longer. With {size:,} categories it has earned that back after some "
        f"{draws:,.0f} draws from the same weights; for fewer, the inverse CDF is the better choice."
    ]


def measured_cost(weights: torch.Tensor, draws: int, seconds: float) -> dict[str, tuple[float, float]]:
    """Seconds for the table and for one draw, for each of SAMPLERS."""
    inverse, alias = InverseCDF(weights), AliasTable(weights)
    torch_setup = _time(lambda: torch.multinomial(weights, 2, True), seconds)
    torch_call = _time(lambda: torch.multinomial(weights, draws + 2, True), seconds)
    return {
        "inverse CDF": (
            _time(lambda: InverseCDF(weights), seconds),
            _time(lambda: inverse.draw(draws), seconds) / draws,
        ),
        "alias table": (_time(lambda: AliasTable(weights), seconds), _time(lambda: alias.draw(draws), seconds) / draws),
        "torch.multinomial": (torch_setup, (torch_call - torch_setup) / draws),
    }


def _time(function: Callable[[], Any], seconds: float) -> float:
    """The median time of a call."""
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median


def _threads() -> str:
    return f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def draw_cost(sizes: list[int], cost: dict[str, dict[str, list[float]]]) -> Any:
    with figure(9.6, 4.0) as drawn:
        left, right = drawn.subplots(1, 2)
        for name, found in cost.items():
            left.plot(sizes, np.array(found["draw"]) * 1e9, "o-", color=SAMPLER_COLOURS[name], label=name)
            right.plot(sizes, np.array(found["setup"]) * 1e6, "o-", color=SAMPLER_COLOURS[name], label=name)
        left.set(xscale="log", xlabel="categories", ylabel="time of one draw [ns]", title="A draw")
        left.set_ylim(bottom=0)
        right.set(xscale="log", yscale="log", xlabel="categories", ylabel="time of the table [µs]", title="The table")
        right.yaxis.set_major_formatter("{x:,.0f}")
        left.legend()
        return drawn
