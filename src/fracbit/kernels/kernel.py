"""`Kernel`: one way to multiply activations with a packed weight. The table of kernels is in table.py.

`reference.py` is the definition; a kernel computes the same product from the same bytes, faster. `prepare` may derive what it
needs from the stored layout when a weight is loaded; the bytes on disk stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fracbit.errors import KernelError, check_choice
from fracbit.numerics.packed import PackedTensor
from fracbit.records.scheme import Scheme

Activations = Literal["float", "int8"]
FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Kernel:
    """A line of the table: the first that `supports` a weight on a device is the one that runs.

    - `supports(scheme, device, shape)`: whether the kernel can run weights `[out, in]` of this scheme there, now.
    - `prepare(packed, activations)`: whatever `run` needs, made once. It shares memory with `packed`.
    - `run(prepared, x)`: `x` [n, in] with contiguous rows, of a type in `FLOAT_TYPES` -> [n, out] of the same type.
    - `paths`: those that it computes as asked; activations of another path are multiplied exactly.
    - `explain()`: one sentence for people: what it is, and why it does not run here if it does not.
    - `run_alike`: `run`, where a row of the result is the same to the bit in any batch; None: not offered.
    - `run_each(prepared, x, sizes, alike)`: weights of one shape, each times the next of `sizes` rows of `x`, in one call: what
      `run` gives for each, or `run_alike`. None: not offered.
    """

    name: str
    supports: Callable[[Scheme, torch.device, tuple[int, int]], bool]
    prepare: Callable[[PackedTensor, Activations], Any]
    run: Callable[[Any, Tensor], Tensor]
    explain: Callable[[], str]
    paths: tuple[Activations, ...] = ("float",)
    run_alike: Callable[[Any, Tensor], Tensor] | None = None
    run_each: Callable[[Sequence[Any], Tensor, Sequence[int], bool], Tensor] | None = None

    def runner(self, deterministic: bool) -> Callable[[Any, Tensor], Tensor]:
        """`run`, or `run_alike`. Raises `KernelError` where that is not offered."""
        if not deterministic:
            return self.run
        if self.run_alike is None:
            raise KernelError(
                f"the kernel {self.name} gives a row other last bits in another batch; deterministic products need the native "
                "kernels, on a CPU: install fracbit with a C++17 compiler, or leave `deterministic` out"
            )
        return self.run_alike


def check_activations(activations: str) -> None:
    """Raises `KernelError` for anything but the two paths a user can choose."""
    check_choice("type of activations", activations, get_args(Activations), KernelError)


def check_input(x: Tensor, columns: int, device: torch.device) -> None:
    """Raises `KernelError` when `x` is not [..., columns] of a float type on `device`."""
    if x.dtype not in FLOAT_TYPES:
        raise KernelError(
            f"activations are {x.dtype}; a packed linear takes float32, float16 or bfloat16: load the model in one of them"
        )
    if x.dim() == 0 or x.shape[-1] != columns:
        raise KernelError(
            f"activations of shape {tuple(x.shape)} do not fit a weight with {columns} input channels"
        )
    if x.device != device:
        raise KernelError(
            f"activations are on {x.device}, the packed weight is on {device}; move one of them"
        )
