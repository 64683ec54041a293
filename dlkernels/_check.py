"""`dlkernels check`: is this build right on this machine? Every operator, forward and backward, against float64."""

import torch
import torch.nn.functional as F

from .ops.conv2d import conv2d
from .testing import DTYPES, Conv2dCase, compare, conv2d_cases, devices


def check_all() -> int:
    """Compares every operator with torch's on every device and prints a line for each; the number of failures."""
    failures = 0
    for device in devices():
        for dtype in DTYPES:
            problems = [problem for case in conv2d_cases() if (problem := _problem(case, dtype, device))]
            label = f"conv2d {device} {str(dtype).removeprefix('torch.')}"
            print(f"{label:24} {len(conv2d_cases()) - len(problems)} of {len(conv2d_cases())} cases right")
            for problem in problems:
                print(f"  {problem}")
            failures += len(problems)
    return failures


def _problem(case: Conv2dCase, dtype: torch.dtype, device: str) -> str | None:
    """What is wrong with our output or gradients in this case, or None."""
    generator = torch.Generator().manual_seed(0)
    inputs = [x for x in case.make_inputs(dtype, device, generator=generator) if x is not None]
    try:
        output = conv2d(*inputs, **case.arguments)
        grad = torch.randn(output.shape, generator=generator).to(output)
        ours, theirs = _results(conv2d, case, inputs, grad), _results(F.conv2d, case, inputs, grad)
        exact = _results(F.conv2d, case, [x.cpu().double() for x in inputs], grad.cpu().double())
        names = ("output", "gradient of input", "gradient of weight", "gradient of bias")
        for name, a, b, c in zip(names, ours, theirs, exact, strict=False):
            compare(a, b, c, dtype, gradient=name != "output", name=name)
    except (AssertionError, RuntimeError) as error:
        return f"{case.name}: {error}"
    return None


def _results(function, case: Conv2dCase, tensors: list, grad: torch.Tensor) -> list:
    """The output, and the gradient of every tensor when the output's is `grad`."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    output = function(*tensors, **case.arguments)
    return [output, *torch.autograd.grad(output, tensors, grad)]
