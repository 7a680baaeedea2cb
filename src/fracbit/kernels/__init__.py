"""Kernels: y = x W^T for packed weights. The torch reference is the definition; native CPU code and Triton are faster."""

from fracbit.kernels.decoder import DecoderBlock, DecoderShape, NativeDecoder
from fracbit.kernels.kernel import Activations, Kernel
from fracbit.kernels.linear import PackedLinear
from fracbit.kernels.op import linear_op, spec_of
from fracbit.kernels.table import KERNELS, choose, kernel_report

__all__ = [
    "KERNELS",
    "Activations",
    "DecoderBlock",
    "DecoderShape",
    "Kernel",
    "NativeDecoder",
    "PackedLinear",
    "choose",
    "kernel_report",
    "linear_op",
    "spec_of",
]
