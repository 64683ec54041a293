"""What every operator does between a Python call and its kernel.

A call can come from eager code, from torch.compile, from torch.func or from forward-mode AD. torch.library serves all
of them through one Python autograd kernel, which costs every eager call 4 us. So eager calls go around it:
`differentiable` takes an operator and its derivative, written once as a Function with `setup_context`, and picks the
path.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import Function, forward_ad


def differentiable(function: type[Function], op: Any) -> Callable:
    """A function that calls `op`, with the derivative that `function` gives it.

    Args:
        function: a Function whose forward(*args) calls `op`, with setup_context(ctx, inputs, output) and backward.
        op: the operator, such as torch.ops.dlkernels.conv2d.default; its autograd is registered here.
    """
    torch.library.register_autograd(op.name(), function.backward, setup_context=function.setup_context)

    class Eager(Function):
        """`function` as eager code needs it: forward with ctx, and the operator called below autograd."""

        @staticmethod
        def forward(ctx, *args):
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*args)
            function.setup_context(ctx, args, output)
            return output

        backward = function.backward

    apply = super(Function, Eager).apply  # Function.apply itself asks for torch.func again, which takes 2.6 us

    def call(*args):
        if torch.compiler.is_compiling():
            return op(*args)  # Dynamo cannot trace the guard below
        if forward_ad._current_level >= 0:
            return _without_forward_mode(function, args)
        if torch._C._are_functorch_transforms_active():
            return function.apply(*args)
        if torch.is_grad_enabled():
            return apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    shown: Any = Eager._backward_cls  # by grad_fn and by anomaly mode
    shown.__name__ = shown.__qualname__ = f"{function.__name__}Backward"
    shown.apply = function.backward  # which the inherited method looks for anew in every backward, for 2 us
    return call


def _without_forward_mode(function: type[Function], args: Sequence[Any]) -> Any:
    """Inside a forward-mode level: fine unless a tangent reaches `function`, which the operator would silently drop."""
    try:
        return function.apply(*args)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"{function.__name__}: forward-mode AD is not implemented; use reverse mode (torch.func.grad, jacrev)"
        ) from error


def from_reference(forward: Callable, backward: Callable) -> Callable:
    """A function that runs `forward(*args)` and, for its gradient, `backward(grad, *args)`, both plain PyTorch.

    `backward` returns one gradient for each of the leading arguments; it is differentiable itself.
    """

    class Reference(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args):
            return forward(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*(x if isinstance(x, torch.Tensor) else None for x in inputs))
            ctx.settings = [None if isinstance(x, torch.Tensor) else x for x in inputs]

        @staticmethod
        def backward(ctx, *grads):
            tensors = ctx.saved_tensors
            args = [
                setting if tensor is None else tensor for tensor, setting in zip(tensors, ctx.settings, strict=True)
            ]
            results = backward(*grads, *args)
            needed = [x if needs else None for x, needs in zip(results, ctx.needs_input_grad, strict=False)]
            return (*needed, *[None] * (len(args) - len(needed)))

    return Reference.apply


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast computes in on this device type, None where autocast is off."""
    if device_type in _AUTOCAST_KEYS and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def cast(tensors: Sequence[Any], dtype: torch.dtype | None) -> Sequence[Any]:
    """The floating-point tensors among `tensors` in `dtype`, as autocast casts them: float64 and all else stay."""
    if dtype is None:
        return tensors
    return [
        x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    ]


_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
_autocast_library = torch.library.Library("dlkernels", "IMPL")


def register_autocast(op: Any, dtype: torch.dtype | None = None, device_types: Sequence[str] = ("cpu", "cuda")) -> None:
    """Makes a direct call of `op` run in `dtype`, by default autocast's own, inside autocast on these device types."""
    for device_type in device_types:

        def kernel(*args, device_type=device_type):
            key = getattr(torch._C.DispatchKey, _AUTOCAST_KEYS[device_type])
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return op(*cast(args, dtype or torch.get_autocast_dtype(device_type)))  # here autocast counts as off

        _autocast_library.impl(op.name().split("::")[1].split(".")[0], kernel, _AUTOCAST_KEYS[device_type])


def register_vmap_by_loop(op: Any) -> None:
    """vmap of `op` as one call for each sample, the results stacked: slow, and right whatever is batched."""

    def rule(info, in_dims, *args):
        samples = []
        for i in range(info.batch_size):
            batched = (isinstance(x, torch.Tensor) and dim is not None for x, dim in zip(args, in_dims, strict=True))
            chosen = [x.select(d, i) if b else x for x, d, b in zip(args, in_dims, batched, strict=True)]
            samples.append(op(*chosen))
        if isinstance(samples[0], torch.Tensor):
            return torch.stack(samples), 0
        outputs = [None if parts[0] is None else torch.stack(parts) for parts in zip(*samples, strict=True)]
        return tuple(outputs), tuple(None if output is None else 0 for output in outputs)

    torch.library.register_vmap(op.name(), rule)


def check_devices(op: str, input: torch.Tensor, **others: torch.Tensor | None) -> None:
    """For fake kernels, which see calls that mix a meta tensor with real ones: all must be where input is."""
    for name, tensor in others.items():
        torch._check(
            tensor is None or tensor.device == input.device,
            lambda name=name, tensor=tensor: (
                f"{op}: {name} must be on the device of input ({input.device}), got {tensor.device}"
            ),
        )


def explain(error: Exception, op: str, tensors: Sequence[Any], torch_call: Callable[[], Any]) -> Exception:
    """The clearest error for a call that failed with `error`.

    Where torch's own function refuses the same call, its error: users of torch.nn know it. Else ours.
    """
    if "Could not run" in str(error):  # the dispatcher's long list of what it has
        layouts = {x.layout for x in tensors if isinstance(x, torch.Tensor)} - {torch.strided}
        if layouts:
            return RuntimeError(f"{op}: expected dense (torch.strided) tensors, got {', '.join(map(str, layouts))}")
        devices = sorted({str(x.device) for x in tensors if isinstance(x, torch.Tensor)})
        return RuntimeError(
            f"{op}: expected tensors on a device this build of dlkernels has kernels for, got {', '.join(devices)} "
            "(`dlkernels info` shows what was built)"
        )
    if isinstance(error, NotImplementedError):  # such as forward-mode AD, by torch itself
        return error
    try:
        with torch.no_grad():
            torch_call()
    except (RuntimeError, TypeError, ValueError) as torchs_own:
        # neither its word for a dtype nor oneDNN's "could not create a primitive" names an argument
        if "not implemented for" not in str(torchs_own) and not str(torchs_own).startswith("could not "):
            return torchs_own
    return error
