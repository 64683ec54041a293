"""A number as ten classes, and as a hundred

A classifier can predict a number, too: cut the target into classes of equal size and let it choose one. How does the
accuracy change when ten classes become a hundred? What can a network learn when the answer itself is among its inputs,
and why does that not settle it? And how much of a published accuracy is luck?
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dlkernels.experiments import DataError, Options, UsageError, data
from dlkernels.experiments.report import COLOURS, Report, figure
from dlkernels.experiments.training import Plan, fit, outputs, rank, say
from dlkernels.learn.basic_classifiers import MLP, confusion_matrix
from dlkernels.learn.deciles_vs_percentiles import (
    DataLoader,
    DropNormMLP,
    OrdinalHead,
    QuantileEncoding,
    Standardiser,
    TabularDataset,
    class_values,
    folds,
    quantile_labels,
)

FOLDS = 5
WANTED = (10, 100)  # deciles and percentiles
QUESTIONS = tuple((with_target, n) for with_target in (True, False) for n in WANTED)
SWEPT = {"full": (2, 3, 5, 20, 30, 50, 70), "quick": (2, 5, 30), "smoke": (30,)}
LARGE = 5000  # rows from which on a table is trained in larger batches, and less often
MOST_CATEGORIES = 50


# -------------------------------------------------------------------------------------------------------- the problem


@dataclass(frozen=True)
class Problem:
    """One table, twice.

    Attributes:
        name: for people.
        without: the table as it should be used.
        with_target: the same rows, the target among the features.
    """

    name: str
    without: TabularDataset
    with_target: TabularDataset

    def table(self, with_target: bool) -> TabularDataset:
        """One of the two."""
        return self.with_target if with_target else self.without


def load(options: Options) -> Problem:
    """The diabetes set, or the file that --data names; the quick and the smoke form take a part of large tables."""
    table = data.diabetes() if options.data is None else data.read_table(_path(options.data, options.root))
    target = _target(table)
    features = [name for name in table.columns if name != target]
    categorical = [name for name in features if _is_text(table.columns[name])]
    for name in categorical:
        if len(np.unique(table.columns[name])) > MOST_CATEGORIES:
            raise DataError(f"{table.name}: the column {name!r} has more than {MOST_CATEGORIES} different texts.")
    try:
        tables = [
            TabularDataset(table.columns, target, names, categorical=categorical)
            for names in (features, [*features, target])
        ]
    except ValueError as error:
        raise DataError(f"{table.name}: {error}.") from error
    if len(tables[0]) < 10 * FOLDS or tables[0].y.min() == tables[0].y.max():
        raise DataError(f"{table.name}: expected at least {10 * FOLDS} rows with different values of {target!r}.")
    y = tables[0].y
    if (y == y.max()).double().mean() > 0.4:  # then the median of four fifths of the rows may be the largest
        raise DataError(f"{table.name}: the largest {target!r} is that of too many rows for classes of equal size.")
    order = torch.randperm(len(tables[0]), generator=torch.Generator().manual_seed(options.seed))
    part = order[: options.pick(len(order), 2000, 300)]
    return Problem(table.name, tables[0].subset(part), tables[1].subset(part))


def _path(source: str, root: Path | None) -> Path:
    """The file as it is given, or below one of the folders with data."""
    folders = (Path(), root, Path(os.environ.get("DLKERNELS_DATA", "")))
    for path in [folder / Path(source).expanduser() for folder in folders if folder]:
        if path.is_file():
            return path
    raise UsageError(f"'{source}' is not a file; this topic needs a table as .csv, .tsv or .txt, or nothing")


def _target(table: data.Table) -> str:
    """The column called target, or else the last one of numbers."""
    numbers = [name for name, column in table.columns.items() if not _is_text(column)]
    if not numbers:
        raise DataError(f"{table.name}: there is no column of numbers to predict.")
    return "target" if "target" in numbers else numbers[-1]


def _is_text(column: np.ndarray) -> bool:
    """Whether no cell of a column is a number. One with both is a mistake, which TabularDataset finds."""
    return column.dtype.kind == "U" and not any(_parses(cell) for cell in column.tolist())


def _parses(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


# -------------------------------------------------------------------------------------------------------- the methods


@dataclass(frozen=True)
class Fold:
    """What a method gets: standardised features, and the target as numbers and as classes.

    Attributes:
        x, y, labels: of the training rows: (N, F), (N,) and (N,).
        test_x, test_y, test_labels: of the test rows.
        edges, classes: of the labels, learned from the training rows.
        values: (classes,) what is guessed for a class, in the target's unit: its training rows' median.
    """

    x: Tensor
    y: Tensor
    labels: Tensor
    test_x: Tensor
    test_y: Tensor
    test_labels: Tensor
    edges: Tensor
    classes: int
    values: Tensor


def make_fold(table: TabularDataset, n: int, train: Tensor, test: Tensor) -> Fold:
    """Cut the target into n classes and standardise the features, by the training rows only."""
    labels, edges, classes = quantile_labels(table.y, n, train)
    standardise = Standardiser(table.x[train])
    (x, y), (test_x, test_y) = (
        next(iter(DataLoader(table.subset(rows), len(rows), standardise=standardise))) for rows in (train, test)
    )
    values = class_values(y, labels[train], classes)
    return Fold(x, y, labels[train], test_x, test_y, labels[test], edges, classes, values)


Answer = tuple[Tensor, Tensor]  # (M,) classes and (M,) values in the target's unit, of the test rows
Method = Callable[[Fold, Options], Answer]


def middle_class(fold: Fold, options: Options) -> Answer:
    """Chance: always the same class, the one in the middle."""
    said = torch.full_like(fold.test_labels, fold.classes // 2)
    return said, fold.values[said]


def ridge(fold: Fold, options: Options) -> Answer:
    """Regression first, classes afterwards: y = x w + b with the smallest |y - x w - b|^2 + |w|^2."""
    x, mean = fold.x.double(), fold.y.double().mean()
    penalty = torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(x.T @ x + penalty, x.T @ (fold.y.double() - mean))
    return _binned(fold, fold.test_x.double() @ weight + mean)


def boosted_trees(fold: Fold, options: Options) -> Answer:
    """Regression by scikit-learn's gradient boosting, classes afterwards."""
    from sklearn.ensemble import HistGradientBoostingRegressor
    from threadpoolctl import threadpool_limits

    model = HistGradientBoostingRegressor(random_state=options.seed)
    with threadpool_limits(1 if len(fold.x) <= LARGE else None):  # on few rows, threads mostly wait for each other
        model.fit(fold.x.numpy(), fold.y.numpy())
        return _binned(fold, torch.from_numpy(model.predict(fold.test_x.numpy())))


def logistic_regression(fold: Fold, options: Options) -> Answer:
    """scikit-learn's: a linear softmax classifier, trained to the end, its weights kept small."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=2000).fit(fold.x.numpy(), fold.labels.numpy())
    said = torch.from_numpy(model.predict(fold.test_x.numpy()))
    return said, fold.values[said]


def _binned(fold: Fold, value: Tensor) -> Answer:
    value = value.to(fold.edges.dtype)
    return torch.bucketize(value, fold.edges), value


def linear(fold: Fold) -> nn.Module:
    """One score for each class, linear in the features."""
    return nn.Linear(fold.x.shape[1], fold.classes)


def mlp(fold: Fold) -> nn.Module:
    """Features by their quantiles, two hidden layers."""
    encode = QuantileEncoding(fold.x)
    return nn.Sequential(encode, MLP(encode.width, fold.classes))


def drop_norm_mlp(fold: Fold) -> nn.Module:
    """The same with DropNorm."""
    encode = QuantileEncoding(fold.x)
    return nn.Sequential(encode, DropNormMLP(encode.width, fold.classes))


def ordinal(fold: Fold) -> nn.Module:
    """One score for all classes, linear in the features, and ordered thresholds."""
    return OrdinalHead(fold.x.shape[1], fold.classes)


NETS: dict[str, tuple[Callable[[Fold], nn.Module], float]] = {  # and the learning rate
    "linear": (linear, 0.1),
    "MLP": (mlp, 3e-3),
    "MLP, DropNorm": (drop_norm_mlp, 3e-3),
    "ordinal": (ordinal, 0.1),
}


def trained(name: str) -> Method:
    """A net as a method: train it on the classes, and let it choose."""

    def method(fold: Fold, options: Options) -> Answer:
        build, rate = NETS[name]
        torch.manual_seed(options.seed)
        model = build(fold).to(options.device)
        batch = (fold.x.to(options.device), fold.labels.to(options.device))
        history = fit(model, cross_entropy, batch, plan(len(fold.x), rate, options), label=name)
        if history.interrupted:
            raise KeyboardInterrupt
        said = outputs(model, fold.test_x.to(options.device)).argmax(dim=1).cpu()
        return said, fold.values[said]

    return method


def plan(rows: int, rate: float, options: Options) -> Plan:
    """Some hundred steps for a small table, a fixed number of epochs for a large one."""
    if rows > LARGE:
        return Plan(epochs=25, batch_size=256, learning_rate=rate, seed=options.seed)
    batch_size = min(64, rows // 2 * 2)
    steps = options.pick(400, 80, 10)
    return Plan(max(1, steps * batch_size // rows), batch_size, rate, seed=options.seed)


def cross_entropy(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """The mean of -log of the probability that the model gives to the right class."""
    return nn.functional.cross_entropy(model(x), labels)


def methods(problem: Problem, n: int, options: Options) -> dict[str, Method]:
    """Name and method, simplest first. scikit-learn takes seconds to load and, with many classes, minutes to fit."""
    found: dict[str, Method] = {"always the middle": middle_class, "ridge, then classes": ridge}
    if options.form != "smoke":
        found["boosted trees, then classes"] = boosted_trees
        if len(problem.without) <= LARGE or n <= 10:
            found["logistic regression"] = logistic_regression
    return {**found, **{name: trained(name) for name in NETS}}


# --------------------------------------------------------------------------------------------------------- the results


@dataclass
class Score:
    """One method on one kind of question: a number for each fold of each repetition.

    Attributes:
        accuracy: share of right classes.
        near: share within one class of the right one.
        error: mean absolute error in the target's unit.
        matrix: (C, C) who was taken for whom, in the first repetition.
    """

    accuracy: list[float]
    near: list[float]
    error: list[float]
    matrix: Tensor

    @property
    def mean(self) -> float:
        """Mean accuracy."""
        return statistics.fmean(self.accuracy)

    @property
    def spread(self) -> float:
        """Standard deviation of the accuracy between folds."""
        return statistics.stdev(self.accuracy) if len(self.accuracy) > 1 else 0.0

    @property
    def standard_error(self) -> float:
        """Of the mean accuracy."""
        return self.spread / len(self.accuracy) ** 0.5


Key = tuple[bool, int, str]  # target among the features, wanted classes, method
Scores = dict[Key, Score]


def run(options: Options, report: Report) -> None:
    """Cross-validate all methods on deciles and percentiles, sweep the number of classes, and tell."""
    problem = load(options)
    report.data_name = _described(problem)
    say(report.data_name)
    scores: Scores = {}
    luck: dict[int, list[float]] = {}
    tell_classes(problem, report)
    try:
        cross_validate(problem, options, scores)
        swept = sweep(problem, options, scores)
        luck = single_splits(problem.without, options.pick(400, 200, 10), options)
    except KeyboardInterrupt:
        report.interrupted = True
        say("Interrupted: writing the report of what is finished.")
    report.metrics["scores"] = [_record(key, score) for key, score in scores.items()]
    tell_scores(scores, report)
    if all((False, n, name) in scores for n in WANTED for name in NETS):
        tell_bands(scores, report)
    if not report.interrupted:
        tell_sweep(scores, swept, report)
        tell_luck(len(problem.without) // FOLDS, luck, report)


def cross_validate(problem: Problem, options: Options, scores: Scores) -> None:
    """Deciles and percentiles, with and without the target, by all methods."""
    repetitions = options.pick(3 if len(problem.without) <= LARGE else 1, 1, 1)
    for with_target, n in QUESTIONS:
        evaluate(problem, with_target, n, options.pick(FOLDS, FOLDS, 2), repetitions, options, scores)
        best = _best_net(scores, with_target, n)
        score = scores[with_target, n, best]
        say(f"  {_question(with_target, n):42} best net: {best}, {_percent(score.mean)} ± {_percent(score.spread)}")


def sweep(problem: Problem, options: Options, scores: Scores) -> int:
    """Other numbers of classes, on fewer folds; returns how many."""
    count = options.pick(FOLDS if len(problem.without) <= LARGE else 1, 2, 1)
    for with_target in (True, False):
        for n in SWEPT[options.form]:
            evaluate(problem, with_target, n, count, 1, options, scores)
    return count


def evaluate(
    problem: Problem, with_target: bool, n: int, count: int, repetitions: int, options: Options, scores: Scores
) -> None:
    """Fill `scores` for every method: `count` of the FOLDS folds, each repetition with other folds."""
    table = problem.table(with_target)
    chosen = methods(problem, n, options)
    if n not in WANTED:
        chosen = {name: method for name, method in chosen.items() if name != "logistic regression"}
    bar = tqdm(
        total=repetitions * count * len(chosen),
        desc=f"{n} classes, target {'in' if with_target else 'out'}",
        leave=False,
        disable=None if rank() == 0 else True,
    )
    done = {name: Score([], [], [], torch.zeros(n, n, dtype=torch.int64)) for name in chosen}
    with bar:
        for repetition in range(repetitions):
            generator = torch.Generator().manual_seed(1000 * options.seed + repetition)
            for train, test in folds(len(table), FOLDS, generator)[:count]:
                fold = make_fold(table, n, train, test)
                for name, method in chosen.items():
                    _add(done[name], fold, method(fold, options), first=repetition == 0)
                    bar.update()
    scores.update({(with_target, n, name): score for name, score in done.items()})  # all on the same folds


def _add(score: Score, fold: Fold, answer: Answer, first: bool) -> None:
    said, value = answer
    distance = (said - fold.test_labels).abs()
    score.accuracy.append((distance == 0).double().mean().item())
    score.near.append((distance <= 1).double().mean().item())
    score.error.append((value - fold.test_y).abs().double().mean().item())
    if first:
        score.matrix += confusion_matrix(fold.test_labels, said, len(score.matrix))


def _record(key: Key, score: Score) -> dict[str, Any]:
    with_target, n, name = key
    return {
        "target_among_features": with_target,
        "classes": n,
        "method": name,
        "accuracy": score.mean,
        "spread": score.spread,
        "standard_error": score.standard_error,
        "within_one_class": statistics.fmean(score.near),
        "mean_absolute_error": statistics.fmean(score.error),
        "folds": len(score.accuracy),
    }


def _question(with_target: bool, n: int) -> str:
    return f"{n} classes, target {'among the features' if with_target else 'left out'}"


def _asked(scores: Scores, with_target: bool, n: int) -> dict[str, Score]:
    """All methods' scores on one question."""
    return {name: score for (among, wanted, name), score in scores.items() if (among, wanted) == (with_target, n)}


def _best_net(scores: Scores, with_target: bool, n: int) -> str:
    return max(NETS, key=lambda name: scores[with_target, n, name].mean)


def _described(problem: Problem) -> str:
    table = problem.without
    text = f"{problem.name}: {len(table):,} rows, {len(table.feature_names)} features, target {table.target_name!r} "
    blanks = int(table.x.isnan().sum())
    return text + f"from {table.y.min():g} to {table.y.max():g}." + (f" {blanks:,} missing values." if blanks else "")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


# ------------------------------------------------------------------------------------------------- what came out of it


def tell_classes(problem: Problem, report: Report) -> None:
    """What quantiles make of the target."""
    y = problem.without.y
    found = {n: quantile_labels(y, n) for n in WANTED}
    report.metrics["classes_that_remain"] = {n: labels.classes for n, labels in found.items()}
    report.section(
        "What are the classes?",
        "Sort the targets, and cut them into parts of equal size. With ten parts the edges are the deciles, with a "
        "hundred the percentiles. Where many rows have the same target, edges fall together; they are merged, and "
        "fewer classes remain. In the runs below, the edges come from the training rows only.",
    )
    rows = []
    for n, labels in found.items():
        sizes = torch.bincount(labels.labels, minlength=labels.classes)
        widths = labels.edges.diff()
        width = f"{widths.min():g} to {widths.max():g}" if len(widths) else ""
        rows.append((n, labels.classes, f"{sizes.min()} to {sizes.max()}", width))
    report.table(
        "Widths are in the target's unit; the first and the last class are open and have none.",
        ("wanted", "classes that remain", "rows in a class", "width of a class"),
        rows,
    )
    report.figure(
        "classes",
        draw_classes(y, {n: labels.labels for n, labels in found.items()}, {n: e.edges for n, e in found.items()}),
        "Left: the target's distribution and the deciles; where rows are dense, classes are narrow. Middle and right: "
        "how many rows each class has. Classes of equal size are what quantiles are for, and ties spoil them.",
        "Distribution of the target with deciles, and sizes of the classes.",
    )


def draw_classes(y: Tensor, labels: dict[int, Tensor], edges: dict[int, Tensor]) -> Any:
    """A histogram with the deciles, and the class sizes."""
    with figure(9.6, 3.4) as drawn:
        axes = drawn.subplots(1, 3)
        axes[0].hist(y.numpy(), bins=40, color=COLOURS[5])
        for edge in edges[WANTED[0]].tolist():
            axes[0].axvline(edge, color=COLOURS[1], linewidth=1)
        axes[0].set(title="Target and deciles", xlabel="target", ylabel="rows")
        axes[0].tick_params(axis="x", labelrotation=30)
        for place, n in zip(axes[1:], WANTED, strict=True):
            sizes = torch.bincount(labels[n])
            place.bar(range(len(sizes)), sizes.numpy(), color=COLOURS[0], width=0.9)
            place.set(title=f"{n} classes wanted: {len(sizes)}", xlabel="class", ylabel="rows")
        return drawn


def tell_scores(scores: Scores, report: Report) -> None:
    """The tables and bars of deciles and percentiles."""
    report.section(
        "How good is each?",
        f"The rows are cut into {FOLDS} parts at random; every method learns from all but one part and is asked about "
        "that one. The spread is the standard deviation between such tests. Within one class means: right, or a "
        "neighbour of the right class. The mean absolute error is in the target's unit; a class stands for the median "
        "of its training rows.",
        "With the target among the features the question is silly, and the result is not: the answer stands in the "
        "inputs, and a linear softmax classifier does not get to read it out to a hundredth. Its scores would have to "
        "be tangents of a parabola, and to tell a class from its neighbours, its weights must grow with the square of "
        "the number of classes. Ridge, which predicts the number and cuts it up afterwards, and the ordinal head, with "
        "one score and thresholds, have no such trouble.",
    )
    answered = [question for question in QUESTIONS if _asked(scores, *question)]
    for question in answered:
        found = _asked(scores, *question)
        tests = len(found["linear"].accuracy)
        report.table(
            f"{_question(*question)}; means over {tests} tests.".capitalize(),
            ("", "accuracy", "spread between tests", "within one class", "mean absolute error"),
            [
                (
                    name,
                    _percent(score.mean),
                    _percent(score.spread),
                    _percent(statistics.fmean(score.near)),
                    f"{statistics.fmean(score.error):.4g}",
                )
                for name, score in found.items()
            ],
        )
        net = _best_net(scores, *question)
        report.headline(_percent(found[net].mean), f"right of {_question(*question)}: the best net, {net}")
    if answered:
        report.figure(
            "scores",
            draw_scores(scores),
            "Share of right classes; the black line is one standard deviation between tests to either side. Grey: "
            "classical methods. Colours: nets. The axes differ.",
            "Accuracy of every method, for 10 and 100 classes, with and without the target among the features.",
        )


def draw_scores(scores: Scores) -> Any:
    """Bars, a panel for each question."""
    names = list(dict.fromkeys(name for _, n, name in scores if n in WANTED))
    nothing = Score([float("nan")], [], [], torch.empty(0))
    with figure(9.6, 6.2) as drawn:
        grid = drawn.subplots(2, 2, sharey=True)
        for axes, question in zip(grid.flatten(), QUESTIONS, strict=True):
            found = [_asked(scores, *question).get(name, nothing) for name in names]
            axes.barh(
                names,
                [100 * score.mean for score in found],
                xerr=[100 * score.spread for score in found],
                color=[_colour(name) for name in names],
                height=0.7,
            )
            axes.set_xlim(left=0)
            axes.grid(axis="y", visible=False)
            axes.set(xlabel="accuracy [%]", title=_question(*question))
            axes.title.set_fontsize(11)
        grid[0, 0].invert_yaxis()
        return drawn


def _colour(name: str) -> str:
    return dict(zip(NETS, (COLOURS[4], COLOURS[2], COLOURS[0], COLOURS[1]), strict=True)).get(name, "#b4bec8")


def tell_bands(scores: Scores, report: Report) -> None:
    """Where the mistakes of the nets are that are near most often."""
    best = {n: max(NETS, key=lambda name: statistics.fmean(scores[False, n, name].near)) for n in WANTED}
    report.section(
        "Where are the mistakes?",
        "Classes that come from a number have neighbours, and most mistakes go there. Accuracy calls an answer one "
        "class away as wrong as one ten classes away; the band around the diagonal shows that it is not.",
    )
    report.figure(
        "bands",
        draw_bands({n: scores[False, n, name].matrix for n, name in best.items()}, best),
        "Rows: the class of the test row. Columns: what the net said, as a share of the row. Dark means often. The "
        "target was left out of the features. Where a class has few rows, neighbouring classes are drawn together.",
        "Confusion matrices with 10 and 100 classes: a band along the diagonal.",
    )


def draw_bands(matrices: dict[int, Tensor], names: dict[int, str]) -> Any:
    """The confusions as shares of the rows."""
    with figure(9.6, 4.8) as drawn:
        for axes, (n, matrix) in zip(drawn.subplots(1, 2), matrices.items(), strict=True):
            there = matrix.sum(dim=1) + matrix.sum(dim=0) > 0  # merged classes leave empty rows at the end
            classes = int(there.nonzero().max()) + 1
            block = 1 if matrix.sum() >= 20 * n else max(1, n // 20)
            shares = _in_blocks(matrix[:classes, :classes], block).double()
            shares = 100 * shares / shares.sum(dim=1, keepdim=True).clamp_min(1)
            brightest = float(np.quantile(shares.numpy(), 0.995))
            end = block * len(shares) - 0.5
            shown = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=brightest, extent=(-0.5, end, end, -0.5))
            axes.plot([-0.5, end], [-0.5, end], color=COLOURS[1], linewidth=0.8)
            axes.grid(False)
            title = f"{n} classes{f' in blocks of {block}' if block > 1 else ''}: {names[n]}"
            axes.set(xlabel="class the net says", ylabel="class of the row", title=title)
            axes.title.set_fontsize(11)
            drawn.colorbar(shown, ax=axes, label="share of the row [%]", shrink=0.8)
        return drawn


def _in_blocks(matrix: Tensor, block: int) -> Tensor:
    """Sums over blocks of the matrix (C, C), the last ones padded with zeros."""
    padding = -len(matrix) % block
    padded = nn.functional.pad(matrix, (0, padding, 0, padding))
    return padded.unflatten(1, (-1, block)).sum(dim=2).unflatten(0, (-1, block)).sum(dim=1)


def tell_sweep(scores: Scores, folds_used: int, report: Report) -> None:
    """Accuracy against the number of classes."""
    report.section(
        "From 2 to 100 classes",
        "More classes make the question harder, for chance as well: 1 of n. What matters is the distance to that line. "
        f"Points at {WANTED[0]} and {WANTED[1]} classes are those of the tables; each of the others is a mean over "
        f"{folds_used} {'test' if folds_used == 1 else 'tests'}.",
    )
    report.figure(
        "sweep",
        draw_sweep(scores),
        "Both axes are logarithmic, so that chance is a straight line. Left, with the target among the features: "
        "softmax classifiers fall, although the answer is there. Right, without it: all methods run parallel to "
        "chance, better by a factor that hardly depends on the number of classes.",
        "Accuracy of every method against the number of classes.",
    )


def draw_sweep(scores: Scores) -> Any:
    """A line for each method."""
    counts = sorted({n for _, n, _ in scores})
    with figure(9.6, 4.4) as drawn:
        grid = drawn.subplots(1, 2, sharey=True)
        for axes, with_target in zip(grid, (True, False), strict=True):
            axes.plot(counts, [100 / n for n in counts], color="black", linestyle=":", linewidth=1.5, label="1 of n")
            for name, style, colour in _lines():
                points = [
                    (n, 100 * scores[with_target, n, name].mean) for n in counts if (with_target, n, name) in scores
                ]
                if points:
                    axes.plot(*zip(*points, strict=True), style, color=colour, label=name, markersize=4)
            axes.set(xscale="log", yscale="log", xlabel="classes", ylim=(0.7, 115))
            axes.set_title("target among the features" if with_target else "target left out")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_major_formatter("{x:g}")
        grid[0].set_ylabel("accuracy [%]")
        drawn.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        return drawn


def _lines() -> list[tuple[str, str, str]]:
    """Method, line style, colour."""
    nets = [(name, "o-", _colour(name)) for name in NETS]
    return [("ridge, then classes", "s--", "#5f6b76"), ("boosted trees, then classes", "^--", "#9aa5b1"), *nets]


def single_splits(table: TabularDataset, count: int, options: Options) -> dict[int, list[float]]:
    """The accuracy of ridge regression, cut into classes, on many single splits, by number of classes."""
    generator = torch.Generator().manual_seed(options.seed)
    found: dict[int, list[float]] = {n: [] for n in WANTED}
    test_rows = len(table) // FOLDS
    for _ in tqdm(range(count), desc="single splits", leave=False, disable=None if rank() == 0 else True):
        order = torch.randperm(len(table), generator=generator)
        for n in WANTED:
            fold = make_fold(table, n, order[test_rows:], order[:test_rows])
            found[n].append((ridge(fold, options)[0] == fold.test_labels).double().mean().item())
    return found


def tell_luck(test_rows: int, found: dict[int, list[float]], report: Report) -> None:
    """How far single splits are from each other."""
    report.metrics["single_splits"] = {str(n): values for n, values in found.items()}
    report.section(
        "How much is luck?",
        f"The usual report comes from one split: four fifths to learn, one fifth, {test_rows:,} rows, to test. Here is "
        f"the same method, ridge regression cut into classes, on {len(found[WANTED[0]])} such splits, the target left "
        "out. Nothing differs but which rows happened to be the test.",
    )
    report.table(
        "Accuracy on single splits: from an unlucky to a lucky one.",
        ("classes", "smallest", "5 % are below", "median", "5 % are above", "largest"),
        [
            (n, *(_percent(float(v)) for v in np.quantile(values, (0, 0.05, 0.5, 0.95, 1))))
            for n, values in found.items()
        ],
    )
    report.figure(
        "luck",
        draw_luck(test_rows, found),
        "How often a single split gives which accuracy. The orange line is the mean, the dotted one chance.",
        "Histograms of accuracies on single splits, with 10 and 100 classes.",
    )


def draw_luck(test_rows: int, found: dict[int, list[float]]) -> Any:
    """Histograms of single-split accuracies, each bar for equally many counts of right answers."""
    with figure(9.6, 3.4) as drawn:
        for axes, (n, values) in zip(drawn.subplots(1, 2), found.items(), strict=True):
            right = np.rint(np.array(values) * test_rows)
            width = max(1, round((right.max() - right.min()) / 15))
            edges = np.arange(right.min(), right.max() + width + 1, width) - 0.5
            axes.hist(100 * right / test_rows, bins=100 * edges / test_rows, color=COLOURS[5], edgecolor="white")
            axes.axvline(100 * statistics.fmean(values), color=COLOURS[1])
            axes.axvline(100 / n, color="black", linestyle=":")
            axes.set(title=f"{n} classes", xlabel="accuracy on one split [%]", ylabel="splits")
        return drawn
