"""The native CPU kernels: packed codes are multiplied as they lie in memory; no full matrix is ever decoded.

There are two paths, and the user chooses:

- `float`: table values times fp32 activations, summed in fp32; relative error against the reference below 1e-5.
- `int8`: activations are rounded to 8 bits, eight neighbours share a scale, and are multiplied as integers; relative error of
  the product below 5e-3. Codes of evenly spaced types are the integers, and other tables are taken with 15 bits, so the
  error is that of the activations. Blocks that are not a multiple of 8 along the input run in float on either path.

The instruction set is chosen when a process starts: AVX-512 with VNNI and VBMI, AVX2, NEON with and without the dot product of
ARMv8.2, or plain C++; FRACBIT_ISA forces one. NEON was tested in an emulator; it has not been timed on an ARM machine.

Few rows of activations (decode) go through the kernel of `native/row_kernel.h`. Many (prefill) may be faster as tiles of
decoded rows, multiplied exactly by torch's own matrix product; `tiles_from` says from how many on.
Results then depend on how many rows there are, in their last bits; `run_alike` never takes tiles.

The kernels run on torch's OpenMP threads where they can. FRACBIT_THREAD_POOL=own makes them use threads of their own, for
instance beside another library that keeps torch's threads busy; docs/serving.md describes it.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from fracbit.errors import KernelError
from fracbit.kernels.kernel import Activations, Kernel, check_activations
from fracbit.numerics.layout import scales_shape
from fracbit.numerics.packed import PackedTensor, decode, scale_values, table_of
from fracbit.records.scheme import Scheme, flat_block, patch_block

if TYPE_CHECKING:
    from types import ModuleType

ABI = 10
TILE_BYTES = 1 << 20
"""Of decoded weights: about a core's second-level cache."""
TILE_ROWS = 128
"""At least, and a multiple of half of it: torch multiplies by few or odd rows at half the speed."""
POOL_VARIABLE = "FRACBIT_THREAD_POOL"
POOLS = ("torch", "own")
"""Whose threads the kernels use; the first is the default."""
ISA_VARIABLE = "FRACBIT_ISA"
SETS = ("avx512", "avx2", "neon dot", "neon", "plain")
"""Instruction sets that there are kernels for, whatever the machine has."""


def _force_isa(native: ModuleType | None) -> str:
    """Use the instruction set that the variable names; a remark about it, empty where it names none."""
    wanted, here = os.environ.get(ISA_VARIABLE), SETS if native is None else native.instruction_sets()
    if not wanted:
        return ""
    if wanted not in here:
        raise KernelError(
            f"{ISA_VARIABLE} is {wanted!r}: it names the instruction set that the CPU kernels use; set it to one that this "
            f"machine has ({', '.join(here)}), or unset it"
        )
    if native is not None:
        native.choose_instruction_set(wanted)
    return f", {wanted} alone ({ISA_VARIABLE})"


def _pool() -> str:
    chosen = os.environ.get(POOL_VARIABLE) or POOLS[0]
    if chosen not in POOLS:
        raise KernelError(
            f"{POOL_VARIABLE} is {chosen!r}: it says whose threads the CPU kernels use; set it to {' or '.join(POOLS)}, "
            "or unset it. OMP_NUM_THREADS says how many"
        )
    return chosen


def _threads_of(native: ModuleType, pool: str) -> str:
    """Tell the module which threads to use; what it uses, in words."""
    native.allow_threads_of_torch(pool == "torch")
    if native.on_threads_of_torch():
        return "threads of torch"
    reason = f"{POOL_VARIABLE}=own" if pool == "own" else "torch has no OpenMP of GNU's kind"
    return f"threads of their own ({reason})"


def _load() -> tuple[ModuleType | None, str]:
    pool = _pool()
    try:
        native = importlib.import_module("fracbit.kernels._native")
    except ImportError as error:
        _force_isa(None)
        return None, f"the native module was not built ({error}); install with a C++17 compiler to have it"
    if native.abi() != ABI:
        return None, f"the native module is of another version ({native.abi()}, needed {ABI}); build it again"
    sets = ", ".join(native.instruction_sets())
    return native, f"native, instruction sets {sets}{_force_isa(native)}, on {_threads_of(native, pool)}"


NATIVE, NOTE = _load()
AVX512 = NATIVE is not None and NATIVE.instruction_set() == "avx512"
BF16_PRODUCTS = NATIVE is not None and bool(NATIVE.has_gram())


@dataclass(frozen=True, eq=False)
class CpuWeight:
    """A weight [rows, columns] as the native module holds it, and whether it takes the path `int8`."""

    weight: Any
    rows: int
    columns: int
    int8: bool


def prepare(packed: PackedTensor, activations: Activations, isa: str = "") -> CpuWeight:
    """Hand `packed` to the native module, which shares its memory. `isa` names an instruction set; empty: the best one.

    Quantized scales (double quantization) are decoded to fp32 here, so that a block takes 32 bits in memory instead of 8.
    Raises `KernelError` when a buffer does not fit the scheme.
    """
    check_activations(activations)
    if NATIVE is None:
        raise KernelError(NOTE)
    scheme = packed.scheme
    zeros = scheme.offset == "zero"
    per_block = scales_shape((packed.shape[0], packed.quantized_width), scheme)
    kind, block = _blocks(scheme)
    scales = _floats(packed.scales, per_block)
    offsets = None if packed.offsets is None or zeros else _floats(packed.offsets, per_block)
    codes_of_zero = _part(packed.offsets) if zeros else None
    if (patch := patch_block(scheme.block)) is not None:
        # The module has blocks along rows: every row of a patch gets the scale, and the zero code, of its own.
        rows = torch.arange(packed.shape[0]) // patch[0]  # [out]
        scales = scales[rows]
        offsets = None if offsets is None else offsets[rows]
        codes_of_zero = None if codes_of_zero is None else codes_of_zero[rows]
    table = table_of(packed).values.contiguous()
    if scheme.axis == "out" and scheme.dtype == "int:step" and offsets is not None:
        # Scales then go into the activations before these are rounded: values around 0 leave the sums of the two parts small.
        middle = float(table.mean())
        scales, table = scales.float(), table - middle
        offsets = offsets.float() + middle * scales
    try:
        weight = NATIVE.PackedWeight(
            rows=packed.shape[0],
            columns=packed.shape[1],
            bits=scheme.bits,
            blocks=kind,
            block=block,
            codes=packed.codes.detach(),
            scales=scales,
            offsets=offsets,
            zeros=codes_of_zero,
            table=table,
            outlier_columns=_part(packed.columns),
            outliers=_part(packed.outliers),
            isa=isa,
        )
    except (ValueError, TypeError) as error:
        raise KernelError(
            f"a packed weight of scheme {scheme} and shape {packed.shape} is broken: {error}"
        ) from None
    return CpuWeight(weight, *packed.shape, activations == "int8")


def run(prepared: CpuWeight, x: Tensor) -> Tensor:
    """`x` [n, in] with contiguous rows -> [n, out]."""
    if x.shape[0] >= tiles_from(prepared.int8, x.dtype):
        return _by_tiles(prepared, x, x.new_empty((x.shape[0], prepared.rows)))
    return run_alike(prepared, x)


def run_alike(prepared: CpuWeight, x: Tensor) -> Tensor:
    """`run` by the row kernel alone, in which a row of `y` depends on nothing but its row of `x`."""
    y = x.new_empty((x.shape[0], prepared.rows))  # [n, out]
    # Capsules: asking a tensor for one in Python takes longer than a small product.
    prepared.weight.multiply(to_dlpack(x.detach()), to_dlpack(y), prepared.int8, torch.get_num_threads())
    return y


def run_each(prepared: Sequence[CpuWeight], x: Tensor, sizes: Sequence[int], alike: bool) -> Tensor:
    """`run` or `run_alike` of weights of one shape, each on the next of `sizes` rows of `x` [n, in]: [n, out].

    All that take the row kernel are one call, so that the threads share the rows of all of them.
    """
    first = prepared[0]
    y = x.new_empty((x.shape[0], first.rows))  # [n, out]
    most = math.inf if alike else tiles_from(first.int8, x.dtype)
    start, ready = 0, list[int]()  # rows before `start` are done, but for those of the weights that wait
    for number, size in enumerate((*sizes, None)):
        if size is not None and size < most:
            ready.append(number)
            continue
        if ready:
            stop = start + sum(sizes[each] for each in ready)
            weights = [prepared[each].weight for each in ready]
            counts = [sizes[each] for each in ready]
            part, to = to_dlpack(x[start:stop].detach()), to_dlpack(y[start:stop])
            NATIVE.multiply_each(weights, part, to, counts, first.int8, torch.get_num_threads())  # type: ignore[union-attr]
            start, ready = stop, []
        if size is not None:
            _by_tiles(prepared[number], x[start : start + size], y[start : start + size])
            start += size
    return y


def tiles_from(int8: bool, dtype: torch.dtype) -> float:
    """Rows of activations from which on tiles are faster than the row kernel: measured by bench/kernels/prefill.py."""
    if not AVX512:
        return 32
    if dtype == torch.bfloat16 and BF16_PRODUCTS:
        return 96 if int8 else 32
    return math.inf if int8 else 64


def _by_tiles(prepared: CpuWeight, x: Tensor, y: Tensor) -> Tensor:
    """Fill `y` [n, out] from `x` [n, in], a tile of decoded weights after another."""
    # Where the processor has no products of 16-bit floats, torch takes up to ten times as long for them as for fp32.
    exact = x if x.dtype == torch.bfloat16 and BF16_PRODUCTS else x.float()  # [n, in]
    fitting = TILE_BYTES // (prepared.columns * exact.element_size())
    step = max(TILE_ROWS, fitting - fitting % (TILE_ROWS // 2))
    tile = exact.new_empty((min(step, prepared.rows), prepared.columns))  # [tile, in]
    for first in range(0, prepared.rows, step):
        part = tile[: prepared.rows - first]  # [rows, in]
        prepared.weight.decode(first, part, torch.get_num_threads())
        target = y[:, first : first + step]  # [n, rows]
        if target.dtype == exact.dtype:
            torch.mm(exact, part.T, out=target)
        else:
            target.copy_(exact @ part.T)
    return y


def _blocks(scheme: Scheme) -> tuple[str, int]:
    """How the native module names the layout of blocks, and their length."""
    if isinstance(scheme.block, int):
        return scheme.axis, scheme.block
    if scheme.block == "row":
        return scheme.axis, 2**31
    if (patch := patch_block(scheme.block)) is not None:
        return "in", patch[1]
    flat = flat_block(scheme.block)
    return ("flat", flat) if flat else ("tensor", 1)


def _floats(part: Tensor | PackedTensor, per_block: tuple[int, ...]) -> Tensor:
    if isinstance(part, PackedTensor):
        return decode(part).view(per_block)
    return scale_values(part) if part.dtype == torch.uint8 else part.detach()


def _part(part: Tensor | PackedTensor | None) -> Tensor | None:
    """The same memory as another tensor: the native module must not keep the tensor alive, since a cache is keyed on it."""
    assert not isinstance(part, PackedTensor)
    return None if part is None else part.detach()


def _supports(scheme: Scheme, device: torch.device, shape: tuple[int, int]) -> bool:
    return NATIVE is not None and device.type == "cpu"


CPU = Kernel(
    name="cpu",
    supports=_supports,
    prepare=prepare,
    run=run,
    run_alike=run_alike,
    run_each=run_each,
    explain=lambda: NOTE,
    paths=("float", "int8"),
)
