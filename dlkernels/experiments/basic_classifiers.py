"""Four ways to recognise an image

How far does each idea get: one template per class, a vote of the most similar images, learned features, and small
filters that look for the same thing everywhere? And does a network on our own convolution kernels learn step by step
what the same network learns on torch's?
"""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor, nn

from dlkernels.experiments import DataError, Options, UsageError, atomic_path, data, training
from dlkernels.experiments.report import COLOURS, Report, figure, interval
from dlkernels.experiments.training import Checkpoint, History, Plan, fit, outputs, say
from dlkernels.learn.basic_classifiers import (
    MLP,
    KNearestNeighbours,
    SmallCNN,
    SoftmaxRegression,
    accuracy,
    confusion_matrix,
    random_shift,
)

NEIGHBOURS = 3
MODEL_FILE = "model.pt"


# ------------------------------------------------------------------------------------------------------ the problem


@dataclass(frozen=True)
class Problem:
    """The images as the classifiers get them.

    Attributes:
        images: as loaded, whole-number pixels.
        x, test_x: (N, channels, size, size) float32 of mean 0 and deviation 1 over the training set, on the device.
        y, test_y: (N,) int64, on the device.
        mean, deviation: of the training pixels, in units of full brightness.
    """

    images: data.Images
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    mean: float
    deviation: float

    @property
    def black(self) -> float:
        """The value of a black pixel in x."""
        return -self.mean / self.deviation


def load(options: Options) -> Problem:
    """Load and standardise the images; the quick and the smoke form take a part of large sets."""
    if options.data in data.SENTENCE_SETS:
        raise UsageError(
            f"'{options.data}' is a set of sentences; this topic needs one of {', '.join(data.IMAGE_SETS)}"
        )
    images = data.images(options.data or "digits", options.root, options.seed)
    unlimited = len(images.train_y) + len(images.test_y)
    images = images.shortened(options.pick(unlimited, 6000, 600), options.pick(unlimited, 1000, 200))
    if images.train_x.shape[2] != images.train_x.shape[3]:
        raise DataError(f"{images.name}: images must be square, these are {images.train_x.shape[2:]}")
    x = torch.tensor(images.train_x, dtype=torch.float32) / images.white
    test_x = torch.tensor(images.test_x, dtype=torch.float32) / images.white
    mean, deviation = x.mean().item(), x.std().item()
    return Problem(
        images=images,
        x=((x - mean) / deviation).to(options.device),
        y=torch.tensor(images.train_y).to(options.device),
        test_x=((test_x - mean) / deviation).to(options.device),
        test_y=torch.tensor(images.test_y).to(options.device),
        mean=mean,
        deviation=deviation,
    )


# -------------------------------------------------------------------------------------------------- the four, trained


@dataclass
class Result:
    """One trained classifier and its answers to the test images.

    Attributes:
        name: of the classifier.
        numbers: how many it had to keep: weights, or pixels.
        seconds: of training.
        predicted: (M,) classes, on the CPU.
        history: of the training, where there was one.
        model: the network, where it is one.
    """

    name: str
    numbers: int
    seconds: float
    predicted: Tensor
    history: History
    model: nn.Module | None = None


def run(options: Options, report: Report) -> None:
    """Train the four, compare layers, and tell what came out."""
    problem = load(options)
    report.data_name = _described(problem.images)
    say(report.data_name)
    results: list[Result] = []
    cnn, twin = _twins(problem, options)
    stages = (
        train_softmax_regression,
        train_nearest_neighbours,
        partial(train_network, name="MLP", model=_mlp(problem, options)),
        partial(train_network, name="CNN", model=cnn),
        partial(train_network, name="CNN on torch.nn", model=twin),
    )
    try:
        for stage in stages:
            result = stage(problem, options)
            results.append(result)
            say(f"  {result.name:24}{_percent(_accuracy(problem, result)):>9}{result.seconds:>9.2f} s")
            if result.history.interrupted:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        report.interrupted = True
        say("Interrupted: writing the report of what is finished.")
    tell(problem, results, options.pick(20, 20, 5), report)
    found = {result.name: result for result in results}
    if "CNN" in found and training.rank() == 0:
        save_model(problem, found["CNN"], options.out / MODEL_FILE)


def train_softmax_regression(problem: Problem, options: Options) -> Result:
    """Softmax regression by gradient descent. Its pixels are 0..1: black must be 0, so that ink alone counts."""
    pixels, test_pixels = _rows(problem.images.train_x), _rows(problem.images.test_x)
    x, test_x = pixels / problem.images.white, test_pixels / problem.images.white
    y = problem.y.cpu()
    model = SoftmaxRegression(x.shape[1], len(problem.images.classes))
    longest_step = 40 / (x * x).sum(dim=1).mean().item()  # the larger the inputs, the steeper the loss
    epochs = max(1, options.pick(6000, 3000, 300) // -(-len(x) // 100))
    generator = torch.Generator().manual_seed(options.seed)
    history = History()
    begin = time.perf_counter()
    for epoch in range(epochs):
        history.loss += model.train_epoch(x, y, longest_step * (1 - epoch / epochs), generator=generator)
        history.epochs.append({"accuracy": accuracy(problem.test_y.cpu(), model.predict(test_x))})
    seconds = time.perf_counter() - begin
    numbers = model.weight.numel() + model.bias.numel()
    result = Result("softmax regression", numbers, seconds, model.predict(test_x), history)
    result.model = _as_linear(model)
    return result


def train_nearest_neighbours(problem: Problem, options: Options) -> Result:
    """k-nearest neighbours on whole-number pixels, so that distances are exact. The time is that of all answers."""
    x, test_x = _rows(problem.images.train_x), _rows(problem.images.test_x)
    begin = time.perf_counter()
    predicted = KNearestNeighbours(NEIGHBOURS).fit(x, problem.y.cpu()).predict(test_x)
    seconds = time.perf_counter() - begin
    return Result(f"{NEIGHBOURS}-nearest neighbours", x.numel(), seconds, predicted, History())


def train_network(problem: Problem, options: Options, name: str, model: nn.Module) -> Result:
    """The MLP or the CNN, on randomly shifted images."""

    def evaluate(network: nn.Module) -> dict[str, float]:
        return {"accuracy": accuracy(problem.test_y, outputs(network, problem.test_x).argmax(dim=1))}

    stem = name.replace(" ", "_").lower()
    history = fit(
        model,
        cross_entropy,
        (problem.x, problem.y),
        plan(len(problem.y), options),
        evaluate=evaluate,
        augment=partial(random_shift, fill=problem.black),
        checkpoint=Checkpoint(options.out / f"{stem}.unfinished.pt", f"{options} {problem.images.name}"),
        label=name,
    )
    predicted = outputs(model, problem.test_x).argmax(dim=1).cpu()
    numbers = sum(parameter.numel() for parameter in model.parameters())
    return Result(name, numbers, sum(history.seconds), predicted, history, model)


def plan(examples: int, options: Options) -> Plan:
    """About 60,000 images in the full form, but at least three epochs; less in the others."""
    epochs = max(options.pick(3, 1, 1), options.pick(60_000, 30_000, 1500) // examples)
    return Plan(epochs, batch_size=128 if examples > 10_000 else 32, seed=options.seed)


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean of -log of the probability that the model gives to the right class."""
    return nn.functional.cross_entropy(model(x), y)


def _mlp(problem: Problem, options: Options) -> MLP:
    torch.manual_seed(options.seed)
    return MLP(problem.x[0].numel(), len(problem.images.classes)).to(options.device)


def _twins(problem: Problem, options: Options) -> tuple[SmallCNN, SmallCNN]:
    """The CNN on our Conv2d, and the same one with the same weights on torch's."""
    torch.manual_seed(options.seed)
    _, channels, size, _ = problem.x.shape
    ours = SmallCNN(channels, size, len(problem.images.classes)).to(options.device)
    theirs = SmallCNN(channels, size, len(problem.images.classes), conv=nn.Conv2d).to(options.device)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    return ours, theirs


def _as_linear(model: SoftmaxRegression) -> nn.Linear:
    """The same map as a layer, for those who draw it."""
    layer = nn.Linear(model.weight.shape[1], model.weight.shape[0])
    layer.load_state_dict({"weight": model.weight, "bias": model.bias})
    return layer


def _rows(images: np.ndarray) -> Tensor:
    """Images (N, channels, H, W) as rows (N, F) of float32."""
    return torch.tensor(images, dtype=torch.float32).flatten(1)


def _accuracy(problem: Problem, result: Result) -> float:
    return accuracy(problem.test_y.cpu(), result.predicted)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.9995 else f"{100 * share:.2f} %"


def _described(images: data.Images) -> str:
    channels, height, width = images.train_x.shape[1:]
    kind = "grey" if channels == 1 else "colour"
    text = (
        f"{images.name}: {len(images.train_y):,} images to learn from, {len(images.test_y):,} to be tested on, "
        f"{width} x {height} {kind} pixels, {len(images.classes)} classes."
    )
    return f"{text} {images.note}".strip()


# ------------------------------------------------------------------------------------------------- what came out of it


def tell(problem: Problem, results: list[Result], compared: int, report: Report) -> None:
    """Fill the report with what is finished; the losses on both layers are compared over `compared` steps."""
    found = {result.name: result for result in results}
    tell_accuracies(problem, [result for result in results if result.name != "CNN on torch.nn"], report)
    if "CNN" in found:
        tell_mistakes(problem, results, found["CNN"], report)
        tell_weights(problem, found, report)
    if "CNN on torch.nn" in found:
        tell_layers(problem, found["CNN"], found["CNN on torch.nn"], compared, report)


def tell_accuracies(problem: Problem, results: list[Result], report: Report) -> None:
    """How good each is, and how it got there."""
    target = problem.test_y.cpu()
    rows, metrics = [], {}
    for result in results:
        right = int((target == result.predicted).sum())
        low, high = interval(right, len(target))
        share = _accuracy(problem, result)
        rows.append(
            (
                result.name,
                f"{result.numbers:,}",
                f"{result.seconds:.2f} s",
                f"{len(target) - right:,} of {len(target):,}",
                _percent(share),
                f"{100 * low:.1f} to {100 * high:.1f} %",
            )
        )
        metrics[result.name] = {"accuracy": share, "seconds": result.seconds, "numbers": result.numbers}
    report.metrics["classifiers"] = metrics
    report.section(
        "How good is each?",
        "All four learned from the same images and were asked about the same others, which none of them had seen. "
        "The interval shows how far luck reaches: some test images are easier than others, and an interval made in "
        "this way holds the accuracy over all images of the kind 95 times out of 100. Where two intervals overlap "
        "widely, these images cannot tell which classifier is better.",
    )
    columns = ("", "numbers it keeps", "time", "mistakes", "accuracy", "95 % interval")
    report.table(
        "The numbers a classifier keeps are its weights; nearest neighbours keeps every pixel it was shown. "
        "Its time is that of answering, the others' that of learning.",
        columns,
        rows,
    )
    if results:
        most = max(_accuracy(problem, result) for result in results)
        best = " and ".join(result.name for result in results if _accuracy(problem, result) == most)
        report.headline(_percent(most), f"of unseen images are recognised by the best, {best}")
        report.headline(_percent(_accuracy(problem, results[0])), f"by the simplest, {results[0].name}")
    trained = [result for result in results if result.history.loss]
    if trained:
        report.figure(
            "curves",
            draw_curves(trained, len(target)),
            "Left: the loss of the batches, smoothed over neighbouring steps, on a logarithmic scale. Right: the share "
            "of mistakes on the test images after each epoch, logarithmic as well, so that halving the mistakes is "
            "always the same distance (no mistake at all is drawn as half a one). Each training runs from 0 to 100 %.",
            "Loss and test error of each classifier during training, falling for all of them.",
        )


def draw_curves(trained: list[Result], test_images: int) -> Any:
    """Loss by step and test error by epoch, both over the course of the training."""
    with figure(9.6, 3.9) as drawn:
        losses, errors = drawn.subplots(1, 2)
        for result in trained:
            colour = _colour(result.name)
            smooth = _smoothed(result.history.loss)
            losses.plot(np.linspace(0, 100, len(smooth)), smooth, color=colour, label=result.name)
            wrong = [100 * max(1 - epoch["accuracy"], 0.5 / test_images) for epoch in result.history.epochs]
            done = np.linspace(0, 100, len(wrong) + 1)[1:]
            thin = -(-len(wrong) // 50) or 1  # at most 50 points, the last among them
            marker = "o" if len(wrong) <= 5 else None
            errors.plot(done[::-thin], wrong[::-thin], color=colour, label=result.name, marker=marker)
        losses.set(yscale="log", xlabel="training done [%]", ylabel="cross-entropy [nats]", title="Loss while learning")
        errors.set(yscale="log", xlabel="training done [%]", ylabel="mistakes [% of test images]", title="Mistakes")
        for axes in (losses, errors):
            _plain_numbers(axes)
        errors.legend()
        return drawn


def tell_mistakes(problem: Problem, results: list[Result], cnn: Result, report: Report) -> None:
    """Who is taken for whom, which classes are hard, and the images themselves."""
    target = problem.test_y.cpu()
    classes = problem.images.classes
    assert cnn.model is not None
    matrix = confusion_matrix(target, cnn.predicted, len(classes))
    probabilities = outputs(cnn.model, problem.test_x).softmax(dim=1).cpu()
    report.metrics["confusion_matrix_of_the_cnn"] = matrix.tolist()
    report.section("Who is taken for whom?")
    wrong = int((target != cnn.predicted).sum())
    report.text(
        f"The CNN made {wrong:,} {'mistake' if wrong == 1 else 'mistakes'} on {len(target):,} test images."
        + (f" {_commonest(matrix, classes)}" if wrong > 1 else "")
    )
    report.figure(
        "confusion",
        draw_confusion(matrix, classes),
        "Rows: what the image is. Columns: what the CNN calls it. The diagonal holds the right answers; every number "
        "beside it is a confusion, and the stronger its colour, the more frequent it is.",
        "Confusion matrix of the CNN with counts.",
    )
    report.figure(
        "by_class",
        draw_errors_by_class(target, [result for result in results if result.name != "CNN on torch.nn"], classes),
        "A class that is high in all colours is hard in itself; one that is high in a single colour shows what that "
        "classifier cannot see. No bar, no mistake.",
        "Share of mistakes for every class and classifier.",
    )
    report.figure(
        "mistakes",
        draw_mistakes(problem, probabilities),
        "The mistakes of which the CNN was most certain (orange: what it says, how sure it is, what it is), followed, "
        "where there is room, by the right answers of which it was least certain (blue). Would you have known?",
        "The test images on which the CNN failed with the highest probability.",
    )


def _commonest(matrix: Tensor, classes: tuple[str, ...]) -> str:
    """The confusions with the highest count, all of them where several share it."""
    confusions = matrix.clone().fill_diagonal_(0)
    count = int(confusions.max())
    if count == 1:
        return "No confusion happened more than once."
    pairs = [f"{classes[i]} taken for {classes[j]}" for i, j in (confusions == count).nonzero().tolist()]
    if len(pairs) > 3:
        return f"The most frequent confusions, {len(pairs)} of them, happened {count} times each."
    return f"The most frequent: {', '.join(pairs)}, {count} times{' each' * (len(pairs) > 1)}."


def draw_confusion(matrix: Tensor, classes: tuple[str, ...]) -> Any:
    """The confusion matrix: the diagonal in grey, confusions in orange by their number."""
    count = len(classes)
    confusions = matrix.clone().fill_diagonal_(0).double().numpy()
    with figure(7.2, 6.4) as drawn:
        axes = drawn.subplots()
        darkest = 1.3 * max(6.0, confusions.max())
        axes.imshow(np.ma.masked_equal(confusions, 0), cmap="Oranges", vmin=-0.15 * darkest, vmax=darkest)
        for i in range(count):
            axes.add_patch(Rectangle((i - 0.5, i - 0.5), 1, 1, facecolor="#e8ecf0"))
            for j in range(count):
                if matrix[i, j]:
                    weight = "normal" if i == j else "bold"
                    axes.text(j, i, f"{int(matrix[i, j])}", ha="center", va="center", fontsize=9.5, weight=weight)
        turned = 45 if max(map(len, classes)) > 3 else 0
        axes.set_xticks(
            range(count), [_plain(name) for name in classes], rotation=turned, ha="right" if turned else "center"
        )
        axes.set_yticks(range(count), [_plain(name) for name in classes])
        axes.set_xticks(np.arange(-0.5, count), minor=True)
        axes.set_yticks(np.arange(-0.5, count), minor=True)
        axes.grid(False)
        axes.grid(True, which="minor", color="#e8ecf0", linewidth=1)
        axes.tick_params(which="both", length=0)
        axes.spines[:].set_visible(False)
        axes.set(xlabel="the CNN says", ylabel="the image is", title="Confusions [number of test images]")
        return drawn


def draw_errors_by_class(target: Tensor, results: list[Result], classes: tuple[str, ...]) -> Any:
    """Bars: the share of mistakes by class, one colour per classifier."""
    sizes = torch.bincount(target, minlength=len(classes)).clamp_min(1)
    with figure(9.6, 3.6) as drawn:
        axes = drawn.subplots()
        width = 0.8 / len(results)
        for number, result in enumerate(results):
            wrong = torch.bincount(target[target != result.predicted], minlength=len(classes))
            places = np.arange(len(classes)) + (number - (len(results) - 1) / 2) * width
            axes.bar(places, (100 * wrong / sizes).numpy(), width * 0.92, color=_colour(result.name), label=result.name)
        axes.set_xticks(range(len(classes)), [_plain(name) for name in classes])
        axes.grid(False, axis="x")
        axes.set(xlabel="class", ylabel="mistakes [% of the class]", title="Which classes are hard?")
        axes.margins(x=0.01)
        axes.legend(ncols=len(results), loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, columnspacing=1.2)
        return drawn


def draw_mistakes(problem: Problem, probabilities: Tensor, rows: int = 2, columns: int = 6) -> Any:
    """The most confident mistakes, then the least confident right answers."""
    target = problem.test_y.cpu()
    certainty, said = probabilities.max(dim=1)
    order = torch.where(said == target, 1 - certainty, 1 + certainty).argsort(descending=True, stable=True)
    classes = problem.images.classes
    with figure(9.6, 2 * rows + 0.2) as drawn:
        axes = drawn.subplots()
        for place, index in enumerate(order[: rows * columns].tolist()):
            answer, truth = _plain(classes[said[index]]), _plain(classes[target[index]])
            title = f"says {answer} ({100 * certainty[index]:.0f} %)\nis {truth}"
            colour = COLOURS[0] if said[index] == target[index] else COLOURS[1]
            picture = problem.images.test_x[index].transpose(1, 2, 0).squeeze() / problem.images.white
            _show(axes, picture, divmod(place, columns), title, colour, cmap="gray", vmin=0, vmax=1)
        return drawn


def tell_weights(problem: Problem, found: dict[str, Result], report: Report) -> None:
    """What the linear model and the CNN's first layer look for."""
    report.section(
        "What do they look for?",
        "Softmax regression keeps one picture per class: it multiplies the image with each and takes the largest sum. "
        "The CNN keeps small filters and moves them over the image; its first layer mostly finds edges and strokes "
        "in different directions, and the layers after it put those together.",
    )
    linear = found["softmax regression"].model
    assert isinstance(linear, nn.Linear)
    templates = linear.weight.detach().reshape(len(problem.images.classes), *problem.images.train_x.shape[1:])
    report.figure(
        "templates",
        draw_weights(templates, [_plain(name) for name in problem.images.classes], "Templates of softmax regression"),
        "Blue: ink here speaks for the class. Red: ink here speaks against it. White: does not matter.",
        "One picture of weights per class.",
    )
    cnn = found["CNN"].model
    assert isinstance(cnn, SmallCNN)
    filters = next(cnn.filters.parameters()).detach().cpu()
    report.figure(
        "filters",
        draw_weights(filters, [f"filter {number}" for number in range(1, len(filters) + 1)], "The CNN's first layer"),
        "Every square is one filter of 3 x 3 weights. It answers strongly where the image is bright under its blue "
        "squares and dark under its red ones.",
        "The filters of the CNN's first layer.",
    )


def draw_weights(weights: Tensor, names: list[str], title: str) -> Any:
    """Weights (count, channels, H, W) as pictures, the channels averaged; one scale for all."""
    pictures = weights.cpu().mean(dim=1).numpy()
    limit = float(np.abs(pictures).max()) or 1.0
    columns = 8 if len(names) > 10 else 5
    rows = -(-len(names) // columns)
    with figure(9.6, 0.6 + rows * 1.25 * 8.3 / columns) as drawn:
        axes = drawn.subplots()
        for place, (picture, name) in enumerate(zip(pictures, names, strict=True)):
            shown = _show(axes, picture, divmod(place, columns), name, cmap="RdBu", vmin=-limit, vmax=limit)
        axes.set_title(title)
        drawn.colorbar(shown, ax=axes, label="weight", shrink=0.85, pad=0.02)
        return drawn


def _show(
    axes: Any, picture: np.ndarray, place: tuple[int, int], title: str, colour: str = "black", **look: Any
) -> Any:
    """Draw a picture with a title at (row, column) of a grid in one pair of axes: far quicker than axes for each."""
    height = 1.25 + 0.17 * title.count("\n")
    left, bottom = 1.08 * place[1], -height * place[0]
    extent = (left, left + 1, bottom, bottom + 1)
    shown = axes.imshow(picture, extent=extent, **look)
    axes.text(left + 0.5, bottom + 1.03, title, ha="center", va="bottom", fontsize=10, color=colour)
    axes.set_axis_off()
    right, top = max(axes.dataLim.x1, left + 1), height
    axes.set(xlim=(0, right), ylim=(bottom - 0.03, top))
    return shown


def tell_layers(problem: Problem, ours: Result, theirs: Result, compared: int, report: Report) -> None:
    """The CNN on our layers against the same one on torch's."""
    compared = min(compared, len(ours.history.loss), len(theirs.history.loss))
    difference = np.abs(np.subtract(ours.history.loss[:compared], theirs.history.loss[:compared])).max()
    milliseconds = [1000 * statistics.median(result.history.seconds) for result in (ours, theirs)]
    report.metrics["layers"] = {
        "largest_difference_of_the_loss": float(difference),
        "compared_steps": compared,
        "milliseconds_per_step": {"dlkernels.Conv2d": milliseconds[0], "torch.nn.Conv2d": milliseconds[1]},
        "loss": {"dlkernels.Conv2d": ours.history.loss, "torch.nn.Conv2d": theirs.history.loss},
    }
    report.headline(
        f"{difference:.0e}" if difference else "0",
        f"largest difference of the loss from torch.nn's in the first {compared} steps",
    )
    say(f"  CNN, a step: {milliseconds[0]:.2f} ms on dlkernels.Conv2d, {milliseconds[1]:.2f} ms on torch.nn.Conv2d")
    apart = f"at most {difference:.1e} apart" if difference else "the same float32 numbers"
    say(f"  CNN, losses of the first {compared} steps: {apart}")
    report.section(
        "The same network on torch.nn",
        "The CNN was trained a second time with torch.nn.Conv2d in the place of dlkernels.Conv2d: the same first "
        "weights, the same batches, the same order. Two correct implementations add up the same products in a "
        "different order, and float32 rounds every sum; so their losses agree to about seven digits at first. "
        "Training then amplifies the difference, as it would amplify any other: after some hundred steps the two are "
        "different networks, equally good.",
    )
    report.table(
        "Both were trained on this machine one after the other, with the same number of threads. The step includes "
        "everything: forward, backward, the linear layers and the optimiser, which are torch's in both.",
        ("", "median time of a step", "accuracy", "loss of the last step"),
        [
            (layer, f"{time_:.2f} ms", _percent(_accuracy(problem, result)), f"{result.history.loss[-1]:.4f}")
            for layer, time_, result in zip(
                ("dlkernels.Conv2d", "torch.nn.Conv2d"), milliseconds, (ours, theirs), strict=True
            )
        ],
    )
    report.figure(
        "layers",
        draw_layers(ours.history.loss, theirs.history.loss, compared),
        "Left: the two losses, smoothed over neighbouring steps; for a long time one covers the other. Right: the "
        "difference of the two losses, step by step, both axes logarithmic. It starts at the rounding of float32 "
        "(dashed), or below where both round to the same number, and training amplifies it.",
        "The loss of the CNN on both layers, and the difference of the two.",
    )


def draw_layers(ours: list[float], theirs: list[float], compared: int) -> Any:
    """The losses of the twins, and how far they are apart."""
    steps = np.arange(1, min(len(ours), len(theirs)) + 1)
    apart = np.abs(np.subtract(ours[: len(steps)], theirs[: len(steps)]))
    rounding = float(np.spacing(np.float32(theirs[0])))
    with figure(9.6, 3.9) as drawn:
        losses, differences = drawn.subplots(1, 2)
        for values, layer, colour, width in (
            (theirs, "torch.nn.Conv2d", COLOURS[4], 5),
            (ours, "dlkernels.Conv2d", COLOURS[0], 1.5),
        ):
            smooth = _smoothed(values[: len(steps)])
            losses.plot(np.linspace(1, len(steps), len(smooth)), smooth, color=colour, linewidth=width, label=layer)
        losses.set(xlabel="step", ylabel="cross-entropy [nats]", title="Loss", yscale="log")
        _plain_numbers(losses)
        losses.legend()
        differences.axvspan(1, compared, color=COLOURS[5], alpha=0.2, linewidth=0, label=f"first {compared} steps")
        differences.axhline(rounding, color=COLOURS[1], linestyle="--", linewidth=1.5, label="one rounding of float32")
        differences.plot(steps, np.maximum(apart, rounding / 8), color=COLOURS[0], linewidth=1, label="difference")
        differences.set(xlabel="step", ylabel="difference [nats]", title="Difference", xscale="log", yscale="log")
        differences.xaxis.set_major_formatter("{x:g}")
        differences.legend(loc="upper left")
        return drawn


def _plain_numbers(axes: Any) -> None:
    """Label a logarithmic axis 0.1, 0.2, 0.5, 1, ..."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _smoothed(values: list[float]) -> np.ndarray:
    """Means of neighbouring values, at most 100 of them."""
    return np.array([part.mean() for part in np.array_split(np.array(values), min(100, len(values)))])


def _colour(name: str) -> str:
    names = ("softmax regression", f"{NEIGHBOURS}-nearest neighbours", "MLP", "CNN")
    return dict(zip(names, (COLOURS[4], COLOURS[3], COLOURS[2], COLOURS[0]), strict=True))[name]


def _plain(name: str) -> str:
    """A class name for matplotlib, in which a dollar sign would start a formula."""
    return name.replace("$", r"\$")


# -------------------------------------------------------------------------------------------------- the trained model


def save_model(problem: Problem, cnn: Result, path: Path) -> None:
    """Keep the CNN, and all that is needed to show it a new image."""
    assert cnn.model is not None
    state = {
        "weights": {name: tensor.cpu() for name, tensor in cnn.model.state_dict().items()},
        "channels": problem.x.shape[1],
        "size": problem.x.shape[2],
        "classes": list(problem.images.classes),
        "mean": problem.mean,
        "deviation": problem.deviation,
        "ink": _ink(problem.images),
        "data": problem.images.name,
    }
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def predict(folder: Path, what: str) -> None:
    """Show how an image is prepared for the CNN of the last run in `folder`, and what the CNN says to it."""
    state = load_model(folder / MODEL_FILE)
    image, steps = prepare(Path(what), state)
    model = SmallCNN(state["channels"], state["size"], len(state["classes"]))
    model.load_state_dict(state["weights"])
    x = (torch.tensor(image, dtype=torch.float32)[None] - state["mean"]) / state["deviation"]
    probabilities = outputs(model, x).softmax(dim=1)[0].tolist()
    print(f"{what}: {', '.join(steps)}. The network, trained on {state['data']}, gets to see this:\n")
    print(_drawn_in_text(image.mean(axis=0)), "\n")
    width = max(map(len, state["classes"]))
    for name, probability in sorted(zip(state["classes"], probabilities, strict=True), key=lambda pair: -pair[1]):
        print(f"  {name:>{width}}  {100 * probability:5.1f} %  {'█' * round(40 * probability)}")


def load_model(path: Path) -> dict[str, Any]:
    """What :func:`save_model` wrote."""
    if not path.is_file():
        raise DataError(f"{path}: no trained model there. Run `dlkernels run basic_classifiers` first, or give --out.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise DataError(f"{path}: not a readable model. Run `dlkernels run basic_classifiers` again.") from error


def prepare(path: Path, state: dict[str, Any]) -> tuple[np.ndarray, list[str]]:
    """Make an image file look like those the network was trained on.

    Returns:
        The image (channels, size, size) of 0..1, and what was done to it, in words.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            picture = _on_white(_in_eight_bits(ImageOps.exif_transpose(opened)))
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing. Give the path of an image file.") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: too many pixels. Make it smaller first.") from error
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable image. Save it as PNG or JPEG.") from error
    size, steps = state["size"], [f"{picture.width} x {picture.height} pixels"]
    if state["channels"] == 3:
        resized = picture.convert("RGB").resize((size, size), Image.Resampling.BOX)
        return np.asarray(resized).transpose(2, 0, 1) / 255, [*steps, f"resized to {size} x {size}"]
    grey = np.asarray(picture.convert("L")) / 255
    steps.append("made grey")
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    if np.median(border) > 0.5:
        grey = 1 - grey
        steps.append("inverted, because its border is bright")
    box = _bounding_box(grey)
    if box is None:
        raise DataError(f"{path}: an empty image, nothing stands out from its background.")
    inner = max(1, round(state["ink"] * size))
    steps.append(f"cut to what is drawn and fitted into {inner} of {size} x {size} pixels")
    return _fitted(grey[box], inner, size)[None], steps


def _in_eight_bits(picture: Any) -> Any:
    """The picture with 0..255 for each colour: 16-bit grey is scaled, which Pillow would cut off at 255."""
    from PIL import Image

    if not picture.mode.startswith("I"):
        return picture
    return Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))


def _on_white(picture: Any) -> Any:
    """The picture without transparency: transparent means paper."""
    from PIL import Image

    if "A" not in picture.getbands() and "transparency" not in picture.info:
        return picture.convert("RGB")
    layered = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")


def _bounding_box(grey: np.ndarray) -> tuple[slice, slice] | None:
    """The smallest box around all that is brighter than a quarter of the brightest; None for a blank."""
    if grey.max() - grey.min() < 0.1:
        return None
    drawn = grey > grey.min() + 0.25 * (grey.max() - grey.min())
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _fitted(grey: np.ndarray, inner: int, size: int) -> np.ndarray:
    """The image scaled to `inner` pixels in its longer direction, in the middle of a black square of `size`."""
    from PIL import Image

    scale = inner / max(grey.shape)
    height, width = (max(1, round(scale * length)) for length in grey.shape)
    small = Image.fromarray((255 * grey).astype(np.uint8)).resize((width, height), Image.Resampling.BOX)
    square = np.zeros((size, size))
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = np.asarray(small) / 255
    return square / max(square.max(), 1e-9)


def _ink(images: data.Images) -> float:
    """How much of the image's side is filled by what is drawn: the median over the training images."""
    sides = []
    for image in images.train_x[:1000]:
        box = _bounding_box(image[0] / images.white)
        if box:
            sides.append(max(side.stop - side.start for side in box) / image.shape[1])
    return float(statistics.median(sides)) if sides else 1.0


def _drawn_in_text(image: np.ndarray) -> str:
    """An image (H, W) of 0..1 in characters, two per pixel, since characters are twice as high as wide."""
    shades = " .:-=+*#%@"
    return "\n".join("  " + "".join(2 * shades[int(9.999 * value)] for value in row) for row in image.clip(0, 1))
