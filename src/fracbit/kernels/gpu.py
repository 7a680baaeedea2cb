"""The packed product in Triton, for CUDA: every data type, width, block along a line, axis and offset.

One kernel family, as on the CPU: codes index the table of the data type, which lies in shared memory, or are numbers on a line.
A program computes a tile [n, rows] of y, walks over the input and reads the stored layout as it is, eight codes at a time.
For 1-16 rows of activations the sums are taken on the vector units (GEMV: the work is reading codes); for more, a tile of
weights is decoded into registers and multiplied by `tl.dot` (GEMM).

Tests run it in Triton's interpreter (TRITON_INTERPRET=1) on the CPU, compile it for an H100 and check the machine code against
the numbers in docs/serving.md; it has not been timed on a GPU. Triton is optional: torch's CUDA builds on Linux bring it along.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from fracbit.kernels.kernel import Activations, Kernel, check_activations
from fracbit.numerics.layout import block_length, patch_size, spread
from fracbit.numerics.packed import PackedTensor, dense_scales, quantized_columns, table_of
from fracbit.records.scheme import Scheme, flat_block

AVAILABLE = find_spec("triton") is not None
Form = Literal["even", "shared", "own"]
CodeLoad = Literal["unit", "words", "bytes"]
GEMV_ROWS = 16  # up to here the products are sums on the vector units
EVEN = 2e-7  # how far, of its range, a table may be from a line: the rule of the CPU kernels


@dataclass(frozen=True, eq=False)
class GpuWeight:
    """Buffers of one weight on its device.

    - `scale` and `shift`: per block, in fp32 or as stored; [out, blocks], or [blocks, length] when `along_out`.
    - `form` of the table: evenly spaced, the same for all rows, or a row's own. `table` is [2] in the first case, the value of
      code 0 and 2^bits steps; else [1 or out, 2^bits].
    - `load`: how eight codes of the `length` quantized inputs of a row are read from `codes`.
    - `quantized` int64 [length]: which inputs are quantized, None for all; `columns` [p] and `outliers` [out, p]: the others.
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
    length: int
    load: CodeLoad
    quantized: Tensor | None
    columns: Tensor | None
    outliers: Tensor | None


def prepare(packed: PackedTensor, activations: Activations) -> GpuWeight:
    """Bring scales and shifts to one form: a number per block, in the stored order.

    Zero codes and quantized scales are decoded here, to fp32. Flat blocks that cross rows have no fixed place in a row: they
    get a scale for every weight, which costs the memory that packing saved; use flat blocks that divide the input instead.
    `activations="int8"` is accepted and computed in float, which is more exact: on a GPU the time goes into reading weights.
    """
    check_activations(activations)
    # One scale per block along a line of the weight.
    inner = (packed.shape[0], packed.quantized_width)
    scale, shift = dense_scales(packed)
    if isinstance(packed.scales, Tensor) and packed.scales.is_floating_point():
        scale = packed.scales
    flat = flat_block(packed.scheme.block)
    block = block_length(inner, packed.scheme)
    if (patch := patch_size(inner, packed.scheme)) is not None:
        block = patch[1]
        rows = torch.arange(packed.shape[0], device=scale.device) // patch[0]  # [out]
        scale, shift = scale[rows], None if shift is None else shift[rows]
    if packed.scheme.block == "tensor" or (flat and packed.quantized_width % block):
        block = packed.quantized_width if packed.scheme.block == "tensor" else 1
        scale = _per_row(scale, packed)
        shift = None if shift is None else _per_row(shift, packed)
    # How the program reads the table and the codes.
    form, table = _form(table_of(packed).values, packed.scheme.bits)
    load, codes = _load(packed.codes, packed.scheme.bits)
    return GpuWeight(
        codes=codes,
        scale=scale.contiguous(),
        shift=shift,
        table=table,
        form=form,
        shape=packed.shape,
        bits=packed.scheme.bits,
        along_out=packed.scheme.axis == "out" and not flat and packed.scheme.block != "tensor",
        block=block,
        length=packed.quantized_width,
        load=load,
        quantized=None if packed.columns is None else quantized_columns(packed.columns, packed.shape[1]),
        columns=packed.columns,
        outliers=packed.outliers,
    )


def _form(table: Tensor, bits: int) -> tuple[Form, Tensor]:
    """The form of a table [1 or out, levels], and what the kernel reads of it."""
    rows, levels = table.shape
    first, last = table[0, 0].double(), table[0, -1].double()
    steps = torch.linspace(0, 1, levels, dtype=torch.float64, device=table.device)  # [levels]
    line = torch.lerp(first, last, steps)  # [levels]
    if rows == 1 and last > first and bool(((line - table).abs() <= EVEN * (last - first)).all()):
        return "even", torch.stack((first, (last - first) / (levels - 1) * 2**bits)).float()
    padded = torch.nn.functional.pad(table, (0, 2**bits - levels), mode="replicate")  # [rows, 2^bits]
    return ("shared" if rows == 1 else "own"), padded


def _load(codes: Tensor, bits: int) -> tuple[CodeLoad, Tensor]:
    """How eight codes are loaded, and `codes` viewed as the type that is loaded: an integer of their size, two words, or bytes.

    For the first two, rows and the buffer must begin where such integers may.
    """
    size = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(bits, torch.int32)
    aligned = codes.shape[1] % size.itemsize == 0 and codes.data_ptr() % size.itemsize == 0
    if bits in (1, 7) or not aligned:
        return "bytes", codes
    return ("unit" if size.itemsize == bits else "words"), codes.view(size)


def _per_row(values: Tensor, packed: PackedTensor) -> Tensor:
    """One value for all weights of a row (block `tensor`), or one for each weight (flat blocks across rows)."""
    spread_out = spread(values, (packed.shape[0], packed.quantized_width), packed.scheme)
    return spread_out.expand(packed.shape[0], -1).contiguous()  # [out, 1 or length]


def run(prepared: GpuWeight, x: Tensor) -> Tensor:
    """`x` [n, in] -> [n, out] in the type of `x`; sums in fp32."""
    from fracbit.kernels import triton_linear

    inner = x if prepared.quantized is None else x[:, prepared.quantized]  # [n, length]
    if short := -inner.shape[1] % triton_linear.ALIGNED:
        inner = torch.nn.functional.pad(inner, (0, short))  # [n, padded]
    others = prepared.columns is not None and prepared.outliers is not None
    y = x.new_empty((x.shape[0], prepared.shape[0]), dtype=torch.float32 if others else x.dtype)
    triton_linear.launch(prepared, inner.contiguous(), y, dot=x.shape[0] > GEMV_ROWS)
    if prepared.columns is not None and prepared.outliers is not None:
        y += x[:, prepared.columns.long()].float() @ prepared.outliers.float().T  # [n, out]
    return y.to(x.dtype)


def _supports(scheme: Scheme, device: torch.device, shape: tuple[int, int]) -> bool:
    return AVAILABLE and device.type == "cuda"


def _explain() -> str:
    if not AVAILABLE:
        return "Triton is not installed; it comes with torch's CUDA builds on Linux"
    if not torch.cuda.is_available():
        return "Triton is installed, but there is no CUDA device"
    return f"Triton on {torch.cuda.get_device_name()}"


def _run(prepared: Any, x: Tensor) -> Tensor:
    return run(prepared, x)


GPU = Kernel(name="triton", supports=_supports, prepare=prepare, run=_run, explain=_explain)
