"""From a weight to a `PackedTensor`: place a grid (scales, offsets, table) on every block, then round to it.

`fit` places the grid: absolute maximum, min-max or mean and maximum, as the offset asks; `search=True` then shrinks every
block's range to the one with the least weighted squared error (without importance: the least fourth power) and refits the
scale to the codes by least squares; the result is never worse than the plain range. `encode` rounds. Both know data types only
as tables.

Values per block (`scale`, `shift`, zero codes) have the shape of `scales_shape`, written [per block] here: [out, blocks],
[blocks, in] for axis "out", [1, 1] for "tensor" or [blocks] for "flat:N".
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
    line_order,
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
    zeros_of,
    zeros_shape,
)
from fracbit.records.scheme import Scheme

SHRINK = [1 - 0.025 * i for i in range(1, 25)]  # ranges from 0.975 down to 0.4 of the full one
REFITS = 2


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


def quantize_tensor(
    weight: Tensor,
    scheme: Scheme,
    importance: Tensor | None = None,
    search: bool = False,
    columns: Tensor | None = None,
) -> PackedTensor:
    """Round-to-nearest: fit a grid to `weight` [out, in] and round to it.

    `importance` [in] or [out, in] weights the squared error (without it, a `search` lowers fourth powers); `columns` int [p]
    are input columns kept in 16 bits.
    Raises `WeightError` on NaN or Inf or when a scale does not fit its type, `SchemeError` on a scheme that cannot be.
    """
    if columns is not None and len(columns):
        return _beside_outliers(weight, scheme, importance, search, columns=columns)
    return encode(weight, fit(weight, scheme, importance, search))


def fit(weight: Tensor, scheme: Scheme, importance: Tensor | None = None, search: bool = False) -> Grid:
    """Place a grid on every block of `weight` [out, in]; arguments and errors as `quantize_tensor`."""
    # The plain range of every block.
    check_datatype(scheme)
    weight = _finite(weight)  # [out, in]
    table = None if is_fitted(scheme) else fixed_type(scheme).to(weight.device)
    scale, middle = _plain_range(weight, scheme)  # [per block] each
    grid = _grid(scheme, weight, table, scale, middle=middle, importance=importance)
    if not search:
        return grid
    # The range of least error; a fitted table follows the ranges, and the ranges follow it once more.
    for _ in range(2 if table is None else 1):
        found = _search(weight, grid, scale, middle, importance=importance)
        if table is None:
            found = _refit_table(weight, found, importance)
        if _objective(weight, found, importance) >= _objective(weight, grid, importance):
            break
        grid = found
    return grid


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


def moved(grid: Grid, scale: Tensor, shift: Tensor | None = None, zeros: Tensor | None = None) -> Grid:
    """The grid with another `scale`, `shift` and `zeros` [per block], rounded to what is stored.

    For offset `zero` the shift follows from the zero codes and is not read; None leaves shift or zeros as they are.
    """
    scheme = grid.scheme
    scales = _store(scale, scheme, positive=True)
    scale = _dense(scales, scale)
    if scheme.offset == "zero":
        zeros = grid.zeros if zeros is None else zeros
        assert zeros is not None
        shift = -scale * grid.table.look_up(zeros).view(scale.shape)  # [per block]
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
    return PackedTensor(
        grid.scheme, grid.shape, torch.cat(rows), grid.scales, offsets=offsets, table=grid.stored_table
    )


def codes_of(weight: Tensor, grid: Grid, first: int = 0, last: int | None = None) -> Tensor:
    """Codes uint8 of rows `first` to `last` of `weight` [out, in]: each the grid's value for that weight."""
    part = weight[first:last].float()  # [rows, in]
    inverse = spread(_inverse(grid.scale), grid.shape, grid.scheme, first=first, last=last)
    if grid.shift is not None:
        part = part - spread(grid.shift, grid.shape, grid.scheme, first=first, last=last)  # [rows, in]
    return grid.table.rows(first, first + len(part)).nearest(part * inverse)


def values_of(codes: Tensor, grid: Grid, first: int = 0, last: int | None = None) -> Tensor:
    """Weights fp32 that `codes` [rows, in] of rows `first` to `last` stand for."""
    part = grid.table.rows(first, first + len(codes)).look_up(codes)  # [rows, in]
    part = part * spread(grid.scale, grid.shape, grid.scheme, first=first, last=last)  # [rows, in]
    if grid.shift is None:
        return part
    return part + spread(grid.shift, grid.shape, grid.scheme, first=first, last=last)  # [rows, in]


def power_of(importance: Tensor | None) -> int:
    """The power of errors that a search minimises: squares where the inputs' importance is known, else fourth powers.

    Squares alone clip the largest weights of a block, which large inputs tend to meet (docs/LOG.md).
    """
    return 4 if importance is None else 2


def grid_error(weight: Tensor, grid: Grid, importance: Tensor | None = None, power: int = 2) -> float:
    """Sum of rounding errors of `weight` on the grid, to an even `power`, weighted by `importance`."""
    total = 0.0
    for first, last in row_chunks(grid.shape, _in_axis(grid)):
        codes = codes_of(weight, grid, first, last)  # [rows, in]
        error = values_of(codes, grid, first, last) - weight[first:last]  # [rows, in]
        total += float(_weighted(error.double().pow_(power), importance, first, last).sum())
    return total


def _beside_outliers(
    weight: Tensor, scheme: Scheme, importance: Tensor | None, search: bool, *, columns: Tensor
) -> PackedTensor:
    """Quantize all columns but `columns`, which are kept in 16 bits."""
    columns = columns.to(torch.int32).sort().values  # [p]
    quantized = quantized_columns(columns, weight.shape[1])  # [quantized]
    if not len(quantized):
        raise SchemeError(
            f"all {weight.shape[1]} input columns are kept in 16 bits: leave the layer float instead"
        )
    importance = None if importance is None else importance[..., quantized]  # [quantized] or [out, quantized]
    packed = quantize_tensor(weight[:, quantized], scheme, importance, search)
    outliers = in_16_bits(_finite(weight[:, columns.long()]))  # [out, p]
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
    """Half-range and middle [per block], before any rounding."""
    shape = (weight.shape[0], weight.shape[1])
    blocks = to_blocks(lines_of(weight, scheme), block_length(shape, scheme))  # [lines, blocks, block]
    low, high = blocks.amin(-1), blocks.amax(-1)  # [lines, blocks]
    if scheme.offset == "none":
        return stored_order(torch.maximum(-low, high), shape, scheme), None
    if scheme.offset == "mean":
        counts = block_sums(torch.ones_like(weight), scheme)  # [per block]
        mean = block_sums(weight, scheme) / counts  # [per block]
        low, high = stored_order(low, shape, scheme), stored_order(high, shape, scheme)  # [per block]
        return torch.maximum(mean - low, high - mean), mean
    if scheme.offset == "zero":
        low, high = low.clamp(max=0), high.clamp(min=0)  # [lines, blocks]
    return stored_order((high - low) / 2, shape, scheme), stored_order((high + low) / 2, shape, scheme)


def _grid(
    scheme: Scheme,
    weight: Tensor,
    table: DataType | None,
    scale: Tensor,
    *,
    middle: Tensor | None,
    importance: Tensor | None,
    zeros: Tensor | None = None,
) -> Grid:
    """Round range and middle [per block] to what is stored; fit the table on top when the type has none of its own."""
    shape = (weight.shape[0], weight.shape[1])
    scales = _store(scale, scheme, positive=True)
    scale = _dense(scales, scale)
    offsets: Tensor | PackedTensor | None = None
    shift = None
    if scheme.offset == "zero":
        assert table is not None
        assert middle is not None
        if zeros is None:
            zeros = table.nearest((-middle * _inverse(scale)).view(1, -1)).view(scale.shape)
        shift = -scale * table.look_up(zeros)  # [per block]
    elif middle is not None:
        offsets = _store(middle, scheme, positive=False)
        shift = _dense(offsets, middle)
    placeholder = nearest_type(torch.zeros(1, 2, device=weight.device)) if table is None else table
    grid = Grid(
        scheme, shape, placeholder, scale=scale, shift=shift, scales=scales, offsets=offsets, zeros=zeros
    )
    return grid if table is not None else _fit_table(weight, grid, importance)


def _objective(weight: Tensor, grid: Grid, importance: Tensor | None) -> float:
    """What a search minimises."""
    return grid_error(weight, grid, importance, power_of(importance))


def _fit_table(weight: Tensor, grid: Grid, importance: Tensor | None) -> Grid:
    scale = spread(grid.scale, grid.shape, grid.scheme)  # [out, in] or broadcastable
    centered = weight if grid.shift is None else weight - spread(grid.shift, grid.shape, grid.scheme)
    normalized = centered * _inverse(scale)  # [out, in]
    weights = torch.ones(1, 1, device=weight.device) if importance is None else importance.expand_as(weight)
    table = fit_table(grid.scheme, normalized, weights, scale.expand_as(weight))  # [1 or out, levels]
    return replace(grid, table=nearest_type(table.float()), stored_table=table)


def _refit_table(weight: Tensor, grid: Grid, importance: Tensor | None) -> Grid:
    fitted = _fit_table(weight, grid, importance)
    return fitted if _objective(weight, fitted, importance) < _objective(weight, grid, importance) else grid


def _search(
    weight: Tensor, grid: Grid, scale: Tensor, middle: Tensor | None, *, importance: Tensor | None
) -> Grid:
    """The range of least error for every block, from the plain `scale` and `middle` [per block]."""
    parts = [
        _search_rows(weight[a:b], grid, (a, b), scale, middle=middle, importance=importance)
        for a, b in row_chunks(grid.shape, grid.scheme)
    ]
    best_scale = torch.cat([part[0] for part in parts])  # [per block]
    best_middle = None if middle is None else torch.cat([part[1] for part in parts if part[1] is not None])
    zeros = None if grid.zeros is None else torch.cat([part[2] for part in parts if part[2] is not None])
    table = grid.table if grid.stored_table is None else None
    found = _grid(
        grid.scheme, weight, table, best_scale, middle=best_middle, importance=importance, zeros=zeros
    )
    return found if table is not None else replace(found, table=grid.table, stored_table=grid.stored_table)


def _search_rows(
    weight: Tensor,
    grid: Grid,
    span: tuple[int, int],
    scale: Tensor,
    *,
    middle: Tensor | None,
    importance: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Best (scale, middle, zero codes) of the blocks in rows `span`, which no block crosses; `weight` holds these rows."""
    start = _rows_of(grid, *span)
    rows = _stored_rows(grid, *span)
    scale, middle = scale[rows], None if middle is None else middle[rows]  # [per block]
    if importance is not None and importance.dim() == 2:
        importance = importance[slice(*span)]  # [rows, in]
    best = _Best(weight, importance, start)
    # Shrunken ranges, with zero codes beside the nearest one.
    for factor in SHRINK:
        for nudge in (0,) if start.zeros is None else (-1, 0, 1):
            best.offer(_candidate(start, scale * factor, middle, factor=factor, nudge=nudge))
    # Least squares on the codes of the best.
    for _ in range(REFITS):
        best.offer(_least_squares(weight, best.grid, importance))
    found = best.grid
    return found.scale, found.shift if middle is not None else None, found.zeros


def _rows_of(grid: Grid, first: int, last: int) -> Grid:
    """The grid of rows `first` to `last` for the search: scales that are themselves quantized are searched in fp32."""
    rows = _stored_rows(grid, first, last)
    return Grid(
        grid.scheme if isinstance(grid.scheme.scale, str) else replace(grid.scheme, scale="fp32"),
        shape=(last - first, grid.shape[1]),
        table=grid.table.rows(first, last),
        scale=grid.scale[rows],
        shift=None if grid.shift is None else grid.shift[rows],
        scales=grid.scale[rows],
        offsets=None,
        zeros=None if grid.zeros is None else grid.zeros[rows],
    )


class _Best:
    """The best grid of every block among those offered; the only state of the search."""

    def __init__(self, weight: Tensor, importance: Tensor | None, grid: Grid) -> None:
        self.weight, self.importance, self.grid = weight, importance, grid
        self.power = power_of(importance)
        self.unit = float(grid.scale.mean()) or 1.0  # of errors: fourth powers of small ones would be 0
        self.even = EvenErrors(weight, importance, grid) if grid.table.step is not None else None
        self.error = self._block_error(grid)

    def offer(self, grid: Grid) -> None:
        """Take over the blocks in which `grid` has the smaller error."""
        error = self._block_error(grid)
        better = error < self.error  # [per block]
        self.error = torch.where(better, error, self.error)
        old = self.grid
        self.grid = replace(
            old,
            scale=torch.where(better, grid.scale, old.scale),
            shift=_chosen(better, grid.shift, old.shift),
            zeros=_chosen(better, grid.zeros, old.zeros),
        )

    def _block_error(self, grid: Grid) -> Tensor:
        if self.even is not None:
            return self.even(grid)
        error = (values_of(codes_of(self.weight, grid), grid) - self.weight).div_(self.unit).pow_(self.power)
        return block_sums(_weighted(error, self.importance, 0, None), grid.scheme)


class EvenErrors:
    """Errors of grids with evenly spaced values, in units of their steps: no code is stored and no value looked up."""

    def __init__(self, weight: Tensor, importance: Tensor | None, like: Grid) -> None:
        scheme, self.power = like.scheme, power_of(importance)
        block = block_length(like.shape, scheme)
        self.shape, self.scheme = like.shape, scheme
        self.unit = float(like.scale.mean()) or 1.0
        self.blocks = to_blocks(lines_of(weight, scheme), block).contiguous()  # [lines, blocks, block]
        counted = torch.ones_like(weight) if importance is None else importance.expand_as(weight)  # [out, in]
        lines = lines_of(counted, scheme)  # [lines, length]
        padded = torch.nn.functional.pad(lines, (0, -lines.shape[1] % block))  # [lines, blocks * block]
        # As factors of the error, before it is raised to the power.
        self.roots = (
            padded.reshape(len(lines), -1, block).clamp(min=0).pow(1 / self.power)
        )  # [lines, blocks, block]
        self.room = torch.empty_like(self.blocks)  # [lines, blocks, block]

    def __call__(self, grid: Grid) -> Tensor:
        """Weighted sum of the errors' powers of every block [per block], in units of the mean scale."""
        assert grid.table.step is not None
        step = line_order(grid.scale, self.scheme)[..., None] * grid.table.step  # [lines, blocks, 1]
        inverse = torch.where(step > 0, 1 / step, 0.0)
        base = torch.full_like(step, 1 / grid.table.step)  # [lines, blocks, 1]: the code of the value 0
        if grid.shift is not None:
            base -= line_order(grid.shift, self.scheme)[..., None] * inverse  # [lines, blocks, 1]
        place = torch.mul(self.blocks, inverse, out=self.room).add_(base)  # [lines, blocks, block], in codes
        wrong = place.round().clamp_(0, grid.table.levels - 1).sub_(place).mul_(self.roots)
        wrong = wrong.square_() if self.power == 4 else wrong
        error = torch.linalg.vector_norm(wrong, dim=-1).square_()  # [lines, blocks]
        error *= (step[..., 0] / self.unit) ** self.power
        # Blocks of zeros, or of weights that are all the offset, have a scale of 0 and no other.
        error.masked_fill_(step[..., 0] == 0, torch.inf)
        return stored_order(error, self.shape, self.scheme)


def _chosen(better: Tensor, new: Tensor | None, old: Tensor | None) -> Tensor | None:
    return None if new is None or old is None else torch.where(better, new, old)


def _candidate(grid: Grid, scale: Tensor, middle: Tensor | None, *, factor: float, nudge: int) -> Grid:
    """The grid with ranges shrunken by `factor`, and zero codes moved by `nudge`."""
    scale = _round_scale(scale, grid.scheme)  # [per block]
    if grid.zeros is None:
        return replace(grid, scale=scale)
    assert middle is not None
    nearest = grid.table.nearest((-middle * factor * _inverse(scale)).view(1, -1)).view(scale.shape)
    zeros = (nearest.int() + nudge).clamp(0, grid.table.levels - 1).to(torch.uint8)  # [per block]
    return replace(grid, scale=scale, zeros=zeros, shift=-scale * grid.table.look_up(zeros))


def _least_squares(weight: Tensor, grid: Grid, importance: Tensor | None) -> Grid:
    """Scale (and float offset) that fit the present codes best, block by block, in closed form."""
    # The values that the codes stand for, in units of the scale.
    values = grid.table.look_up(codes_of(weight, grid))  # [rows, in]
    if grid.zeros is not None:
        zeros = grid.table.look_up(grid.zeros).view(grid.zeros.shape)  # [per block]
        values = values - spread(zeros, grid.shape, grid.scheme)  # [rows, in]

    def total(x: Tensor) -> Tensor:  # [rows, in] to [per block]
        return block_sums(_weighted(x, importance, 0, None), grid.scheme)

    # Without a free offset: scale = <w, v> / <v, v>.
    cross, square = total(weight * values), total(values.square())  # [per block]
    if grid.shift is None or grid.zeros is not None:
        scale = _round_scale(torch.where(square > 0, cross / square, grid.scale), grid.scheme)
        shift = None if grid.zeros is None else -scale * grid.table.look_up(grid.zeros)
        return replace(grid, scale=scale, shift=shift)
    # With one: a line through (v, w), unless all codes of a block are equal.
    mass, first, mean = total(torch.ones_like(weight)), total(values), total(weight)  # [per block]
    variance = square * mass - first.square()  # [per block]
    usable = variance > 1e-6 * square * mass  # [per block]
    scale = torch.where(usable, (cross * mass - first * mean) / variance, grid.scale)
    scale = _round_scale(scale, grid.scheme)  # [per block]
    shift = torch.where(usable, (mean - scale * first) / mass.clamp(min=1e-30), grid.shift)  # [per block]
    return replace(grid, scale=scale, shift=_round_offset(shift, grid.scheme))


def _stored_rows(grid: Grid, first: int, last: int) -> slice:
    """The rows of values [per block] that belong to weight rows `first` to `last`."""
    if grid.scale.dim() == 1 or grid.scheme.block == "tensor":
        return slice(None)
    if grid.scheme.axis == "in":
        return slice(first, last)
    block = block_length(grid.shape, grid.scheme)
    return slice(first // block, -(-last // block))


def _in_axis(grid: Grid) -> Scheme:
    """A scheme to cut rows by: rounding and packing go row by row whatever the blocks are, so chunks need no alignment."""
    return Scheme(bits=grid.scheme.bits, block="row")


def _weighted(x: Tensor, importance: Tensor | None, first: int, last: int | None) -> Tensor:
    if importance is None:
        return x
    return x * (importance if importance.dim() == 1 else importance[first:last])


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 for a block of zeros, so that its weights take the value nearest 0."""
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
    """Round to the type that is stored. A positive scale stays positive: a tiny one must not turn its block into zeros."""
    info = torch.finfo(SCALE_DTYPES[dtype])
    rounded = values.to(SCALE_DTYPES[dtype])
    if bool(torch.isinf(rounded).any()):
        largest = float(values.abs().max())
        raise WeightError(
            f"a scale of {largest:.3g} does not fit {dtype} (at most {info.max:.3g}); use scheme.scale bf16 or fp32"
        )
    if positive:
        rounded = torch.where((rounded == 0) & (values > 0), info.smallest_normal, rounded)
    return rounded


def _dense(values: Tensor | PackedTensor, like: Tensor) -> Tensor:
    """Scales or offsets as stored, in fp32 and the shape of `like`."""
    return decode(values).view(like.shape) if isinstance(values, PackedTensor) else values.float()
