"""From a weight to the grid that serves it best: `fit` finds the ranges of its blocks, `quantize_tensor` rounds to them.

Without `search`, a block's range is that of its weights. `search` shrinks it to the one with the least weighted squared error
(without importance: the least fourth power) and refits the scale to the codes by least squares; scales and offsets that are
themselves quantized then move to the neighbouring value where that is better. The result is never worse than the plain range.

Ref: ranges by least error of single blocks, e.g. arXiv:2505.17595 (NeUQI); here around the middle of the range, which lost
nothing (docs/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from fracbit.errors import SchemeError
from fracbit.numerics.datatypes import is_fitted, signed_scales
from fracbit.numerics.grid import (
    Grid,
    by_rows,
    codes_in,
    codes_of,
    encode,
    finite,
    grid_of,
    in_16_bits,
    inverse,
    offsets_below,
    pack,
    place,
    plain,
    plain_range,
    round_offset,
    round_scale,
    values_of,
    weighted,
    with_own_table,
)
from fracbit.numerics.layout import (
    block_length,
    block_sums,
    line_order,
    lines_of,
    patch_size,
    row_chunks,
    spread,
    stored_order,
    to_blocks,
)
from fracbit.numerics.packed import PackedTensor, decode, join_rows, quantized_columns, rows_apart
from fracbit.records.scheme import Scheme

SHRINK = [1 - 0.025 * i for i in range(1, 25)]  # ranges from 0.975 down to 0.4 of the full one
REFITS = 2
PIECE = (
    1 << 24
)  # weights that are held in fp32 at a time: an embedding table may be larger than the rest of its model
BESIDE = 3  # codes of a quantized scale or offset that are tried: one less, the same, one more
Errors: TypeAlias = Callable[[Grid], Tensor]
"""What a grid costs in every block [per block]."""


def quantize_tensor(
    weight: Tensor,
    scheme: Scheme,
    importance: Tensor | None = None,
    search: bool = False,
    columns: Tensor | None = None,
) -> PackedTensor:
    """Round-to-nearest: fit a grid to `weight` [out, in] and round to it, in pieces where rows share nothing.

    `importance` [in] or [out, in] weights the squared error (without it, a `search` lowers fourth powers); `columns` int [p]
    are input columns kept in 16 bits.
    Raises `WeightError` on NaN or Inf or when a scale does not fit its type, `SchemeError` on a scheme that cannot be.
    """
    if columns is not None and len(columns):
        return _beside_outliers(weight, scheme, importance, search, columns=columns)
    return join_rows(_pieces(weight, scheme, importance, search), weight.shape[0])


def _pieces(
    weight: Tensor, scheme: Scheme, importance: Tensor | None, search: bool
) -> Iterator[PackedTensor]:
    """Runs of rows that share nothing with others, each of about `PIECE` weights, quantized one by one."""
    apart = rows_apart((weight.shape[0], weight.shape[1]), scheme)
    step = apart * max(1, PIECE // max(1, apart * weight.shape[1]))  # rows
    for first in range(0, max(weight.shape[0], 1), step):
        rows = weight[first : first + step]  # [rows, in]
        own = (
            importance[first : first + step]
            if importance is not None and importance.dim() == 2
            else importance
        )
        yield encode(rows, fit(rows, scheme, own, search))


def fit(weight: Tensor, scheme: Scheme, importance: Tensor | None = None, search: bool = False) -> Grid:
    """Place a grid on every block of `weight` [out, in]; arguments and errors as `quantize_tensor`."""
    grid = plain(weight, scheme, importance)
    if not search:
        return grid
    weight = weight.float()  # [out, in]
    scale, shift = plain_range(weight, scheme)  # [per block] each
    # The range of least error; a fitted table follows the ranges, and the ranges follow it once more.
    fitted = is_fitted(scheme)
    for _ in range(2 if fitted else 1):
        found = _search(weight, grid, scale, shift, importance=importance)
        if fitted:
            found = _refit_table(weight, found, importance)
        if _objective(weight, found, importance) >= _objective(weight, grid, importance):
            break
        grid = found
    return grid if isinstance(scheme.scale, str) else _settled(weight, grid, importance)


def grid_error(weight: Tensor, grid: Grid, importance: Tensor | None = None, power: int = 2) -> float:
    """Sum of rounding errors of `weight` on the grid, to an even `power`, weighted by `importance`."""
    total = 0.0
    for first, last in row_chunks(grid.shape, by_rows(grid)):
        codes = codes_of(weight, grid, first, last)  # [rows, in]
        error = values_of(codes, grid, first, last) - weight[first:last]  # [rows, in]
        total += float(weighted(error.double().pow_(power), importance, first, last).sum())
    return total


def power_of(importance: Tensor | None) -> int:
    """The power of errors that a search minimises: squares where the inputs' importance is known, else fourth powers.

    Squares alone clip the largest weights of a block, which large inputs tend to meet (docs/LOG.md).
    """
    return 4 if importance is None else 2


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
    outliers = in_16_bits(finite(weight[:, columns.long()]))  # [out, p]
    return replace(packed, shape=(weight.shape[0], weight.shape[1]), columns=columns, outliers=outliers)


def _objective(weight: Tensor, grid: Grid, importance: Tensor | None) -> float:
    """What a search minimises."""
    return grid_error(weight, grid, importance, power_of(importance))


def _refit_table(weight: Tensor, grid: Grid, importance: Tensor | None) -> Grid:
    fitted = with_own_table(weight, grid, importance)
    return fitted if _objective(weight, fitted, importance) < _objective(weight, grid, importance) else grid


def _search(
    weight: Tensor, grid: Grid, scale: Tensor, shift: Tensor | None, *, importance: Tensor | None
) -> Grid:
    """The range of least error for every block, from the plain `scale` and `shift` [per block]."""
    parts = [
        _search_rows(weight[a:b], grid, (a, b), scale, shift=shift, importance=importance)
        for a, b in row_chunks(grid.shape, grid.scheme)
    ]
    best_scale = torch.cat([part[0] for part in parts])  # [per block]
    best_shift = None if shift is None else torch.cat([part[1] for part in parts if part[1] is not None])
    zeros = None if grid.zeros is None else torch.cat([part[2] for part in parts if part[2] is not None])
    # With the table as it is, also where it is the weight's own.
    found = place(
        grid.scheme, weight, grid.table, best_scale, shift=best_shift, importance=importance, zeros=zeros
    )
    return replace(found, stored_table=grid.stored_table)


def _search_rows(
    weight: Tensor,
    grid: Grid,
    span: tuple[int, int],
    scale: Tensor,
    *,
    shift: Tensor | None,
    importance: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Best (scale, shift, zero codes) of the blocks in rows `span`, which no block crosses; `weight` holds these rows."""
    start = _rows_of(grid, *span)
    rows = _stored_rows(grid, *span)
    scale, shift = scale[rows], None if shift is None else shift[rows]  # [per block]
    if importance is not None and importance.dim() == 2:
        importance = importance[slice(*span)]  # [rows, in]
    best = _Best(weight, importance, start, below=offsets_below(grid.scheme))
    # Shrunken ranges, with zero codes beside the nearest one.
    for factor in SHRINK:
        for nudge in (0,) if start.zeros is None else (-1, 0, 1):
            best.offer(_candidate(start, scale, shift, factor=factor, nudge=nudge))
    # Least squares on the codes of the best.
    for _ in range(REFITS):
        best.offer(_least_squares(weight, best.grid, importance))
    found = best.grid
    return found.scale, found.shift if shift is not None else None, found.zeros


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

    def __init__(self, weight: Tensor, importance: Tensor | None, grid: Grid, *, below: bool) -> None:
        """`below`: offsets are at most 0."""
        self.grid, self.errors, self.below = grid, errors_of(weight, importance, grid), below
        self.error = self.errors(grid)  # [per block]

    def offer(self, grid: Grid) -> None:
        """Take over the blocks in which `grid` has the smaller error."""
        if self.below and grid.shift is not None:
            grid = replace(grid, shift=grid.shift.clamp(max=0))
        error = self.errors(grid)
        better = error < self.error  # [per block]
        self.error = torch.where(better, error, self.error)
        old = self.grid
        self.grid = replace(
            old,
            scale=torch.where(better, grid.scale, old.scale),
            shift=_chosen(better, grid.shift, old.shift),
            zeros=_chosen(better, grid.zeros, old.zeros),
        )


def errors_of(weight: Tensor, importance: Tensor | None, like: Grid) -> Errors:
    """What grids with the table of `like` cost in every block of `weight` [out, in], in powers of the mean scale."""
    unit = float(like.scale.mean()) or 1.0  # fourth powers of small errors would be 0
    if like.table.step is not None:
        return EvenErrors(weight, importance, like, unit=unit)
    power = power_of(importance)

    def error(grid: Grid) -> Tensor:
        wrong = (values_of(codes_of(weight, grid), grid) - weight).div_(unit).pow_(power)  # [rows, in]
        return block_sums(weighted(wrong, importance, 0, None), grid.scheme)

    return error


class EvenErrors:
    """Errors of grids with evenly spaced values, in units of their steps: no code is stored and no value looked up."""

    def __init__(self, weight: Tensor, importance: Tensor | None, like: Grid, *, unit: float) -> None:
        scheme, self.power, self.unit = like.scheme, power_of(importance), unit
        block = block_length(like.shape, scheme)
        self.shape, self.scheme = like.shape, scheme
        self.blocks = to_blocks(lines_of(weight, scheme), block).contiguous()  # [lines, blocks, block]
        counted = torch.ones_like(weight) if importance is None else importance.expand_as(weight)  # [out, in]
        lines = lines_of(counted, scheme, zeros=True)  # [lines, length]
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
        inverses = inverse(step)  # [lines, blocks, 1]
        base = torch.full_like(
            step, -grid.table.low / grid.table.step
        )  # [lines, blocks, 1]: the code of the value 0
        if grid.shift is not None:
            base -= line_order(grid.shift, self.scheme)[..., None] * inverses  # [lines, blocks, 1]
        place = torch.mul(self.blocks, inverses, out=self.room).add_(base)  # [lines, blocks, block], in codes
        wrong = place.round().clamp_(0, grid.table.levels - 1).sub_(place).mul_(self.roots)
        wrong = wrong.square_() if self.power == 4 else wrong
        error = torch.linalg.vector_norm(wrong, dim=-1).square_()  # [lines, blocks]
        error *= (step[..., 0] / self.unit) ** self.power
        flat = step[..., 0] == 0  # [lines, blocks]: no steps to count in, every weight becomes the offset
        if flat.any():
            error[flat] = self._of_flat(grid, flat)
        return stored_order(error, self.shape, self.scheme)

    def _of_flat(self, grid: Grid, flat: Tensor) -> Tensor:
        """The errors [n] of the n blocks that have a scale of 0."""
        wrong = self.blocks[flat]  # [n, block]
        if grid.shift is not None:
            wrong = wrong - line_order(grid.shift, self.scheme)[flat][:, None]  # [n, block]
        return (wrong / self.unit * self.roots[flat]).pow_(self.power).sum(-1)  # [n]


def _settled(weight: Tensor, grid: Grid, importance: Tensor | None) -> Grid:
    """The grid with the best neighbours of its quantized scales and offsets, chosen together in every block.

    Each was rounded alone, to the nearest value; which one is best, the weights of the block tell.
    """
    choices = list(_neighbours(grid))
    best = torch.cat(
        [_best_choice(weight[a:b], grid, (a, b), choices, importance=importance)
         for a, b in row_chunks(grid.shape, grid.scheme)]
    )  # fmt: skip
    # As codes: those of scales and offsets lie in one row.
    best = best.view(1, -1)  # [1, blocks]
    if grid.offsets is None:
        scales = _stepped(grid.scales, best)
        scale = decode(scales).view(grid.scale.shape)  # [per block]
        return replace(grid, scale=scale, scales=scales, shift=_shift_by_zeros(grid, scale))
    scales, offsets = _stepped(grid.scales, best // BESIDE), _stepped(grid.offsets, best % BESIDE)
    scale, shift = (decode(stored).view(grid.scale.shape) for stored in (scales, offsets))  # [per block] each
    return replace(grid, scale=scale, scales=scales, shift=shift, offsets=offsets)


def _shift_by_zeros(grid: Grid, scale: Tensor) -> Tensor | None:
    """What `scale` [per block] makes of the zero codes; None where there are none."""
    return None if grid.zeros is None else -scale * grid.table.look_up(grid.zeros).view(scale.shape)


def _best_choice(
    weight: Tensor,
    grid: Grid,
    span: tuple[int, int],
    choices: Sequence[tuple[Tensor, Tensor | None]],
    *,
    importance: Tensor | None,
) -> Tensor:
    """The number int64 [per block] of the best choice for the blocks in rows `span`; `weight` holds these rows."""
    start = _rows_of(grid, *span)
    rows = _stored_rows(grid, *span)
    if importance is not None and importance.dim() == 2:
        importance = importance[slice(*span)]  # [rows, in]
    errors = errors_of(weight, importance, start)

    def error_of(number: int) -> Tensor:
        scale, shift = choices[number]
        error = errors(replace(start, scale=scale[rows], shift=None if shift is None else shift[rows]))
        return (
            error if signed_scales(grid.scheme) else error.masked_fill(scale[rows] < 0, torch.inf)
        )  # [per block]

    # What is rounded stays where no other is better.
    same = len(choices) // 2
    best, least = torch.full_like(start.scale, same, dtype=torch.long), error_of(same)  # [per block] each
    for number in range(len(choices)):
        error = error_of(number)  # [per block]
        better = error < least
        best, least = torch.where(better, number, best), torch.where(better, error, least)
    return best


def _neighbours(grid: Grid) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Scale and shift [per block] of every pair of steps, those of the scale in the outer loop."""
    steps = range(BESIDE)
    free = grid.offsets is not None
    shifts = [decode(_stepped(grid.offsets, step)).view(grid.scale.shape) for step in steps if free]
    for step in steps:
        scale = decode(_stepped(grid.scales, step)).view(grid.scale.shape)  # [per block]
        yield from ((scale, shift) for shift in (shifts if free else [_shift_by_zeros(grid, scale)]))


def _stepped(stored: Tensor | PackedTensor | None, choice: Tensor | int) -> PackedTensor:
    """Quantized scales or offsets with codes one less (0), the same (1) or one more (2): one choice for all, or [1, blocks]."""
    assert isinstance(stored, PackedTensor)
    like = grid_of(stored)
    codes = codes_in(stored).int() + (choice - 1)  # [1, blocks]
    return pack(codes.clamp_(0, like.table.levels - 1).to(torch.uint8), like)


def _chosen(better: Tensor, new: Tensor | None, old: Tensor | None) -> Tensor | None:
    return None if new is None or old is None else torch.where(better, new, old)


def _candidate(grid: Grid, scale: Tensor, shift: Tensor | None, *, factor: float, nudge: int) -> Grid:
    """The grid with ranges shrunken by `factor` around their middle, zero codes around 0 and moved by `nudge`."""
    wide, scale = scale, round_scale(scale * factor, grid.scheme)  # [per block] each
    if grid.zeros is None:
        center = sum(grid.table.span) / 2 if grid.scheme.offset == "float" else 0.0
        if shift is None or not center:
            return replace(grid, scale=scale)
        return replace(grid, scale=scale, shift=round_offset(shift + (wide - scale) * center, grid.scheme))
    assert shift is not None
    nearest = grid.table.nearest((-shift * factor * inverse(scale)).view(1, -1)).view(scale.shape)
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
        return block_sums(weighted(x, importance, 0, None), grid.scheme)

    # Without a free offset: scale = <w, v> / <v, v>.
    cross, square = total(weight * values), total(values.square())  # [per block]
    if grid.shift is None or grid.zeros is not None:
        scale = round_scale(torch.where(square > 0, cross / square, grid.scale), grid.scheme)
        shift = None if grid.zeros is None else -scale * grid.table.look_up(grid.zeros)
        return replace(grid, scale=scale, shift=shift)
    # With one: a line through (v, w), unless all codes of a block are equal.
    mass, first, mean = total(torch.ones_like(weight)), total(values), total(weight)  # [per block]
    variance = square * mass - first.square()  # [per block]
    usable = variance > 1e-6 * square * mass  # [per block]
    scale = torch.where(usable, (cross * mass - first * mean) / variance, grid.scale)
    scale = round_scale(scale, grid.scheme)  # [per block]
    shift = torch.where(usable, (mean - scale * first) / mass.clamp(min=1e-30), grid.shift)  # [per block]
    return replace(grid, scale=scale, shift=round_offset(shift, grid.scheme))


def _stored_rows(grid: Grid, first: int, last: int) -> slice:
    """The rows of values [per block] that belong to weight rows `first` to `last`."""
    if grid.scale.dim() == 1 or grid.scheme.block == "tensor":
        return slice(None)
    size = patch_size(grid.shape, grid.scheme)
    if grid.scheme.axis == "in" and size is None:
        return slice(first, last)
    block = block_length(grid.shape, grid.scheme) if size is None else size[0]
    return slice(first // block, -(-last // block))
