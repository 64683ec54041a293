"""Draws docs/images/drop_norm_rescale.png, and prints the table of docs/drop_norm.md: what `rescale` does.

    python tools/draw_drop_norm.py

Left: an untrained layer. A Linear follows DropNorm; how large are its sums in training, averaged over masks, against
those in evaluation? Right: scikit-learn's handwritten digits and a net of two hidden layers, trained with and without
`rescale`, judged in evaluation on images that it has not seen.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

import dlkernels
from dlkernels.bench.report import write_atomically

TARGET = Path(__file__).resolve().parent.parent / "docs" / "images" / "drop_norm_rescale.png"
PARTS = (0.1, 0.25, 0.5, 0.75)
SEEDS = 5
WIDTH = 256
EPOCHS = 20
COLOURS = {True: "#0072b2", False: "#d55e00"}  # blue and vermillion: told apart by every kind of colour vision


def digits(seed):
    """x, y to train with (4 of 5), x, y to test with; pixels standardised together."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor((x - x.mean()) / x.std(), dtype=torch.float32), torch.tensor(y)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    train, test = order[len(y) // 5 :], order[: len(y) // 5]
    return x[train], y[train], x[test], y[test]


def make_net(p, rescale):
    def hidden(size):
        return nn.Linear(size, WIDTH), nn.ReLU(), dlkernels.DropNorm(WIDTH, p, rescale=rescale)

    return nn.Sequential(*hidden(64), *hidden(WIDTH), nn.Linear(WIDTH, 10))


def train(net, x, y):
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3)
    net.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(y)).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimiser.step()


@torch.no_grad()
def sum_length(p, rescale):
    """A Linear's sums after DropNorm, averaged over masks, as a multiple of those in evaluation: 1 is agreement."""
    layer, after = dlkernels.DropNorm(WIDTH, p, rescale=rescale), nn.Linear(WIDTH, WIDTH, bias=False)
    x = torch.relu(torch.randn(64, WIDTH))
    mean = torch.stack([after(layer(x)) for _ in range(100)]).mean(0)
    exact = after(layer.eval()(x))
    return ((mean * exact).sum() / exact.square().sum()).item()  # the slope of mean over exact, through the origin


@torch.no_grad()
def judge(net, x, y):
    """In evaluation on test images: accuracy and mean probability of the answer, in percent, and loss."""
    scores = net.eval()(x)
    right = (scores.argmax(1) == y).double().mean().item()
    sure = scores.softmax(1).amax(1).double().mean().item()
    return 100 * right, 100 * sure, nn.functional.cross_entropy(scores, y).item()


def measure():
    slopes: dict[tuple[float, bool], list[float]] = {}
    judged: dict[tuple[float, bool], np.ndarray] = {}
    for p in PARTS:
        for rescale in (True, False):
            rows = []
            slopes[p, rescale] = []
            for seed in range(SEEDS):
                torch.manual_seed(seed)
                slopes[p, rescale].append(sum_length(p, rescale))
                net, data = make_net(p, rescale), digits(seed)
                train(net, *data[:2])
                rows.append(judge(net, *data[2:]))
            judged[p, rescale] = np.array(rows)
    return slopes, judged


def print_table(slopes, judged):
    print("| p | rescale | sums, training / evaluation | test accuracy | mean probability of the answer | test loss |")
    print("|---|---|---:|---:|---:|---:|")
    for (p, rescale), rows in judged.items():
        right, sure, loss = rows.mean(0)
        spread = rows.std(0, ddof=1)
        cells = f"{np.mean(slopes[p, rescale]):.2f} | {right:.1f} ± {spread[0]:.1f} % | {sure:.1f} %"
        print(f"| {p:g} | {'yes' if rescale else 'no'} | {cells} | {loss:.3f} ± {spread[2]:.3f} |")


def draw(slopes, judged):
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = FigureCanvasAgg(figure).figure.subplots(1, 2)
    for rescale, marker, style in ((True, "o", "-"), (False, "s", "--")):
        look = {"marker": marker, "linestyle": style, "color": COLOURS[rescale], "label": f"rescale={rescale}"}
        left.plot(PARTS, [np.mean(slopes[p, rescale]) for p in PARTS], **look)
        losses = [judged[p, rescale][:, 2] for p in PARTS]
        spread = [row.std(ddof=1) for row in losses]
        right.errorbar(PARTS, [row.mean() for row in losses], spread, capsize=3, **look)
    left.axhline(1, color="black", linewidth=0.8)
    left.set(title="The next layer's sums", ylabel="training / evaluation", ylim=(0, 1.15))
    right.set(title="Digits: loss on test images, in evaluation", ylabel="loss (mean and spread of 5 seeds)")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set(xlabel="p, the part of the features that is dropped", xticks=PARTS)
        axes.grid(True, alpha=0.25)
        axes.legend()
    return figure


def main() -> int:
    torch.set_num_threads(1)  # the net is small, and figures should not depend on the machine more than they must
    slopes, judged = measure()
    print_table(slopes, judged)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    figure = draw(slopes, judged)
    temporary = TARGET.with_suffix(".part.png")
    figure.savefig(temporary, dpi=100)
    write_atomically(TARGET, temporary.read_bytes())
    temporary.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
