"""The native CPU kernels: packed codes are multiplied as they lie in memory, nothing is decoded to a full matrix.

Two paths, the user's choice:

- `float`: table values times fp32 activations, summed in fp32; relative error against the reference below 1e-5.
- `int8`: activations are rounded to 8 bits, eight neighbours sharing a scale, and multiplied as integers; relative error of
  the product below 5e-3. Codes of evenly spaced types are the integers, other tables are taken with 15 bits, so the
  error is that of the activations. Blocks that are no multiple of 8 along the input run in float on either path.

Instruction sets, chosen when a process starts: AVX-512 with VNNI and VBMI, AVX2, NEON with and without the dot product of
ARMv8.2, plain C++. NEON was tested in an emulator; no ARM machine has timed it.

Few rows of activations (decode) go through the kernel of `native/row_kernel.h`; many (prefill) are cheaper as tiles of
decoded rows that stay in the cache, multiplied by torch's own matrix product.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from fracbit.errors import KernelError
from fracbit.kernels.kernel import Activations, Kernel, check_activations
from fracbit.numerics.blocks import scales_shape
from fracbit.numerics.packed import PackedTensor, decode, table_of
from fracbit.records.scheme import Scheme, flat_block

if TYPE_CHECKING:
    from types import ModuleType

ABI = 6
PREFILL_ROWS = 32  # from here on decoding a tile and calling the matrix product is faster
TILE_BYTES = 1 << 20  # of decoded weights: about a core's second-level cache


def _load() -> tuple[ModuleType | None, str]:
    try:
        native = importlib.import_module("fracbit.kernels._native")
    except ImportError as error:
        return None, f"the native module was not built ({error}); install with a C++17 compiler to have it"
    if native.abi() != ABI:
        return None, f"the native module is of another version ({native.abi()}, needed {ABI}); build it again"
    return native, f"native, instruction sets {', '.join(native.instruction_sets())}"


NATIVE, NOTE = _load()


@dataclass(frozen=True, eq=False)
class Prepared:
    """A weight as the native module holds it, and which path it takes."""

    weight: Any
    rows: int
    columns: int
    int8: bool


def prepare(packed: PackedTensor, activations: Activations, isa: str = "") -> Prepared:
    """Hand `packed` to the native module, which shares its memory. `isa` names an instruction set; empty is the best.

    Quantized scales (double quantization) are decoded to fp32 here: 32 bits a block in memory instead of 8.
    Raises `KernelError` when a buffer does not fit the scheme.
    """
    check_activations(activations)
    if NATIVE is None:
        raise KernelError(NOTE)
    scheme = packed.scheme
    zeros = scheme.offset == "zero"
    stored = scales_shape((packed.shape[0], packed.kept), scheme)
    kind, block = _blocks(scheme)
    offsets = None if packed.offsets is None or zeros else _floats(packed.offsets, stored)
    try:
        weight = NATIVE.PackedWeight(
            *packed.shape, scheme.bits, kind, block, packed.codes.detach(), _floats(packed.scales, stored), offsets,
            _part(packed.offsets) if zeros else None, table_of(packed).values.contiguous(), _part(packed.columns),
            _part(packed.outliers), isa,
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise KernelError(
            f"a packed weight of scheme {scheme} and shape {packed.shape} is broken: {error}"
        ) from None
    return Prepared(weight, *packed.shape, activations == "int8")


def run(prepared: Prepared, x: Tensor) -> Tensor:
    """`x` [n, in] with contiguous rows -> [n, out]."""
    y = x.new_empty((x.shape[0], prepared.rows))
    if x.shape[0] >= PREFILL_ROWS:
        return _prefill(prepared, x, y)
    # Capsules: asking a tensor for one in Python takes longer than a small product.
    prepared.weight.multiply(to_dlpack(x.detach()), to_dlpack(y), prepared.int8, torch.get_num_threads())
    return y


def _prefill(prepared: Prepared, x: Tensor, y: Tensor) -> Tensor:
    step = max(1, min(prepared.rows, TILE_BYTES // (prepared.columns * x.element_size())))
    tile = x.new_empty((step, prepared.columns))
    for first in range(0, prepared.rows, step):
        part = tile[: prepared.rows - first]
        prepared.weight.decode(first, part, torch.get_num_threads())
        y[:, first : first + step] = x @ part.T
    return y


def _blocks(scheme: Scheme) -> tuple[str, int]:
    if isinstance(scheme.block, int):
        return scheme.axis, scheme.block
    if scheme.block == "row":
        return scheme.axis, 2**31
    flat = flat_block(scheme.block)
    return ("flat", flat) if flat else ("tensor", 1)


def _floats(part: Tensor | PackedTensor, stored: tuple[int, ...]) -> Tensor:
    return decode(part).view(stored) if isinstance(part, PackedTensor) else part.detach()


def _part(part: Tensor | PackedTensor | None) -> Tensor | None:
    """A share of a tensor's memory: the native module must not keep the tensor itself alive, a cache is keyed on it."""
    assert not isinstance(part, PackedTensor)
    return None if part is None else part.detach()


def _supports(scheme: Scheme, device: torch.device, shape: tuple[int, int]) -> bool:
    return NATIVE is not None and device.type == "cpu"


CPU = Kernel(name="cpu", supports=_supports, prepare=prepare, run=run, explain=lambda: NOTE)
