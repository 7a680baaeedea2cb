"""`PackedLinear`: a packed weight made ready for one kernel; calling it is the product. What a layer holds at run time.

A decode step calls a hundred of these for some microseconds each, so the call goes straight to the kernel. Under torch.compile
and autograd it goes through the operator (op.py), which computes the same.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        return self._run(self.prepared, self._rows_of(x)).view(*x.shape[:-1], self._rows)  # [..., out]

    def _rows_of(self, x: Tensor) -> Tensor:
        """`x` [..., in] as [tokens, in] with contiguous rows."""
        check_input(x, self._columns, self._device)
        flat = x.reshape(-1, self._columns)  # [tokens, in]
        return flat if flat.stride(1) == 1 and flat.stride(0) >= self._columns else flat.contiguous()

    def goes_with(self, other: PackedLinear) -> bool:
        """Whether one call of a kernel can multiply both."""
        return (
            self.kernel is other.kernel
            and self.kernel.run_each is not None
            and self.packed.shape == other.packed.shape
            and self.activations == other.activations
            and self._run is other._run
        )


def multiply_each(linears: Sequence[PackedLinear], x: Tensor, sizes: Sequence[int]) -> Tensor:
    """The next of `sizes` rows of `x` [n, in] times each of the weights, all of one shape: [n, out].

    It is what each gives alone, to the bit for a few rows of each; one call of the kernel where it can. Raises `KernelError`
    when `x` does not fit.
    """
    first = linears[0]
    plain = not torch.compiler.is_compiling() and not (x.requires_grad and torch.is_grad_enabled())
    if plain and first.kernel.run_each is not None and all(map(first.goes_with, linears)):
        alike = first.kernel.run_alike is not None and first._run is first.kernel.run_alike
        prepared = [linear.prepared for linear in linears]
        return first.kernel.run_each(prepared, first._rows_of(x), sizes, alike)  # [n, out]
    return torch.cat([linear(part) for linear, part in zip(linears, x.split(list(sizes)), strict=True)])
