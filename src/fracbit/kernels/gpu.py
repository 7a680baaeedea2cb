"""The packed product in Triton, for CUDA: every data type, width, block along a line, axis and offset.

One kernel family, as on the CPU: codes index the table of the data type, which stays in the first-level cache, or are numbers
on a line. A program computes a tile [n, rows] of y and walks over the input; a code of any width is cut out of the two bytes it
touches, so the canonical layout is read as it is. For rows of activations 1-16 the sums are taken on the vector units (GEMV:
the work is reading codes), beyond that a tile of weights is decoded into registers and multiplied by `tl.dot` (GEMM).

Tests run it in Triton's interpreter (TRITON_INTERPRET=1) on the CPU and compile it for an H100; it has not been measured on a
GPU. GEMV there takes two loads a weight, its code and its scale, a third where the table is no line. Reckoned at 32 loads a
clock that is 60 % of an H100's memory bandwidth at 4 bits, 40 % with a table: the next step is several codes in one load.
Triton is optional: it comes with torch's CUDA builds on Linux.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from fracbit.kernels.kernel import Activations, Kernel, check_activations
from fracbit.numerics.blocks import block_length, spread
from fracbit.numerics.packed import PackedTensor, dense_scales, kept_columns, table_of
from fracbit.records.scheme import Scheme, flat_block

AVAILABLE = find_spec("triton") is not None
Form = Literal["even", "shared", "own"]
GEMV_ROWS = 16  # up to here the products are sums on the vector units


@dataclass(frozen=True, eq=False)
class Prepared:
    """Buffers of one weight on its device. `scale` and `shift` [lines, ...] in fp32 or as stored; see the strides.

    `form` of the table: its values are evenly spaced, the same for all rows, or a row's own.
    """

    codes: Tensor
    scale: Tensor
    shift: Tensor | None
    table: Tensor
    form: Form
    shape: tuple[int, int]
    bits: int
    along_out: bool
    block: int
    kept: Tensor | None
    columns: Tensor | None
    outliers: Tensor | None


def prepare(packed: PackedTensor, activations: Activations) -> Prepared:
    """Bring scales and shifts to one form: a number per block, in the stored order.

    Zero codes and quantized scales are decoded here, to fp32. Flat blocks that cross rows have no fixed place in a row: they
    get a scale for every weight, which costs the memory that packing saved; use flat blocks that divide the input instead.
    `activations="int8"` is accepted and computed in float, which
    is more exact: on a GPU the bytes of the weight are what costs.
    """
    check_activations(activations)
    kept = (packed.shape[0], packed.kept)
    scale, shift = dense_scales(packed)
    if isinstance(packed.scales, Tensor):
        scale = packed.scales
    flat = flat_block(packed.scheme.block)
    block = block_length(kept, packed.scheme)
    if packed.scheme.block == "tensor" or (flat and packed.kept % block):
        block = packed.kept if packed.scheme.block == "tensor" else 1
        scale = _per_row(scale, packed)
        shift = None if shift is None else _per_row(shift, packed)
    table = table_of(packed).values
    levels = 2**packed.scheme.bits
    return Prepared(
        packed.codes, scale.contiguous(), shift, torch.nn.functional.pad(table, (0, levels - table.shape[1]), mode="replicate"),
        _form(table), packed.shape, packed.scheme.bits,
        packed.scheme.axis == "out" and not flat and packed.scheme.block != "tensor", block,
        None if packed.columns is None else kept_columns(packed.columns, packed.shape[1]), packed.columns, packed.outliers,
    )  # fmt: skip


def _form(table: Tensor) -> Form:
    if table.shape[0] > 1:
        return "own"
    steps = table.diff()
    return "even" if bool(((steps - steps[:, :1]).abs() < 1e-6 * steps[:, :1]).all()) else "shared"


def _per_row(values: Tensor, packed: PackedTensor) -> Tensor:
    """One value for all weights of a row, or one for each: what a tensor block and flat blocks across rows come to."""
    spread_out = spread(values, (packed.shape[0], packed.kept), packed.scheme)
    return spread_out.expand(packed.shape[0], -1).contiguous()


def run(prepared: Prepared, x: Tensor) -> Tensor:
    """`x` [n, in] -> [n, out] in the type of `x`; sums in fp32."""
    from fracbit.kernels import triton_linear

    y = x.new_empty((x.shape[0], prepared.shape[0]), dtype=torch.float32)
    kept = x if prepared.kept is None else x[:, prepared.kept]
    triton_linear.launch(prepared, kept.contiguous(), y, dot=x.shape[0] > GEMV_ROWS)
    if prepared.columns is not None and prepared.outliers is not None:
        y += x[:, prepared.columns.long()].float() @ prepared.outliers.float().T
    return y.to(x.dtype)


def _supports(scheme: Scheme, device: torch.device, shape: tuple[int, int]) -> bool:
    return AVAILABLE and device.type == "cuda"


def _explain() -> str:
    if not AVAILABLE:
        return "Triton is not installed; it comes with torch's CUDA builds on Linux"
    if not torch.cuda.is_available():
        return "Triton is there, a CUDA device is not"
    return f"Triton on {torch.cuda.get_device_name()}"


def _run(prepared: Any, x: Tensor) -> Tensor:
    return run(prepared, x)


GPU = Kernel(name="triton", supports=_supports, prepare=prepare, run=_run, explain=_explain)
