"""Draws docs/images/reset_gate_rnn_gradients.png, and prints the table of docs/reset_gate_rnn.md.

    python tools/draw_reset_gate_rnn.py

How far do gradients reach? A layer of 128 features with nn.GRU's initial weights, the gate's bias set so that r is
about 0.1, 0.5 or 0.9, runs over random input. The gradient of h at the last step is a random direction of length 1; how
long is the gradient of h some steps before, when the recurrent weights are 1, 2 or 3 times the initial ones?
"""

import sys
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import dlkernels
from dlkernels.bench.report import write_atomically

TARGET = Path(__file__).resolve().parent.parent / "docs" / "images" / "reset_gate_rnn_gradients.png"
FORMS = {"after": "#0072b2", "before": "#d55e00", "output": "#009e73"}  # told apart by every kind of colour vision
GATES = {0.1: -2.2, 0.5: 0.0, 0.9: 2.2}  # r where nothing else is added: its bias
SCALES = (1, 2, 3)  # of the recurrent weights, as multiples of the initial ones
H, B, T, STEPS = 128, 64, 60, 20
TABLE_STEPS = 10


@torch.enable_grad()
def reach(reset, bias, scale, seed=0):
    """(STEPS + 1) lengths of the gradient of h, k = 0.. steps before the last: the mean over sequences."""
    torch.manual_seed(seed)
    rnn = dlkernels.ResetGateRNN(H, H, reset=reset)
    with torch.no_grad():
        rnn.get_parameter("weight_hh_l0").mul_(scale)
        b_ih, b_hh = rnn.get_parameter("bias_ih_l0"), rnn.get_parameter("bias_hh_l0")
        b_ih[:H], b_ih[H:] = bias, 0
        b_hh.zero_()
    h = torch.zeros(1, B, H)
    states = []
    for x in torch.randn(T, 1, B, H):  # a call for every step, so that every h can be asked for its gradient
        h = rnn(x, h)[1]
        states.append(h)
    direction = torch.nn.functional.normalize(torch.randn(1, B, H), dim=-1)
    gradients = torch.autograd.grad(h, states[-STEPS - 1 :], direction)
    return [gradient.norm(dim=-1).mean().item() for gradient in reversed(gradients)]


def print_table(lengths):
    print(f"| W_hh | r | {' | '.join(FORMS)} |")
    print("|---|---|---:|---:|---:|")
    for scale in SCALES:
        for r, bias in GATES.items():
            cells = " | ".join(f"{lengths[form, bias, scale][TABLE_STEPS]:.1e}" for form in FORMS)
            print(f"| {scale}x | {r:g} | {cells} |")


def draw(lengths):
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    panels = FigureCanvasAgg(figure).figure.subplots(1, len(GATES), sharey=True)
    for axes, (r, bias) in zip(panels, GATES.items(), strict=True):
        for form, colour in FORMS.items():
            for scale, style in zip(SCALES, (":", "--", "-"), strict=True):
                label = f"{form}, {scale}x" if axes is panels[0] else None
                axes.plot(range(STEPS + 1), lengths[form, bias, scale], style, color=colour, label=label)
        axes.set(title=f"r about {r:g}", xlabel="steps back, k", xticks=range(0, STEPS + 1, 5), yscale="log")
        axes.grid(True, alpha=0.25)
    panels[0].set(ylabel="length of the gradient of h", ylim=(1e-12, 10))
    figure.legend(loc="outside right center", title="form, recurrent weights", fontsize="small")
    return figure


def main() -> int:
    torch.set_num_threads(1)  # figures should not depend on the machine more than they must
    lengths = {
        (form, bias, scale): reach(form, bias, scale) for form in FORMS for bias in GATES.values() for scale in SCALES
    }
    print_table(lengths)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    figure = draw(lengths)
    temporary = TARGET.with_suffix(".part.png")
    figure.savefig(temporary, dpi=100)
    write_atomically(TARGET, temporary.read_bytes())
    temporary.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
