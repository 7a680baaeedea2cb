"""Gram matrices of bfloat16 activations by the native kernel: exact products, sums in fp32, half of the matrix computed.

torch's product of two bfloat16 matrices is bfloat16 again, which would round the sums. Where the kernel cannot run,
activations are converted to fp32 first; that is the definition (numerics/linalg.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fracbit.kernels.cpu import NATIVE
from fracbit.numerics import linalg


def add_gram(gram: Tensor, x: Tensor) -> Tensor:
    """`gram` fp32 [in, in] + x^T x of `x` [tokens, in], any float type."""
    return add_gram_(gram.clone(), x)


def add_gram_(gram: Tensor, x: Tensor) -> Tensor:
    """`add_gram` that may write the sum into `gram`: a new matrix for every batch costs page faults."""
    here = NATIVE is not None and NATIVE.has_gram() and x.device.type == "cpu" and x.dtype == torch.bfloat16
    if not here:
        return linalg.add_gram(gram, x.float())
    assert NATIVE is not None
    NATIVE.add_gram(x if x.stride(-1) == 1 else x.contiguous(), gram, torch.get_num_threads())
    return gram
