"""`Grid`: the values that every block of a weight may take, and rounding to them: from a weight to a `PackedTensor`.

`place` puts a grid on given ranges (`plain_range`: absolute maximum, min-max or mean and maximum, as the offset asks; ranges.py
searches for better ones). `encode` rounds. All know data types only as tables.

Values per block (`scale`, `shift`, zero codes) have the shape of `scales_shape`, written [per block] here: [out, blocks],
[blocks, in] for axis "out", [1, 1] for "tensor" or [blocks] for "flat:N".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fracbit.errors import WeightError
from fracbit.numerics.bits import pack_bits, unpack_bits
from fracbit.numerics.datatypes import (
    DataType,
    check_datatype,
    counts_up,
    fit_table,
    fixed_type,
    is_fitted,
    nearest_type,
    scale_unit,
    signed_scales,
)
from fracbit.numerics.layout import (
    block_length,
    block_sums,
    lines_of,
    row_chunks,
    spread,
    stored_order,
    to_blocks,
)
from fracbit.numerics.packed import (
    SCALE_DTYPES,
    PackedTensor,
    decode,
    dense_scales,
    scale_values,
    table_of,
    zeros_of,
    zeros_shape,
)
from fracbit.records.scheme import Scheme


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the values of a weight `[out, in]` may lie.

    `scale` and `shift` fp32 [per block] are already rounded to what `scales` and `offsets` store; `zeros` uint8 [per block]
    are the zero codes of offset `zero`. `table` is the data type's; `stored_table` fp16 [1 or out, levels] when it was fitted.
    """

    scheme: Scheme
    shape: tuple[int, int]
    table: DataType
    scale: Tensor
    shift: Tensor | None
    scales: Tensor | PackedTensor
    offsets: Tensor | PackedTensor | None
    zeros: Tensor | None = None
    stored_table: Tensor | None = None


def plain(weight: Tensor, scheme: Scheme, importance: Tensor | None = None) -> Grid:
    """The grid on the plain ranges of `weight` [out, in]; `importance` [in] or [out, in] weighs what a fitted table follows.

    Raises `WeightError` on NaN or Inf or when a scale does not fit its type, `SchemeError` on a scheme that cannot be.
    """
    check_datatype(scheme)
    return _plain(finite(weight), scheme, importance)


def _plain(weight: Tensor, scheme: Scheme, importance: Tensor | None = None, *, unit: float = 1.0) -> Grid:
    """`plain` of a weight, or of the scales of one whose table has this `unit`: their own scales are multiples of both."""
    table = None if is_fitted(scheme) else fixed_type(scheme).to(weight.device)
    scale, shift = plain_range(weight, scheme)  # [per block] each
    return place(scheme, weight, table, scale, shift=shift, importance=importance, unit=unit)


def grid_of(packed: PackedTensor) -> Grid:
    """The grid that a packed tensor's quantized columns lie on, to move it or to choose other codes."""
    scale, shift = dense_scales(packed)  # [per block]
    return Grid(
        packed.scheme,
        shape=(packed.shape[0], packed.quantized_width),
        table=table_of(packed),
        scale=scale,
        shift=shift,
        scales=packed.scales,
        offsets=packed.offsets,
        zeros=zeros_of(packed, tuple(scale.shape)) if packed.scheme.offset == "zero" else None,
        stored_table=packed.table,
    )


def codes_in(packed: PackedTensor) -> Tensor:
    """The codes uint8 [out, quantized] of a packed tensor."""
    return unpack_bits(packed.codes, packed.scheme.bits, packed.quantized_width)


def moved(
    grid: Grid, scale: Tensor, shift: Tensor | None = None, zeros: Tensor | None = None, *, near: bool = False
) -> Grid:
    """The grid with another `scale`, `shift` and `zeros` [per block], rounded to what is stored.

    For offset `zero` the shift follows from the zero codes and is not read; None leaves shift or zeros as they are. `near`:
    scales that are quantized stay on the grid that they have, so that none changes with the others.
    """
    scheme = grid.scheme
    scales = _store(scale, scheme, unit=scale_unit(scheme), like=grid.scales if near else None)
    scale = _dense(scales, scale)
    if scheme.offset == "zero":
        zeros = grid.zeros if zeros is None else zeros
        assert zeros is not None
        shift = -scale * grid.table.look_up(zeros).view(scale.shape)  # [per block]
        return replace(grid, scale=scale, scales=scales, zeros=zeros, shift=shift)
    if shift is None:
        return replace(grid, scale=scale, scales=scales)
    offsets = _store(shift, scheme, like=grid.offsets if near else None)
    return replace(grid, scale=scale, scales=scales, offsets=offsets, shift=_dense(offsets, shift))


def span(stored: PackedTensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The lowest and the highest number that quantized scales or offsets can have on the grid that they lie on, in `shape`."""
    levels = _levels(stored)  # [blocks of numbers, levels]
    return _by_number(stored, levels.amin(-1), shape), _by_number(stored, levels.amax(-1), shape)


def least(stored: PackedTensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The numbers nearest to 0 from below and from above, 0 left out, in `shape`; infinite where there are none."""
    levels = _levels(stored)  # [blocks of numbers, levels]
    below = torch.where(levels < 0, levels, -math.inf).amax(-1)  # [blocks of numbers]
    above = torch.where(levels > 0, levels, math.inf).amin(-1)
    return _by_number(stored, below, shape), _by_number(stored, above, shape)


def _levels(stored: PackedTensor) -> Tensor:
    """The numbers that every block of quantized scales or offsets can take, [..., levels]."""
    grid = grid_of(stored)
    levels = grid.scale[..., None] * grid.table.values[0]  # [blocks of numbers, levels]
    return levels if grid.shift is None else levels + grid.shift[..., None]


def _by_number(stored: PackedTensor, values: Tensor, shape: torch.Size) -> Tensor:
    """Values of blocks of numbers, for each number: `shape`."""
    return spread(values, stored.shape, stored.scheme).expand(stored.shape).reshape(shape)


def scales_by_row(grid: Grid) -> bool:
    """Whether no two rows of a weight share a scale, nor the scales of scales."""
    if grid.scheme.axis == "out" or grid.scale.ndim != 2 or grid.scale.shape[0] != grid.shape[0]:
        return False
    stored = grid.scheme.scale
    return isinstance(stored, str) or (
        isinstance(stored.block, int)
        and not is_fitted(stored)
        and stored.offset != "zero"
        and grid.scale.shape[1] % stored.block == 0
    )


def with_rows(grid: Grid, other: Grid, take: Tensor) -> Grid:
    """The grid with the scales and shifts of another in the rows `take` bool [out]; both store them row by row."""
    scale = torch.where(take[:, None], other.scale, grid.scale)  # [out, blocks]
    scales = _rows_of(grid.scales, other.scales, take)
    if grid.shift is None or other.shift is None:
        return replace(grid, scale=scale, scales=scales)
    if grid.zeros is not None:
        shift = -scale * grid.table.look_up(grid.zeros).view(scale.shape)  # [out, blocks]
        return replace(grid, scale=scale, scales=scales, shift=shift)
    shift = torch.where(take[:, None], other.shift, grid.shift)  # [out, blocks]
    assert grid.offsets is not None
    assert other.offsets is not None
    return replace(
        grid, scale=scale, scales=scales, shift=shift, offsets=_rows_of(grid.offsets, other.offsets, take)
    )


def _rows_of(one: Tensor | PackedTensor, other: Tensor | PackedTensor, take: Tensor) -> Tensor | PackedTensor:
    """Numbers per block as they are stored, with the rows `take` bool [out] of another."""
    if isinstance(one, Tensor):
        assert isinstance(other, Tensor)
        return _with_rows(one, other, take)
    assert isinstance(other, PackedTensor)
    codes = _with_rows(codes_in(one), codes_in(other), take)  # [1, out * blocks]
    both = None if one.offsets is None or other.offsets is None else (one.offsets, other.offsets)
    return replace(
        one,
        codes=pack_bits(codes, one.scheme.bits),
        scales=_rows_of(one.scales, other.scales, take),
        offsets=None if both is None else _rows_of(*both, take),
    )


def _with_rows(one: Tensor, other: Tensor, take: Tensor) -> Tensor:
    chosen: Tensor = torch.where(
        take[:, None], other.view(len(take), -1), one.view(len(take), -1)
    )  # [out, n]
    return chosen.view(one.shape)


def with_table(grid: Grid, table: Tensor) -> Grid:
    """The grid of a fitted data type with another `table` fp16 [1 or out, levels], ascending."""
    return replace(grid, table=nearest_type(table.float()), stored_table=table)


def encode(weight: Tensor, grid: Grid) -> PackedTensor:
    """Round `weight` [out, in] to the grid and pack the codes."""
    chunks = row_chunks(grid.shape, by_rows(grid))
    return _packed(grid, [pack_bits(codes_of(weight, grid, a, b), grid.scheme.bits) for a, b in chunks])


def pack(codes: Tensor, grid: Grid) -> PackedTensor:
    """`codes` uint8 [out, in], chosen by whatever method, with their grid as a `PackedTensor`."""
    chunks = row_chunks(grid.shape, by_rows(grid))
    return _packed(grid, [pack_bits(codes[a:b], grid.scheme.bits) for a, b in chunks])


def _packed(grid: Grid, rows: list[Tensor]) -> PackedTensor:
    offsets = grid.offsets
    if grid.zeros is not None:
        offsets = pack_bits(grid.zeros.view(zeros_shape(tuple(grid.zeros.shape))), grid.scheme.bits)
    return PackedTensor(
        grid.scheme, grid.shape, torch.cat(rows), grid.scales, offsets=offsets, table=grid.stored_table
    )


def codes_of(weight: Tensor, grid: Grid, first: int = 0, last: int | None = None) -> Tensor:
    """Codes uint8 of rows `first` to `last` of `weight` [out, in]: each the grid's value for that weight."""
    part = weight[first:last].float()  # [rows, in]
    inverses = spread(inverse(grid.scale), grid.shape, grid.scheme, first=first, last=last)
    if grid.shift is not None:
        part = part - spread(grid.shift, grid.shape, grid.scheme, first=first, last=last)  # [rows, in]
    return grid.table.rows(first, first + len(part)).nearest(part * inverses)


def values_of(codes: Tensor, grid: Grid, first: int = 0, last: int | None = None) -> Tensor:
    """Weights fp32 that `codes` [rows, in] of rows `first` to `last` stand for."""
    part = grid.table.rows(first, first + len(codes)).look_up(codes)  # [rows, in]
    part = part * spread(grid.scale, grid.shape, grid.scheme, first=first, last=last)  # [rows, in]
    if grid.shift is None:
        return part
    return part + spread(grid.shift, grid.shape, grid.scheme, first=first, last=last)  # [rows, in]


def in_16_bits(values: Tensor) -> Tensor:
    """bf16 where that is exact (bf16 sources) or fp16 would overflow, fp16, which is finer, otherwise."""
    bf16 = values.bfloat16()
    if torch.equal(bf16.float(), values.float()) or bool(
        (values.abs() > torch.finfo(torch.float16).max).any()
    ):
        return bf16
    return values.half()


def finite(weight: Tensor) -> Tensor:
    """`weight` in fp32. Raises `WeightError` where a value is NaN or Inf."""
    weight = weight.float()
    low, high = torch.aminmax(weight) if weight.numel() else (weight.sum(), weight.sum())
    if not bool(torch.isfinite(low + high)):
        bad = int((~torch.isfinite(weight)).sum())
        if bad:
            raise WeightError(
                f"{bad} of {weight.numel()} weights are NaN or Inf; mend the source before quantizing it"
            )
    return weight


def plain_range(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scale and shift [per block] that put each block's range on the span of its table, before any rounding."""
    shape = (weight.shape[0], weight.shape[1])
    blocks = to_blocks(lines_of(weight, scheme), block_length(shape, scheme))  # [lines, blocks, block]
    low, high = blocks.amin(-1), blocks.amax(-1)  # [lines, blocks]
    start, end = (-1.0, 1.0) if is_fitted(scheme) else fixed_type(scheme).span
    half = (end - start) / 2
    if signed_scales(scheme):
        # The value farthest from 0 on the end farthest from 0.
        extreme = torch.where(high > -low, high, low)  # [lines, blocks]
        return stored_order(extreme / fixed_type(scheme).far, shape, scheme), None
    if scheme.offset == "none":
        return stored_order(torch.maximum(-low, high) / half, shape, scheme), None
    if scheme.offset == "mean":
        counts = block_sums(torch.ones_like(weight), scheme)  # [per block]
        mean = block_sums(weight, scheme) / counts  # [per block]
        low, high = stored_order(low, shape, scheme), stored_order(high, shape, scheme)  # [per block]
        return torch.maximum(mean - low, high - mean) / half, mean
    if scheme.offset == "zero":
        low, high = low.clamp(max=0), high.clamp(min=0)  # [lines, blocks]
    if offsets_below(scheme):
        low = low.clamp(max=0)  # [lines, blocks]
    scale = (high - low) / 2 / half  # [lines, blocks]
    shift = (high + low) / 2 - scale * (start + half)  # [lines, blocks]
    return stored_order(scale, shape, scheme), stored_order(shift, shape, scheme)


def place(
    scheme: Scheme,
    weight: Tensor,
    table: DataType | None,
    scale: Tensor,
    *,
    shift: Tensor | None,
    importance: Tensor | None,
    zeros: Tensor | None = None,
    unit: float = 1.0,
) -> Grid:
    """Round scale and shift [per block] to what is stored; fit the table on top when the type has none of its own."""
    shape = (weight.shape[0], weight.shape[1])
    scales = _store(scale, scheme, unit=scale_unit(scheme) * unit)
    scale = _dense(scales, scale)
    offsets: Tensor | PackedTensor | None = None
    if scheme.offset == "zero":
        assert table is not None
        assert shift is not None
        if zeros is None:
            zeros = table.nearest((-shift * inverse(scale)).view(1, -1)).view(scale.shape)
        shift = -scale * table.look_up(zeros)  # [per block]
    elif shift is not None:
        offsets = _store(shift, scheme)
        shift = _dense(offsets, shift)
    placeholder = nearest_type(torch.zeros(1, 2, device=weight.device)) if table is None else table
    grid = Grid(
        scheme, shape, placeholder, scale=scale, shift=shift, scales=scales, offsets=offsets, zeros=zeros
    )
    return grid if table is not None else with_own_table(weight, grid, importance)


def with_own_table(weight: Tensor, grid: Grid, importance: Tensor | None) -> Grid:
    """The grid of a fitted data type with the table that serves `weight` [out, in] best on its scales."""
    scale = spread(grid.scale, grid.shape, grid.scheme)  # [out, in] or broadcastable
    centered = weight if grid.shift is None else weight - spread(grid.shift, grid.shape, grid.scheme)
    normalized = centered * inverse(scale)  # [out, in]
    weights = torch.ones(1, 1, device=weight.device) if importance is None else importance.expand_as(weight)
    table = fit_table(grid.scheme, normalized, weights, scale.expand_as(weight))  # [1 or out, levels]
    return replace(grid, table=nearest_type(table.float()), stored_table=table)


def by_rows(grid: Grid) -> Scheme:
    """A scheme to cut rows by: rounding and packing go row by row whatever the blocks are, so chunks need no alignment."""
    return Scheme(bits=grid.scheme.bits, block="row")


def weighted(x: Tensor, importance: Tensor | None, first: int, last: int | None) -> Tensor:
    """Rows `first` to `last` of a weight's errors `x` [rows, in], times their importance."""
    if importance is None:
        return x
    return x * (importance if importance.dim() == 1 else importance[first:last])


def inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 for a block of zeros, so that its weights take the value nearest 0."""
    return torch.where(scale != 0, 1 / scale, 0.0)


def round_scale(scale: Tensor, scheme: Scheme) -> Tensor:
    """Scales as the float type of the scheme stores them."""
    assert isinstance(scheme.scale, str)
    scale = scale if signed_scales(scheme) else scale.clamp(min=0)  # [per block]
    return scale_values(_to_float(scale, scheme.scale, scale_unit(scheme), _vanishing(scheme)))


def round_offset(offset: Tensor, scheme: Scheme) -> Tensor:
    """Offsets as the float type of the scheme stores them."""
    assert isinstance(scheme.scale, str)
    return _to_float(offset, scheme.scale, None).float()


def offsets_below(scheme: Scheme) -> bool:
    """Whether offsets are at most 0: as numbers of a type without a sign they would else need one each."""
    return scheme.offset == "float" and counts_up(scheme.scale)


def _store(
    values: Tensor, scheme: Scheme, *, unit: float | None = None, like: Tensor | PackedTensor | None = None
) -> Tensor | PackedTensor:
    """Scales, rounded as multiples of `unit`, or offsets (None) as they are stored; quantized ones on the grid of `like`."""
    if isinstance(scheme.scale, str):
        return _to_float(values, scheme.scale, unit, 0.0 if unit is None else _vanishing(scheme))
    row = finite(values.reshape(1, -1))  # [1, blocks]
    settled = grid_of(like) if isinstance(like, PackedTensor) else _plain(row, scheme.scale, unit=unit or 1.0)
    return encode(row, settled)


def _vanishing(scheme: Scheme) -> float:
    """The scale, over the least that can be stored, below which zeros serve a block best: only tables without 0 have one."""
    if scheme.offset != "none" or is_fitted(scheme):
        return 0.0
    table = fixed_type(scheme)
    return table.hollow / abs(table.far)


def _to_float(values: Tensor, dtype: str, unit: float | None, vanishing: float = 0.0) -> Tensor:
    """Round to the type that is stored, so that its product with `unit`, a power of 2, is exact in the type too.

    A scale does not vanish, unless it is below `vanishing` times the least: a tiny one must not turn its block into zeros.
    An offset (`unit` None) may.
    """
    if dtype == "e8m0":
        return _to_power(values, unit or 1.0)
    info, kind = torch.finfo(SCALE_DTYPES[dtype]), SCALE_DTYPES[dtype]
    rounded = (values * (unit or 1.0)).to(kind)
    if unit is not None:
        # In fp16 the least of all; in wider types numbers below the normal ones may be flushed to 0.
        smallest = info.smallest_normal * (info.eps if dtype == "fp16" else 1.0)
        least = torch.full_like(rounded, smallest).copysign(values.to(kind))
        kept = (rounded == 0) & (values != 0) & (values.abs() >= vanishing * smallest / unit)
        rounded = torch.where(kept, least, rounded)
        rounded = rounded / unit
    if bool(torch.isinf(rounded).any()):
        largest = float(values.abs().max())
        raise WeightError(
            f"a scale of {largest:.3g} does not fit {dtype} (at most {info.max:.3g}); use scheme.scale bf16 or fp32"
        )
    return rounded


def _to_power(values: Tensor, unit: float) -> Tensor:
    """The exponents uint8 of the next powers of 2, so that no range is cut. A block of zeros gets the least.

    OCP's specification takes the power below the range, which cuts up to a quarter of it; a search finds where that is better.
    """
    least, most = (
        math.ldexp(1.0, -100) / unit,
        math.ldexp(1.0, 127),
    )  # below, the inverse of a step would overflow
    mantissa, exponent = torch.frexp(values.clamp(least, most))  # mantissa in [0.5, 1)
    return (exponent - (mantissa == 0.5).int() + 127).to(torch.uint8)


def _dense(values: Tensor | PackedTensor, like: Tensor) -> Tensor:
    """Scales or offsets as stored, in fp32 and the shape of `like`."""
    return decode(values).view(like.shape) if isinstance(values, PackedTensor) else scale_values(values)
