"""Hand-written kernels for Conv2d, DropNorm and a reset-gate RNN, and eight topics that teach from the inside."""

from . import _libraries, reference  # noqa: F401  (loads the operators)
from ._backend import backend, set_backend
from ._info import info
from .ops.conv2d import Conv2d, ConvTranspose2d, conv2d, conv_transpose2d
from .ops.drop_norm import DropNorm, drop_mask, drop_norm
from .ops.reset_gate_rnn import ResetGateRNN, ResetGateRNNCell, reset_gate_rnn
from .ops.split_linear import SplitLinear, split_linear

__version__ = "0.1.0"
__all__ = [
    "Conv2d",
    "ConvTranspose2d",
    "DropNorm",
    "ResetGateRNN",
    "ResetGateRNNCell",
    "SplitLinear",
    "backend",
    "conv2d",
    "conv_transpose2d",
    "drop_mask",
    "drop_norm",
    "info",
    "reference",
    "reset_gate_rnn",
    "set_backend",
    "split_linear",
]
