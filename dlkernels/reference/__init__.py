"""Every operator in plain PyTorch: the forward by definition, and the backward written out.

Read these to learn what the kernels compute. Names, arguments and dimension letters are the kernels'.
"""

from dlkernels.reference.conv2d import conv2d, conv2d_backward

__all__ = ["conv2d", "conv2d_backward"]
