"""From a weight to a `PackedTensor`: place a grid (scales, offsets, table) on every block, then round to it.

`fit` places the grid: absolute maximum, min-max or mean and maximum, as the offset asks; `search=True` then shrinks every
block's range to the one with the least weighted squared error and refits the scale to the codes by least squares, so that it
is never worse than the plain range. `encode` rounds. Both know data types only as tables.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fracbit.errors import SchemeError, WeightError
from fracbit.numerics.bits import pack_bits, unpack_bits
from fracbit.numerics.datatypes import (
    DataType,
    check_datatype,
    fit_table,
    fixed_type,
    is_fitted,
    nearest_type,
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
    quantized_columns,
    table_of,
    zeros_shape,
)
from fracbit.records.scheme import Scheme

SHRINK = [1 - 0.025 * i for i in range(1, 25)]  # ranges from 0.975 down to 0.4 of the full one
REFITS = 2


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the values of a weight `[out, in]` may lie.

    `scale` and `shift` fp32 are per block, in the stored shape, and already rounded to what `scales` and `offsets` store;
    `zeros` are the zero codes uint8 of offset `zero`. `table` is the data type's, `stored_table` fp16 when it was fitted.
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


def quantize_tensor(
    weight: Tensor,
    scheme: Scheme,
    importance: Tensor | None = None,
    search: bool = False,
    columns: Tensor | None = None,
) -> PackedTensor:
    """Round-to-nearest: fit a grid to `weight` [out, in] and round to it.

    `importance` [in] or [out, in] weights the squared error; `columns` int [p] are input columns kept in 16 bits.
    Raises `WeightError` on NaN or Inf or when a scale does not fit its type, `SchemeError` on a scheme that cannot be.
    """
    if columns is not None and len(columns):
        return _quantize_kept(weight, scheme, importance, search, columns)
    return encode(weight, fit(weight, scheme, importance, search))


def fit(weight: Tensor, scheme: Scheme, importance: Tensor | None = None, search: bool = False) -> Grid:
    """Place a grid on every block of `weight` [out, in]; arguments and errors as `quantize_tensor`."""
    check_datatype(scheme)
    weight = _finite(weight)
    table = None if is_fitted(scheme) else fixed_type(scheme).to(weight.device)
    scale, middle = _plain_range(weight, scheme)
    grid = _grid(scheme, weight, table, scale, middle, importance)
    if not search:
        return grid
    for _ in range(2 if table is None else 1):
        found = _search(weight, grid, scale, middle, importance)
        if table is None:
            found = _refit_table(weight, found, importance)
        if grid_error(weight, found, importance) >= grid_error(weight, grid, importance):
            break
        grid = found
    return grid


def grid_of(packed: PackedTensor) -> Grid:
    """The grid that a packed tensor's kept columns lie on, to move it or to choose other codes."""
    shape = (packed.shape[0], packed.quantized_width)
    scale, shift = dense_scales(packed)
    zeros = None
    if packed.scheme.offset == "zero":
        assert isinstance(packed.offsets, Tensor)
        zeros = unpack_bits(packed.offsets, packed.scheme.bits, zeros_shape(tuple(scale.shape))[1]).view(
            scale.shape
        )
    return Grid(
        packed.scheme,
        shape,
        table_of(packed),
        scale,
        shift,
        packed.scales,
        packed.offsets,
        zeros,
        packed.table,
    )


def codes_in(packed: PackedTensor) -> Tensor:
    """The codes uint8 [out, kept] of a packed tensor."""
    return unpack_bits(packed.codes, packed.scheme.bits, packed.quantized_width)


def moved(grid: Grid, scale: Tensor, shift: Tensor | None = None, zeros: Tensor | None = None) -> Grid:
    """The grid with other scales, rounded to what is stored: `scale` and `shift` in the stored shape, `zeros` codes uint8.

    For offset `zero` the shift follows from the zero codes and is not read; None leaves shift or zeros as they are.
    """
    scheme = grid.scheme
    scales = _store(scale, scheme, positive=True)
    scale = _dense(scales, scale)
    if scheme.offset == "zero":
        zeros = grid.zeros if zeros is None else zeros
        assert zeros is not None
        shift = -scale * grid.table.look_up(zeros).view(scale.shape)
        return replace(grid, scale=scale, scales=scales, zeros=zeros, shift=shift)
    if shift is None:
        return replace(grid, scale=scale, scales=scales)
    offsets = _store(shift, scheme, positive=False)
    return replace(grid, scale=scale, scales=scales, offsets=offsets, shift=_dense(offsets, shift))


def with_table(grid: Grid, table: Tensor) -> Grid:
    """The grid of a fitted data type with another `table` fp16 [1 or out, levels], ascending."""
    return replace(grid, table=nearest_type(table.float()), stored_table=table)


def encode(weight: Tensor, grid: Grid) -> PackedTensor:
    """Round `weight` [out, in] to the grid and pack the codes."""
    chunks = row_chunks(grid.shape, _in_axis(grid))
    return _packed(grid, [pack_bits(codes_of(weight, grid, a, b), grid.scheme.bits) for a, b in chunks])


def pack(codes: Tensor, grid: Grid) -> PackedTensor:
    """`codes` uint8 [out, in], chosen by whatever method, with their grid as a `PackedTensor`."""
    chunks = row_chunks(grid.shape, _in_axis(grid))
    return _packed(grid, [pack_bits(codes[a:b], grid.scheme.bits) for a, b in chunks])


def _packed(grid: Grid, rows: list[Tensor]) -> PackedTensor:
    offsets = grid.offsets
    if grid.zeros is not None:
        offsets = pack_bits(grid.zeros.view(zeros_shape(tuple(grid.zeros.shape))), grid.scheme.bits)
    return PackedTensor(grid.scheme, grid.shape, torch.cat(rows), grid.scales, offsets, grid.stored_table)


def codes_of(weight: Tensor, grid: Grid, first: int = 0, last: int | None = None) -> Tensor:
    """Codes uint8 of rows `first` to `last` of `weight` [out, in]: each the grid's value for that weight."""
    part = weight[first:last].float()
    inverse = spread(_inverse(grid.scale), grid.shape, grid.scheme, first, last)
    if grid.shift is not None:
        part = part - spread(grid.shift, grid.shape, grid.scheme, first, last)
    return grid.table.rows(first, first + len(part)).nearest(part * inverse)


def values_of(codes: Tensor, grid: Grid, first: int = 0, last: int | None = None) -> Tensor:
    """Weights fp32 that `codes` (rows `first` to `last`) stand for."""
    part = grid.table.rows(first, first + len(codes)).look_up(codes)
    part = part * spread(grid.scale, grid.shape, grid.scheme, first, last)
    return part if grid.shift is None else part + spread(grid.shift, grid.shape, grid.scheme, first, last)


def grid_error(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> float:
    """Sum of squared rounding errors of `weight` on the grid, weighted by `importance`."""
    total = 0.0
    for first, last in row_chunks(grid.shape, _in_axis(grid)):
        error = values_of(codes_of(weight, grid, first, last), grid, first, last) - weight[first:last]
        total += float(_weighted(error.square(), importance, first, last).sum(dtype=torch.float64))
    return total


def _quantize_kept(
    weight: Tensor, scheme: Scheme, importance: Tensor | None, search: bool, columns: Tensor
) -> PackedTensor:
    columns = columns.to(torch.int32).sort().values
    kept = quantized_columns(columns, weight.shape[1])
    if not len(kept):
        raise SchemeError(
            f"all {weight.shape[1]} input columns are kept in 16 bits: leave the layer float instead"
        )
    importance = None if importance is None else importance[..., kept]
    packed = quantize_tensor(weight[:, kept], scheme, importance, search)
    outliers = in_16_bits(_finite(weight[:, columns.long()]))
    return replace(packed, shape=(weight.shape[0], weight.shape[1]), columns=columns, outliers=outliers)


def in_16_bits(values: Tensor) -> Tensor:
    """bf16 where that is exact (bf16 sources) or fp16 would overflow, fp16, which is finer, otherwise."""
    bf16 = values.bfloat16()
    if torch.equal(bf16.float(), values.float()) or bool(
        (values.abs() > torch.finfo(torch.float16).max).any()
    ):
        return bf16
    return values.half()


def _finite(weight: Tensor) -> Tensor:
    weight = weight.float()
    low, high = torch.aminmax(weight) if weight.numel() else (weight.sum(), weight.sum())
    if not bool(torch.isfinite(low + high)):
        bad = int((~torch.isfinite(weight)).sum())
        if bad:
            raise WeightError(
                f"{bad} of {weight.numel()} weights are NaN or Inf; mend the source before quantizing it"
            )
    return weight


def _plain_range(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Half-range and middle of every block, in the stored shape, before any rounding."""
    shape = (weight.shape[0], weight.shape[1])
    blocks = to_blocks(lines_of(weight, scheme), block_length(shape, scheme))  # [lines, blocks, block]
    low, high = blocks.amin(-1), blocks.amax(-1)
    if scheme.offset == "none":
        return stored_order(torch.maximum(-low, high), shape, scheme), None
    if scheme.offset == "mean":
        counts = block_sums(torch.ones_like(weight), scheme)
        mean = block_sums(weight, scheme) / counts
        low, high = stored_order(low, shape, scheme), stored_order(high, shape, scheme)
        return torch.maximum(mean - low, high - mean), mean
    if scheme.offset == "zero":
        low, high = low.clamp(max=0), high.clamp(min=0)
    return stored_order((high - low) / 2, shape, scheme), stored_order((high + low) / 2, shape, scheme)


def _grid(
    scheme: Scheme,
    weight: Tensor,
    table: DataType | None,
    scale: Tensor,
    middle: Tensor | None,
    importance: Tensor | None,
    zeros: Tensor | None = None,
) -> Grid:
    """Round range and middle to what is stored; fit the table on top when the type has none of its own."""
    shape = (weight.shape[0], weight.shape[1])
    scales = _store(scale, scheme, positive=True)
    scale = _dense(scales, scale)
    offsets: Tensor | PackedTensor | None = None
    shift = None
    if scheme.offset == "zero":
        assert table is not None
        assert middle is not None
        zeros = (
            table.nearest((-middle * _inverse(scale)).view(1, -1)).view(scale.shape)
            if zeros is None
            else zeros
        )
        shift = -scale * table.look_up(zeros)
    elif middle is not None:
        offsets = _store(middle, scheme, positive=False)
        shift = _dense(offsets, middle)
    placeholder = nearest_type(torch.zeros(1, 2, device=weight.device)) if table is None else table
    grid = Grid(scheme, shape, placeholder, scale, shift, scales, offsets, zeros)
    return grid if table is not None else _fit_table(weight, grid, importance)


def _fit_table(weight: Tensor, grid: Grid, importance: Tensor | None) -> Grid:
    scale = spread(grid.scale, grid.shape, grid.scheme)
    centered = weight if grid.shift is None else weight - spread(grid.shift, grid.shape, grid.scheme)
    weights = torch.ones(1, 1, device=weight.device) if importance is None else importance.expand_as(weight)
    normalized = centered * _inverse(scale)
    table = fit_table(grid.scheme, normalized, weights, scale.expand_as(weight))
    return replace(grid, table=nearest_type(table.float()), stored_table=table)


def _refit_table(weight: Tensor, grid: Grid, importance: Tensor | None) -> Grid:
    fitted = _fit_table(weight, grid, importance)
    return fitted if grid_error(weight, fitted, importance) < grid_error(weight, grid, importance) else grid


def _search(
    weight: Tensor, grid: Grid, scale: Tensor, middle: Tensor | None, importance: Tensor | None
) -> Grid:
    """The range of least error for every block: shrunken ranges first, then least squares on the codes they give."""
    parts = [
        _search_rows(weight[a:b], grid, a, b, scale, middle, importance)
        for a, b in row_chunks(grid.shape, grid.scheme)
    ]
    best_scale = torch.cat([part[0] for part in parts])
    best_middle = None if middle is None else torch.cat([part[1] for part in parts if part[1] is not None])
    zeros = None if grid.zeros is None else torch.cat([part[2] for part in parts if part[2] is not None])
    table = grid.table if grid.stored_table is None else None
    found = _grid(grid.scheme, weight, table, best_scale, best_middle, importance, zeros)
    return found if table is not None else replace(found, table=grid.table, stored_table=grid.stored_table)


def _search_rows(
    weight: Tensor,
    grid: Grid,
    first: int,
    last: int,
    scale: Tensor,
    middle: Tensor | None,
    importance: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Best (scale, middle, zero codes) of the blocks in rows `first` to `last`, which no block crosses."""
    rows = _stored_rows(grid, first, last)
    importance = importance[first:last] if importance is not None and importance.dim() == 2 else importance
    scheme = grid.scheme if isinstance(grid.scheme.scale, str) else replace(grid.scheme, scale="fp32")
    table = grid.table.rows(first, last)
    start = Grid(
        scheme,
        (last - first, grid.shape[1]),
        table,
        grid.scale[rows],
        None if grid.shift is None else grid.shift[rows],
        grid.scale[rows],
        None,
        None if grid.zeros is None else grid.zeros[rows],
    )
    best = _Best(weight, importance, start)
    for factor in SHRINK:
        for nudge in (0,) if start.zeros is None else (-1, 0, 1):
            best.offer(
                _candidate(
                    start, scale[rows] * factor, None if middle is None else middle[rows], factor, nudge
                )
            )
    for _ in range(REFITS):
        best.offer(_least_squares(weight, best.grid, importance))
    grid = best.grid
    return grid.scale, grid.shift if middle is not None else None, grid.zeros


class _Best:
    """The best grid of every block among those offered; the only state of the search."""

    def __init__(self, weight: Tensor, importance: Tensor | None, grid: Grid) -> None:
        self.weight, self.importance, self.grid = weight, importance, grid
        self.error = self._block_error(grid)

    def offer(self, grid: Grid) -> None:
        """Take over the blocks in which `grid` has the smaller error."""
        error = self._block_error(grid)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        old = self.grid
        scale = torch.where(better, grid.scale, old.scale)
        shift = (
            None if old.shift is None or grid.shift is None else torch.where(better, grid.shift, old.shift)
        )
        zeros = (
            None if old.zeros is None or grid.zeros is None else torch.where(better, grid.zeros, old.zeros)
        )
        self.grid = replace(old, scale=scale, shift=shift, zeros=zeros)

    def _block_error(self, grid: Grid) -> Tensor:
        error = (values_of(codes_of(self.weight, grid), grid) - self.weight).square()
        return block_sums(_weighted(error, self.importance, 0, None), grid.scheme)


def _candidate(grid: Grid, scale: Tensor, middle: Tensor | None, factor: float, nudge: int) -> Grid:
    scale = _round_scale(scale, grid.scheme)
    if grid.zeros is None:
        return replace(grid, scale=scale)
    assert middle is not None
    nearest = grid.table.nearest((-middle * factor * _inverse(scale)).view(1, -1)).view(scale.shape)
    zeros = (nearest.int() + nudge).clamp(0, grid.table.levels - 1).to(torch.uint8)
    return replace(grid, scale=scale, zeros=zeros, shift=-scale * grid.table.look_up(zeros))


def _least_squares(weight: Tensor, grid: Grid, importance: Tensor | None) -> Grid:
    """Scale (and float offset) that fit the present codes best, block by block, in closed form."""
    values = grid.table.look_up(codes_of(weight, grid))  # [out, in], in units of the scale
    if grid.zeros is not None:
        values = values - spread(
            grid.table.look_up(grid.zeros).view(grid.zeros.shape), grid.shape, grid.scheme
        )

    def total(x: Tensor) -> Tensor:
        return block_sums(_weighted(x, importance, 0, None), grid.scheme)

    cross, square = total(weight * values), total(values.square())
    if grid.shift is None or grid.zeros is not None:
        scale = _round_scale(torch.where(square > 0, cross / square, grid.scale), grid.scheme)
        shift = None if grid.zeros is None else -scale * grid.table.look_up(grid.zeros)
        return replace(grid, scale=scale, shift=shift)
    mass, first, mean = total(torch.ones_like(weight)), total(values), total(weight)
    spread_of_values = square * mass - first.square()
    usable = spread_of_values > 1e-6 * square * mass
    scale = torch.where(usable, (cross * mass - first * mean) / spread_of_values, grid.scale)
    scale = _round_scale(scale, grid.scheme)
    shift = torch.where(usable, (mean - scale * first) / mass.clamp(min=1e-30), grid.shift)
    return replace(grid, scale=scale, shift=_round_offset(shift, grid.scheme))


def _stored_rows(grid: Grid, first: int, last: int) -> slice:
    """The rows of the stored scales that belong to weight rows `first` to `last`."""
    if grid.scale.dim() == 1 or grid.scheme.block == "tensor":
        return slice(None)
    if grid.scheme.axis == "in":
        return slice(first, last)
    block = block_length(grid.shape, grid.scheme)
    return slice(first // block, -(-last // block))


def _in_axis(grid: Grid) -> Scheme:
    """Rounding and packing go row by row whatever the blocks are: chunks need no alignment."""
    return Scheme(bits=grid.scheme.bits, block="row")


def _weighted(x: Tensor, importance: Tensor | None, first: int, last: int | None) -> Tensor:
    if importance is None:
        return x
    return x * (importance if importance.dim() == 1 else importance[first:last])


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 for a block of zeros, whose weights then take the value nearest 0."""
    return torch.where(scale > 0, 1 / scale, 0.0)


def _round_scale(scale: Tensor, scheme: Scheme) -> Tensor:
    assert isinstance(scheme.scale, str)
    return _to_float(scale.clamp(min=0), scheme.scale, positive=True).float()


def _round_offset(offset: Tensor, scheme: Scheme) -> Tensor:
    assert isinstance(scheme.scale, str)
    return _to_float(offset, scheme.scale, positive=False).float()


def _store(values: Tensor, scheme: Scheme, positive: bool) -> Tensor | PackedTensor:
    if isinstance(scheme.scale, str):
        return _to_float(values, scheme.scale, positive)
    return quantize_tensor(values.reshape(1, -1), scheme.scale)


def _to_float(values: Tensor, dtype: str, positive: bool) -> Tensor:
    """Round to the stored type. A positive scale stays positive: a block must not vanish because its scale is tiny."""
    info = torch.finfo(SCALE_DTYPES[dtype])
    stored = values.to(SCALE_DTYPES[dtype])
    if bool(torch.isinf(stored).any()):
        largest = float(values.abs().max())
        raise WeightError(
            f"a scale of {largest:.3g} does not fit {dtype} (at most {info.max:.3g}); use --scale bf16 or fp32"
        )
    if positive:
        stored = torch.where((stored == 0) & (values > 0), info.smallest_normal, stored)
    return stored


def _dense(stored: Tensor | PackedTensor, like: Tensor) -> Tensor:
    return decode(stored).view(like.shape) if isinstance(stored, PackedTensor) else stored.float()
