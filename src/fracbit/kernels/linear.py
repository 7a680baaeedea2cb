"""`PackedLinear`: a packed weight made ready for one kernel; calling it is the product. What a layer holds at run time.

A decode step calls a hundred of these for some microseconds each, so the call goes straight to the kernel. Under torch.compile
and autograd it goes through the operator (op.py), which computes the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fracbit.kernels.kernel import Activations, check_activations, check_input
from fracbit.kernels.op import linear_op, spec_of
from fracbit.kernels.table import choose
from fracbit.numerics.packed import PackedTensor, parts_of


class PackedLinear:
    """`y = x W^T` for `x` [..., in] in fp32, fp16 or bf16; `y` [..., out] in the same type.

    `activations`: `"float"` multiplies exact values, `"int8"` rounds the activations to 8 bits (see `kernels/cpu.py`).
    The packed tensor must not be written to afterwards: kernels may have derived tables from it.
    """

    def __init__(
        self, packed: PackedTensor, activations: Activations = "float", deterministic: bool = False
    ) -> None:
        """Choose a kernel for `packed` and prepare it. `deterministic`: a row of `y` is the same to the bit in any batch.

        Raises `KernelError` when a buffer does not fit the scheme, or no kernel here is deterministic.
        """
        check_activations(activations)
        self.packed = packed
        self.activations = activations
        self.kernel = choose(packed.scheme, packed.codes.device, packed.shape)
        self.prepared: Any = self.kernel.prepare(packed, activations)
        self._run = self.kernel.runner(deterministic)
        self._rows, self._columns = packed.shape
        self._device = packed.codes.device
        parts = dict(parts_of(packed))
        self._parts = list(parts.values())
        self._spec = spec_of(packed.scheme, packed.shape, parts, deterministic)

    def __call__(self, x: Tensor) -> Tensor:
        """The product. Raises `KernelError` when `x` does not fit."""
        if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            product: Tensor = linear_op(x, self._parts, self._spec, self.activations)
            return product
        check_input(x, self._columns, self._device)
        flat = x.reshape(-1, self._columns)  # [tokens, in]
        if flat.stride(1) != 1 or flat.stride(0) < self._columns:
            flat = flat.contiguous()
        return self._run(self.prepared, flat).view(*x.shape[:-1], self._rows)  # [..., out]
