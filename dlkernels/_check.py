"""`dlkernels check`: is this build right on this machine? Every operator, forward and backward, against float64."""

import warnings
from typing import Any

import torch

from ._backend import backend
from .ops.conv2d import conv2d, conv_transpose2d
from .ops.drop_norm import drop_norm
from .ops.reset_gate_rnn import reset_gate_rnn
from .testing import (
    DTYPES,
    compare,
    conv2d_cases,
    conv_transpose2d_cases,
    devices,
    drop_norm_cases,
    reset_gate_rnn_cases,
)

# An operator, its cases (each makes its inputs and has the other arguments), and the names of the tensors it takes.
# One kept feature is its own mean: its gradient is 0, and a relative error says nothing.
OPERATORS = (
    (conv2d, conv2d_cases(), ("input", "weight", "bias")),
    (conv_transpose2d, conv_transpose2d_cases(), ("input", "weight", "bias")),
    (drop_norm, [case for case in drop_norm_cases() if case.kept != 1], ("input", "keep", "weight", "bias")),
    # a single feature that saturates has a gradient of 0 but for rounding
    (
        reset_gate_rnn,
        [case for case in reset_gate_rnn_cases() if case.sizes[3] > 1],
        ("input", "h0", "weight_ih", "weight_hh", "bias_ih", "bias_hh"),
    ),
)


def check_all() -> int:
    """Compares every operator with torch's on every device and prints a line for each; the number of failures."""
    failures = 0
    for operator, cases, names in OPERATORS:
        for device in devices():
            for dtype in DTYPES:
                problems = [text for case in cases if (text := _problem(operator, case, names, dtype, device))]
                label = f"{operator.__name__} {device} {str(dtype).removeprefix('torch.')}"
                print(f"{label:29} {len(cases) - len(problems)} of {len(cases)} cases right")
                print("".join(f"  {problem}\n" for problem in problems), end="")
                failures += len(problems)
    return failures


def _problem(operator, case: Any, names: tuple, dtype: torch.dtype, device: str) -> str | None:
    """What is wrong with our output or gradients in this case, or None."""
    generator = torch.Generator().manual_seed(0)
    inputs = case.make_inputs(dtype, device, generator=generator)
    exact_inputs = [x.cpu().double() if x is not None and x.is_floating_point() else x for x in inputs]
    exact_inputs = [x if x is None else x.cpu() for x in exact_inputs]
    try:
        outputs = _as_tuple(operator(*inputs, **case.arguments))
        grads = [torch.randn(output.shape, generator=generator).to(device, dtype) for output in outputs]
        ours = _results(operator, case, inputs, names, grads)
        with backend("torch"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of padding="same" with even kernels, torch says that it copies
            theirs = _results(operator, case, inputs, names, grads)
            exact = _results(operator, case, exact_inputs, names, [grad.cpu().double() for grad in grads])
        for name, result in ours.items():
            compare(result, theirs[name], exact[name], dtype, gradient=name.startswith("gradient"), name=name)
    except (AssertionError, RuntimeError) as error:
        return f"{case.name}: {error}"
    return None


def _results(operator, case: Any, inputs, names: tuple, grads: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The outputs, and the gradient of every floating-point tensor when the outputs' are `grads`."""
    tensors = [x.detach().requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs]
    outputs = _as_tuple(operator(*tensors, **case.arguments))
    wanted = {name: x for name, x in zip(names, tensors, strict=True) if x is not None and x.requires_grad}
    gradients = torch.autograd.grad(outputs, list(wanted.values()), grads, materialize_grads=True)
    results = {f"output {i}" if i else "output": output for i, output in enumerate(outputs)}
    return results | {f"gradient of {name}": x for name, x in zip(wanted, gradients, strict=True)}


def _as_tuple(outputs) -> tuple:
    return outputs if isinstance(outputs, tuple) else (outputs,)
