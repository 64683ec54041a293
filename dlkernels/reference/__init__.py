"""Every operator in plain PyTorch: the forward by definition, and the backward written out.

Read these to learn what the kernels compute. Names, arguments and dimension letters are the kernels'.
"""

from dlkernels.reference.conv2d import conv2d, conv2d_backward, conv_transpose2d, conv_transpose2d_backward
from dlkernels.reference.drop_norm import drop_mask, drop_norm, drop_norm_backward
from dlkernels.reference.reset_gate_rnn import reset_gate_rnn, reset_gate_rnn_backward
from dlkernels.reference.split_linear import split_linear, split_linear_backward

__all__ = [
    "conv2d",
    "conv2d_backward",
    "conv_transpose2d",
    "conv_transpose2d_backward",
    "drop_mask",
    "drop_norm",
    "drop_norm_backward",
    "reset_gate_rnn",
    "reset_gate_rnn_backward",
    "split_linear",
    "split_linear_backward",
]
