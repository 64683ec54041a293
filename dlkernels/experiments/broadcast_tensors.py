"""How tensors of different shapes fit together

What does torch do when it adds a column to a row? Which shapes fit, which dimension stretches, and how can a tensor
become a thousand times larger without a copy? Every rule is drawn here, carried out by our own code, and held against
torch: answers, strides and refusals.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.colors import ListedColormap, to_rgba
from matplotlib.patches import Patch, Rectangle
from torch import Tensor
from torch.utils.benchmark import Timer
from tqdm import tqdm

from dlkernels.experiments import Options, UsageError
from dlkernels.experiments.report import COLOURS, Report, figure
from dlkernels.experiments.training import rank, say
from dlkernels.learn.broadcast_tensors import broadcast_shapes, broadcast_tensors, expand, expand_as, is_broadcastable

Shape = tuple[int, ...]

RULES: tuple[tuple[str, tuple[Shape, ...]], ...] = (
    ("Equal sizes stay", ((2, 3), (2, 3))),
    ("A 1 stretches", ((3, 1), (3, 4))),
    ("Both may stretch", ((3, 1), (1, 4))),
    ("What is missing on the left is 1", ((4,), (2, 3, 4))),
    ("A number fits everything", ((), (2, 3))),
    ("A 1 stretches to 0, too", ((3, 1), (3, 0))),
    ("Any number of tensors", ((5, 1, 1), (3, 1), (4,))),
    ("Different, and neither is 1", ((2, 3), (3, 2))),
    ("A 0 does not stretch", ((3, 0), (3, 2))),
    ("Never aligned from the left", ((3, 4), (3,))),
)
EXPANSIONS: tuple[tuple[str, Shape, Shape], ...] = (
    ("expand: -1 keeps a size", (3, 1), (2, -1, 4)),
    ("expand: one way only", (3, 4), (3, 1)),
)
REFUSED, FITS, DIFFERS = range(3)


def run(options: Options, report: Report) -> None:
    """Draw the rules, compare with torch, weigh and time."""
    if options.data is not None:
        raise UsageError("this topic makes its own tensors and takes no --data")
    report.data_name = "Shapes only; the tensors are made on the spot."
    stages: tuple[Callable[[Options, Report], None], ...] = (
        tell_rules,
        tell_strides,
        tell_sweep,
        tell_gradients,
        tell_bytes,
        tell_times,
    )
    for stage in stages:
        stage(options, report)


# ---------------------------------------------------------------------------------------------------------- the rules


def tell_rules(options: Options, report: Report) -> None:
    """Every rule as a picture."""
    report.section(
        "Which shapes fit?",
        "Write the shapes under each other, aligned at the right. A shape that is too short gets 1s on its left. Then "
        "go through the columns: all sizes must be equal, but for 1s, and a 1 stretches to the size of the others. "
        "That is all.",
    )
    report.figure(
        "rules",
        draw_rules(),
        "Blue: a size that counts. Yellow: a 1 that stretches, with a stride of 0. Dashed: a 1 that was put there "
        "because the shape is too short. Orange: a column that does not fit. Beside each tensor stand the strides of "
        "its view, as our code computes them.",
        "Twelve groups of shapes, aligned from the right, with the result of each.",
    )
    report.metrics["rules"] = {
        **{title: _result_of(broadcast_shapes, *shapes) for title, shapes in RULES},
        **{title: _result_of(lambda a, b: expand(torch.empty(a), b).shape, a, b) for title, a, b in EXPANSIONS},
    }


def _result_of(function: Callable[..., torch.Size], *shapes: Shape) -> list[int] | str:
    try:
        return list(function(*shapes))
    except RuntimeError as error:
        return str(error)


def draw_rules() -> Any:
    """One panel for each of RULES, and for each of EXPANSIONS."""
    with figure(9.6, 9.2) as drawn:
        grid = drawn.subplots(4, 3).flatten()
        for axes, (title, shapes) in zip(grid, RULES, strict=False):
            draw_alignment(axes, title, shapes)
        for axes, (title, shape, sizes) in zip(grid[len(RULES) :], EXPANSIONS, strict=True):
            draw_expansion(axes, title, shape, sizes)
        return drawn


def draw_alignment(axes: Any, title: str, shapes: Sequence[Shape]) -> None:
    """Shapes under each other, aligned from the right, their result below, the strides of the views beside."""
    width = max(map(len, shapes))
    fits = is_broadcastable(*shapes)
    columns = [[shape[d] if -d <= len(shape) else 1 for shape in shapes] for d in range(-width, 0)]
    unfit = [len({size for size in column if size != 1}) > 1 for column in columns]
    views = broadcast_tensors(*map(torch.empty, shapes)) if fits else [None] * len(shapes)
    for row, (shape, view) in enumerate(zip(shapes, views, strict=True)):
        for d in range(width):
            exists = d >= width - len(shape)
            stretches = columns[d][row] == 1 and any(size != 1 for size in columns[d])
            colour = COLOURS[1] if unfit[d] else COLOURS[4] if stretches else COLOURS[0]
            colour = "#9aa5b1" if not exists and not stretches else colour
            _box(axes, d, -row, columns[d][row], colour, exists)
        if view is not None:
            axes.text(width + 0.15, -row, f"strides {_written(view.stride())}", va="center", fontsize=9)
    _result_row(axes, title, len(shapes), broadcast_shapes(*shapes) if fits else None, unfit)


def draw_expansion(axes: Any, title: str, shape: Shape, sizes: Shape) -> None:
    """A shape, the sizes that expand is asked for, and what comes of it."""
    missing = len(sizes) - len(shape)
    unfit = [d >= missing and shape[d - missing] not in (1, sizes[d]) and sizes[d] != -1 for d in range(len(sizes))]
    view = None if any(unfit) else expand(torch.empty(shape), sizes)
    for d, asked in enumerate(sizes):
        old = shape[d - missing] if d >= missing else 1
        colour = COLOURS[1] if unfit[d] else COLOURS[0] if asked in (-1, old) else COLOURS[4]
        _box(axes, d, 0, old, colour, d >= missing)
        axes.text(d, -1, str(asked), ha="center", va="center", color=COLOURS[1] if unfit[d] else "black")
    if view is not None:
        axes.text(len(sizes) + 0.15, 0, f"strides {_written(view.stride())}", va="center", fontsize=9)
    axes.text(len(sizes) + 0.15, -1, "asked for", va="center", fontsize=9)
    _result_row(axes, title, 2, view.shape if view is not None else None, unfit)


def _result_row(axes: Any, title: str, rows: int, result: Sequence[int] | None, unfit: list[bool]) -> None:
    """Under a line, the result, or question marks under the columns that do not fit; title and limits of the panel."""
    bottom, width = -rows - 0.25, len(unfit)
    axes.plot([-0.5, width - 0.5], [bottom + 0.62] * 2, color="#5f6b76", linewidth=1)
    for d in range(width):
        if unfit[d]:
            axes.text(d, bottom, "?", ha="center", va="center", color=COLOURS[1], fontsize=14, weight="bold")
        elif result is not None:
            _box(axes, d, bottom, result[d], COLOURS[0], True)
    verdict = "refused" if result is None else "the result"
    axes.text(width + 0.15, bottom, verdict, va="center", fontsize=9, weight="bold")
    axes.set(xlim=(-0.6, 6.2), ylim=(-3.8, 0.7), title=title)
    axes.title.set_fontsize(10.5)
    axes.set_axis_off()


def _box(axes: Any, x: float, y: float, number: int, colour: str, exists: bool) -> None:
    face = to_rgba(colour, 0.25) if exists else "white"
    style = "-" if exists else "--"
    axes.add_patch(
        Rectangle((x - 0.42, y - 0.38), 0.84, 0.76, facecolor=face, edgecolor=colour, linestyle=style, lw=1.3)
    )
    axes.text(x, y, str(number), ha="center", va="center", color="black" if exists else "#5f6b76")


def _written(numbers: Sequence[int]) -> str:
    return f"({', '.join(map(str, numbers))}{',' if len(numbers) == 1 else ''})"


# -------------------------------------------------------------------------------------------------------- the strides


def tell_strides(options: Options, report: Report) -> None:
    """How a stride of 0 shows one element in many places."""
    report.section(
        "How does a dimension stretch without a copy?",
        "A tensor is a row of numbers in memory, and a rule for finding element (i, j): it lies at place "
        "offset + i · stride_0 + j · stride_1. With a stride of 0 the index no longer matters: every step along that "
        "dimension arrives at the same place. So a view of any size needs no memory at all.",
    )
    report.figure(
        "strides",
        draw_strides(),
        "Top: the numbers in memory. Below: the view of shape (3, 4). Each cell shows how its place is computed, and "
        "has the colour of the number that it reads.",
        "A column and a row, both stretched to 3 x 4 by a stride of 0, and a matrix that is not.",
    )


def draw_strides() -> Any:
    """A column, a row and a whole matrix as views of shape (3, 4)."""
    sources = ((3, 1), (1, 4), (3, 4))
    with figure(9.6, 4.3) as drawn:
        for axes, shape in zip(drawn.subplots(1, 3), sources, strict=True):
            a = torch.arange(torch.Size(shape).numel()).reshape(shape)
            view = expand(a, 3, 4)
            shades = [_shade(place, a.numel()) for place in range(a.numel())]
            spacing = 4 / max(a.numel(), 4)
            for place, shade in enumerate(shades):
                axes.add_patch(Rectangle((place * spacing, 3.7), spacing, 0.55, facecolor=shade, edgecolor="white"))
                axes.text((place + 0.5) * spacing, 3.97, str(place), ha="center", va="center", fontsize=9)
            for i, j in itertools.product(range(3), range(4)):
                place = int(view[i, j])
                axes.add_patch(Rectangle((j, 2 - i), 1, 1, facecolor=shades[place], edgecolor="white", linewidth=1.5))
                terms = f"{i}·{view.stride(0)} + {j}·{view.stride(1)}\n= {place}"
                axes.text(j + 0.5, 2.5 - i, terms, ha="center", va="center", fontsize=7.5)
            axes.text(a.numel() * spacing + 0.08, 3.97, "memory", va="center", fontsize=9)
            title = f"{_written(shape)} as {_written(view.shape)}\nstrides {_written(view.stride())}"
            axes.set(xlim=(-0.1, 5.0), ylim=(-0.1, 4.4), title=title)
            axes.set_axis_off()
        return drawn


def _shade(place: int, count: int) -> tuple[float, float, float]:
    """Light colours that are told apart: the palette, mixed with white."""
    mixed = 0.62 - 0.35 * (place // len(COLOURS)) / max(1, (count - 1) // len(COLOURS))
    red, green, blue, _ = to_rgba(COLOURS[place % len(COLOURS)])
    return (1 - mixed * (1 - red), 1 - mixed * (1 - green), 1 - mixed * (1 - blue))


# ---------------------------------------------------------------------------------------------------- against torch


def tell_sweep(options: Options, report: Report) -> None:
    """Thousands of shapes, ours and torch's side by side."""
    shapes = small_shapes(options.pick(3, 3, 2))
    pairs = sweep_pairs(shapes, options.device)
    several, several_refused = sweep_several(options.pick(20_000, 2000, 200), options)
    differ = int((pairs == DIFFERS).sum()) + several.count(False)
    total = pairs.size + len(several)
    refused = int((pairs == REFUSED).sum())
    report.metrics["sweep"] = {
        "pairs": pairs.size,
        "pairs_refused_by_both": refused,
        "groups_of_up_to_five": len(several),
        "groups_refused_by_both": several_refused,
        "disagreements": differ,
    }
    say(f"  sweep: {total:,} cases, {differ} disagreements with torch")
    report.headline(f"{total:,}", f"cases held against torch, {differ} disagreements")
    largest = max(map(len, shapes))
    report.section(
        "Is it what torch does?",
        f"All {len(shapes)} shapes with up to {largest} dimensions of sizes 0 to 3 were paired with each other, and "
        "both of a pair given to our code and to torch's: broadcast_shapes, broadcast_tensors and expand_as. Then "
        "groups of up to five tensors with up to six dimensions, their elements spread in memory with random strides. "
        "They agree where the shapes, strides, offsets and addresses of the results are equal, or where both refuse "
        "with the same type of error and the same words.",
    )
    report.table(
        "Cases by what both answer, and how often one answers differently from the other.",
        ("", "cases", "answered by both", "refused by both", "disagreements"),
        [
            (
                "pairs",
                f"{pairs.size:,}",
                f"{int((pairs == FITS).sum()):,}",
                f"{refused:,}",
                int((pairs == DIFFERS).sum()),
            ),
            (
                "groups of up to five",
                f"{len(several):,}",
                f"{several.count(True) - several_refused:,}",
                f"{several_refused:,}",
                several.count(False),
            ),
        ],
    )
    report.figure(
        "sweep",
        draw_sweep(shapes, pairs),
        "Every point is a pair of shapes. The blocks are numbers of dimensions, from none at the top and left; inside "
        "a block the sizes count up like digits. The picture is symmetric: broadcasting does not care who comes "
        "first. Lines that are blue throughout belong to shapes of 1s only.",
        "Which pairs of small shapes fit together.",
    )


def small_shapes(dimensions: int) -> list[Shape]:
    """All shapes of at most so many dimensions, of sizes 0 to 3."""
    return [shape for length in range(dimensions + 1) for shape in itertools.product(range(4), repeat=length)]


def sweep_pairs(shapes: list[Shape], device: str) -> np.ndarray:
    """REFUSED, FITS or DIFFERS for every pair of shapes."""
    tensors = [torch.empty(shape, device=device) for shape in shapes]
    found = np.empty((len(shapes), len(shapes)), dtype=np.int8)
    rows = tqdm(range(len(shapes)), desc="pairs", leave=False, disable=None if rank() == 0 else True)
    for row in rows:
        for column, b in enumerate(tensors):
            a = tensors[row]
            agree = (
                outcome(broadcast_shapes, a.shape, b.shape) == outcome(torch.broadcast_shapes, a.shape, b.shape)
                and outcome(broadcast_tensors, a, b) == outcome(torch.broadcast_tensors, a, b)
                and outcome(expand_as, a, b) == outcome(torch.Tensor.expand_as, a, b)
            )
            found[row, column] = DIFFERS if not agree else FITS if is_broadcastable(a, b) else REFUSED
    return found


def sweep_several(count: int, options: Options) -> tuple[list[bool], int]:
    """Whether we agree with torch on random groups of tensors, and how many both refuse."""
    random = np.random.default_rng(options.seed)
    agree, refused = [], 0
    for group in itertools.islice(random_groups(random, options.device), count):
        ours = outcome(broadcast_tensors, *group)
        agree.append(ours == outcome(torch.broadcast_tensors, *group))
        refused += isinstance(ours[0], str) and agree[-1]
    return agree, refused


def random_groups(random: np.random.Generator, device: str) -> Iterator[list[Tensor]]:
    """Two to five tensors cut from one shape, so that most fit; one size in thirty is a random one."""
    while True:
        common = random.integers(0, 5, random.integers(0, 7))
        group = []
        for _ in range(random.integers(2, 6)):
            shape = common[random.integers(0, len(common) + 1) :]
            shape = np.where(random.random(len(shape)) < 0.3, 1, shape)
            shape = np.where(random.random(len(shape)) < 1 / 30, random.integers(0, 5, len(shape)), shape)
            steps = random.integers(1, 3, len(shape))
            memory = torch.empty((shape * steps).tolist(), device=device)
            group.append(memory[tuple(slice(None, None, int(step)) for step in steps)])
        yield group


def outcome(function: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
    """The geometry of what a function returns, or the type and words of its refusal."""
    try:
        result = function(*arguments)
    except (RuntimeError, ValueError) as error:
        return type(error).__name__, str(error)
    return tuple(map(_geometry, result)) if type(result) is tuple else (_geometry(result),)


def _geometry(result: Tensor | torch.Size) -> tuple[Any, ...]:
    if isinstance(result, Tensor):
        return tuple(result.shape), result.stride(), result.storage_offset(), result.data_ptr()
    return tuple(result)


def draw_sweep(shapes: list[Shape], pairs: np.ndarray) -> Any:
    """The pairs as points, blocks by number of dimensions."""
    colours = ("#e8ecf0", COLOURS[0], COLOURS[1])
    begins = [sum(len(shape) < length for shape in shapes) for length in range(max(map(len, shapes)) + 2)]
    with figure(7.2, 6.6) as drawn:
        axes = drawn.subplots()
        axes.imshow(pairs, cmap=ListedColormap(colours), vmin=REFUSED, vmax=DIFFERS, interpolation="nearest")
        for begin in begins[1:-1]:
            axes.axhline(begin - 0.5, color="white", linewidth=2)
            axes.axvline(begin - 0.5, color="white", linewidth=2)
        middles = [(low + high - 1) / 2 for low, high in itertools.pairwise(begins)]
        names = [str(length) for length in range(len(middles))]
        axes.set_xticks(middles, names)
        axes.set_yticks(middles, names)
        axes.grid(False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set(xlabel="dimensions of b", ylabel="dimensions of a", title="Do a and b fit together?")
        kinds = ("refused, by both", "one shape, by both", "ours and torch's differ")
        handles = [Patch(color=colour, label=kind) for colour, kind in zip(colours, kinds, strict=True)]
        drawn.legend(handles=handles, loc="outside lower center", ncols=3)
        return drawn


# --------------------------------------------------------------------------------------------------------- gradients


def tell_gradients(options: Options, report: Report) -> None:
    """An element that was read many times collects as many gradients."""
    rows = []
    for shape, sizes in (((3, 1), (3, 4)), ((4,), (3, 4)), ((), (3, 4)), ((2, 1, 1), (2, 5, 3))):
        a = torch.ones(shape, device=options.device, requires_grad=True)
        expand(a, *sizes).sum().backward()
        assert a.grad is not None
        stretched = sorted({*range(-len(sizes), 0)} - {d for d in range(-len(shape), 0) if shape[d] == sizes[d]})
        rows.append((_written(shape), _written(sizes), _written(stretched), f"{a.grad.flatten()[0].item():.0f}"))
    report.section(
        "And backwards?",
        "An element that was read five times influences the result five times, and the chain rule adds up the five "
        "influences. So the gradient of a stretched tensor is the gradient of the view, summed over the dimensions "
        "that were stretched. Forward: copy without copying; backward: add.",
    )
    report.table(
        "The gradient of the sum of the view: it counts how often each element was read.",
        ("shape", "expanded to", "summed over dimensions", "gradient of every element"),
        rows,
    )
    report.metrics["gradients"] = [
        dict(zip(("shape", "sizes", "summed", "gradient"), row, strict=True)) for row in rows
    ]


# ---------------------------------------------------------------------------------------------------- bytes and time


def tell_bytes(options: Options, report: Report) -> None:
    """What a view weighs, and what a copy would."""
    sides = [2**power for power in range(options.pick(13, 12, 9))]
    shared, copied = [], []
    for side in sides:
        row = torch.ones(side, device=options.device)
        view = expand(row, side, side)
        shared.append(view.untyped_storage().nbytes())
        copied.append(view.clone(memory_format=torch.contiguous_format).untyped_storage().nbytes())
    report.metrics["bytes"] = {"side": sides, "shared": shared, "copied": copied}
    factor = copied[-1] // shared[-1]
    report.headline(f"{factor:,} x", f"less memory for a row of {sides[-1]:,} as a square than a copy takes")
    report.section(
        "What does it save?",
        f"A row of {sides[-1]:,} numbers, stretched to a square: the view holds the {_size(shared[-1])} of the row, a "
        f"copy {_size(copied[-1])}.",
    )
    report.figure(
        "bytes",
        draw_bytes(sides, shared, copied),
        "Both axes are logarithmic. The copy grows with the square of the side, the view with the row.",
        "Memory of a view and of a copy against the side of the square.",
    )


def draw_bytes(sides: list[int], shared: list[int], copied: list[int]) -> Any:
    """Measured sizes of the storages."""
    with figure(9.6, 3.6) as drawn:
        axes = drawn.subplots()
        axes.plot(sides, copied, color=COLOURS[1], marker="o", label="copied")
        axes.plot(sides, shared, color=COLOURS[0], marker="o", label="shared, by strides")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        ticks = [2**power for power in range(2, 31, 4) if 2**power <= 4 * copied[-1]]
        axes.set_yticks(ticks, [_size(tick) for tick in ticks])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="side of the square", ylabel="memory", title="A row as a square (float32)")
        axes.legend()
        return drawn


def _size(count: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:g} {name}"
    return f"{count} bytes"


def tell_times(options: Options, report: Report) -> None:
    """Microseconds a call, ours and torch's, and those of a copy."""
    seconds = options.pick(200, 50, 2) / 1000  # for each measurement
    sides = [2**power for power in range(2, 12, options.pick(1, 1, 3))]
    growth: dict[str, list[float]] = {"copied": [], "view, ours": [], "view, torch's": []}
    for side in sides:
        row, like = torch.ones(side, device=options.device), torch.ones(side, 1, device=options.device)
        growth["copied"].append(_microseconds(lambda: row.repeat(like.shape[0], 1), seconds))  # noqa: B023
        growth["view, ours"].append(_microseconds(lambda: broadcast_tensors(row, like), seconds))  # noqa: B023
        growth["view, torch's"].append(_microseconds(lambda: torch.broadcast_tensors(row, like), seconds))  # noqa: B023
    cases = (((64, 1), (64,)), ((8, 1, 6, 1), (7, 1, 5)), ((5, 1, 1), (3, 1), (4,), (5, 3, 4), ()))
    calls = {}
    for shapes in cases:
        group = [torch.ones(shape, device=options.device) for shape in shapes]
        name = " ".join(map(_written, shapes))
        calls[name] = [
            _microseconds(lambda: broadcast_tensors(*group), seconds),  # noqa: B023
            _microseconds(lambda: torch.broadcast_tensors(*group), seconds),  # noqa: B023
        ]
    report.metrics["microseconds"] = {"side": sides, **growth, "calls": calls}
    report.section(
        "What does it cost?",
        "A view costs the same whatever its size, since only a handful of sizes and strides is computed; a copy takes "
        "longer the larger it is. Ours is Python and takes some microseconds more than torch's, which is C++.",
    )
    report.figure(
        "times",
        draw_times(sides, growth),
        "Median time of a call on one thread against the size of the result, both axes logarithmic. Broadcasting is "
        "flat.",
        "Time of a copy, of our view and of torch's view.",
    )
    report.table(
        "The same for a few groups of tensors, median time of a call of broadcast_tensors.",
        ("shapes", "ours", "torch", "ratio"),
        [
            (name, f"{ours:.1f} µs", f"{theirs:.1f} µs", f"{ours / theirs:.1f}")
            for name, (ours, theirs) in calls.items()
        ],
    )


def _microseconds(call: Callable[[], Any], seconds: float) -> float:
    """The median time of a call on one thread, measured for about so many seconds; a GPU finishes its work first."""
    return 1e6 * Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=seconds).median


def draw_times(sides: list[int], growth: dict[str, list[float]]) -> Any:
    """Time against the number of elements."""
    colours = dict(zip(growth, (COLOURS[1], COLOURS[0], COLOURS[2]), strict=True))
    with figure(9.6, 3.6) as drawn:
        axes = drawn.subplots()
        for name, values in growth.items():
            axes.plot([side * side for side in sides], values, color=colours[name], marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel="elements of the result", ylabel="time of a call [µs]")
        axes.set_title("A row as a square")
        axes.legend()
        return drawn
