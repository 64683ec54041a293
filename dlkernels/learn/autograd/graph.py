"""The graph, to be seen: as text for Graphviz, and as a figure."""

from __future__ import annotations

from typing import Any

import numpy as np

from .engine import Node, Scalar, grad, topological_order


def to_dot(output: Node) -> str:
    """The graph of a result as text in Graphviz's language DOT; `dot -Tsvg` draws it.

    Args:
        output: the result.

    Returns:
        One line for each node, with its operation or label and its value or shape, and one for each edge. In the graph
        of a Scalar every node shows the derivative of the output by it, too.

    Example:
        >>> print(to_dot(Scalar(2.0, label="x") * 3))
        digraph {
          rankdir=LR; node [shape=box, style=rounded];
          n0 [label="x\\n2\\nd = 3"];
          n1 [label="3"];
          n2 [label="*\\n6\\nd = 1"];
          n0 -> n2;
          n1 -> n2;
        }
    """
    order = topological_order(output)
    names = {node: f"n{number}" for number, node in enumerate(order)}
    lines = ["digraph {", "  rankdir=LR; node [shape=box, style=rounded];"]
    for node, words in _captions(output, order).items():
        escaped = [word.replace("\\", "\\\\").replace('"', '\\"') for word in words]
        text = "\\n".join(escaped).replace("\n", "\\n")
        lines.append(f'  {names[node]} [label="{text}"];')
    lines += [f"  {names[parent]} -> {names[node]};" for node in order for parent in node.parents]
    return "\n".join([*lines, "}"])


def _captions(output: Node, order: list[Node]) -> dict[Node, list[str]]:
    """What stands in the box of every node: name, value or shape, derivative of the output by it."""
    wanted = [node for node in order if node.requires_grad and isinstance(output, Scalar)]
    derivatives = dict(zip(wanted, grad(output, wanted), strict=True)) if wanted else {}
    captions = {}
    for node in order:
        value = f"{node.value:.4g}" if isinstance(node, Scalar) or np.ndim(node.value) == 0 else str(node.value.shape)
        words = [node.label or node.operation, value]
        if node in derivatives:
            words.append(f"d = {derivatives[node].value:.4g}")
        captions[node] = [word for word in words if word]
    return captions


def draw_graph(output: Node, axes: Any) -> None:
    """Draw the graph of a result into a pair of matplotlib's axes, from left to right.

    Blue: leaves that require a gradient. White: constants. Green: the output.

    Args:
        output: the result.
        axes: where to draw; the limits are set, the frame is removed.
    """
    order = topological_order(output)
    places, boxes = _places(order), {}
    for node, words in _captions(output, order).items():
        face = "#dff3ea" if node is output else "#f3f5f7"
        if not node.parents:
            face = "#d6e9f6" if node.requires_grad else "white"
        box = axes.text(
            *places[node],
            "\n".join(words).replace("$", r"\$"),
            ha="center",
            va="center",
            fontsize=9,
            linespacing=1.35,
            bbox={"boxstyle": "round,pad=0.35", "facecolor": face, "edgecolor": "#5f6b76"},
        )
        boxes[node] = box.get_bbox_patch()
    for node in order:
        for parent in node.parents:
            ends = {"patchA": boxes[parent], "patchB": boxes[node], "shrinkA": 0, "shrinkB": 0}
            look = {"arrowstyle": "-|>", "color": "#5f6b76", "linewidth": 1}
            axes.annotate("", xy=places[node], xytext=places[parent], zorder=4, arrowprops={**ends, **look})
    columns, rows = ([place[i] for place in places.values()] for i in (0, 1))
    axes.set(xlim=(min(columns) - 0.5, max(columns) + 0.5), ylim=(min(rows) - 0.6, max(rows) + 0.6))
    axes.set_axis_off()


def _places(order: list[Node]) -> dict[Node, tuple[float, float]]:
    """A column for every node, left of all that is computed from it, and a row near those of its neighbours."""
    column = dict.fromkeys(order, 0)
    for node in reversed(order):
        for parent in node.parents:
            column[parent] = min(column[parent], column[node] - 1)
    layers = [[node for node in order if column[node] == c] for c in range(min(column.values()), 1)]
    neighbours: dict[Node, list[Node]] = {node: list(node.parents) for node in order}
    for node in order:
        for parent in node.parents:
            neighbours[parent].append(node)
    row = {node: i - (len(layer) - 1) / 2 for layer in layers for i, node in enumerate(layer)}
    for sweep in range(8):  # put every node at the mean of its neighbours, keeping a distance of 1
        for layer in layers[:: 1 if sweep % 2 else -1]:
            wish = {node: np.mean([row[other] for other in neighbours[node]] or [0.0]) for node in layer}
            layer.sort(key=lambda node: (wish[node], row[node]))
            shift = np.mean([wish[node] - i for i, node in enumerate(layer)])
            row.update((node, i + float(shift)) for i, node in enumerate(layer))
    return {node: (float(column[node]), -row[node]) for node in order}
