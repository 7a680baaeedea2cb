"""Kernels: y = x W^T for packed weights. The torch reference is the definition; native CPU code and Triton are faster."""

from fracbit.kernels.kernel import Activations, Kernel
from fracbit.kernels.linear import PackedLinear, multiply_each
from fracbit.kernels.op import linear_op, spec_of
from fracbit.kernels.program import (
    NOTHING,
    Elementwise,
    HeadSpans,
    InputRounding,
    NativeProgram,
    Older,
    Span,
    Tables,
)
from fracbit.kernels.table import KERNELS, choose, kernel_report

__all__ = [
    "KERNELS",
    "NOTHING",
    "Activations",
    "Elementwise",
    "HeadSpans",
    "InputRounding",
    "Kernel",
    "NativeProgram",
    "Older",
    "PackedLinear",
    "Span",
    "Tables",
    "choose",
    "kernel_report",
    "linear_op",
    "multiply_each",
    "spec_of",
]
