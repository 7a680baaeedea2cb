"""After the codes are chosen: the scales, offsets and tables that serve them best, in closed form against the gram matrix.

With the codes fixed, the decoded weight is linear in its scales (and float offsets), and linear in its table: the least
tr((W - Q) H (W - Q)^T) is a small linear system per row (blocks along the input, tables per row), per band of rows (blocks
along the output) or for the tensor. Every answer is rounded to what is stored and taken only where it lowers the cost.

Ref: least squares for scales given codes, e.g. arXiv:2401.06118 (AQLM, Sec. 3.3) for codebooks; here in 1-D, exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fracbit.numerics.grid import Grid, moved, scales_by_row, values_of, with_rows, with_table
from fracbit.numerics.layout import block_length, patch_size, spread
from fracbit.numerics.linalg import gram_errors
from fracbit.records.scheme import flat_block

PRIOR = 1e-4  # of the diagonal, pulls towards the present values: keeps nearly empty blocks where they are


def refit_scales(weight: Tensor, gram: Tensor, grid: Grid, codes: Tensor) -> Grid:
    """The grid with the scales (and float offsets) of least cost for `codes` [out, in] of `weight` [out, in]."""
    scheme = grid.scheme
    # What is multiplied by the scales: table values, less the zero point where that is a code.
    units = grid.table.look_up(codes)  # [out, in]
    if grid.zeros is not None:
        zeros = grid.table.look_up(grid.zeros).view(grid.zeros.shape)  # as the scales
        units = units - spread(zeros, grid.shape, scheme)
    with_shift = grid.shift is not None and grid.zeros is None
    # The systems that couple as few scales as the blocks allow.
    if scheme.block == "tensor":
        solve = _one_block
    elif flat_block(scheme.block) and grid.shape[1] % block_length(grid.shape, scheme):
        return grid  # blocks that cross rows couple all rows: no small system
    elif scheme.axis == "in" or flat_block(scheme.block):
        solve = _row_systems
    else:
        solve = _band_systems
    scale, shift = solve(weight, gram, units, grid, with_shift=with_shift)
    # Rounded to what is stored, and kept where that is better.
    scale = scale.reshape(grid.scale.shape)  # [per block]
    same = scale * grid.scale > 0  # [per block]: a scale keeps its sign, and does not vanish
    scale = torch.where(same, scale, grid.scale)
    shift = None if shift is None else shift.reshape(grid.scale.shape)
    # Quantized ones on the grid that they have, whose range was settled, and on a new one.
    for near in (True, False) if not isinstance(scheme.scale, str) else (False,):
        grid = _better(weight, gram, codes, grid, candidate=moved(grid, scale, shift, near=near))
    return grid


def refit_table(weight: Tensor, gram: Tensor, grid: Grid, codes: Tensor) -> tuple[Grid, Tensor]:
    """The grid with the fitted table of least cost for `codes`, and the codes renumbered where values changed places."""
    if grid.stored_table is None:
        return grid, codes
    # One system of [levels] unknowns a row: the weights of one level move together, by their scales.
    scale = spread(grid.scale, grid.shape, grid.scheme).expand(grid.shape)  # [out, in]
    wanted = weight if grid.shift is None else weight - spread(grid.shift, grid.shape, grid.scheme)
    index, levels = codes.long(), grid.table.levels
    right = _per_level((wanted @ gram) * scale, index, levels)  # [out, levels]
    left = torch.stack(
        [
            _per_level((torch.where(index == level, scale, 0.0) @ gram) * scale, index, levels)
            for level in range(levels)
        ],
        1,
    )  # [out, levels, levels]
    if len(grid.stored_table) == 1:
        left, right = left.sum(0, keepdim=True), right.sum(0, keepdim=True)  # one table for all rows
    table = _solve(left, right, grid.table.values).half()  # [1 or out, levels]
    # A stored table ascends: the codes follow their values to the new places.
    table, places = table.sort(dim=1, stable=True)  # [1 or out, levels] each
    renumber = places.argsort(dim=1).expand(len(codes), -1)  # [out, levels]
    renamed = renumber.gather(1, index).to(torch.uint8)  # [out, in]
    # Kept where it costs less: as a whole, or row by row where rows have tables of their own.
    candidate = with_table(grid, table)
    old, new = (gram_errors(weight - values_of(c, g), gram) for c, g in ((codes, grid), (renamed, candidate)))
    if len(table) == 1:
        return (candidate, renamed) if float(new.sum()) < float(old.sum()) else (grid, codes)
    take = (new < old)[:, None]  # [out, 1]
    table = torch.where(take, table, grid.stored_table)  # [out, levels]
    return with_table(grid, table), torch.where(take, renamed, codes)


def _row_systems(
    weight: Tensor, gram: Tensor, units: Tensor, grid: Grid, *, with_shift: bool
) -> tuple[Tensor, Tensor | None]:
    """Blocks along the input, or patches: one system of [blocks] (or twice that, with offsets) unknowns per row or band."""
    high, block = patch_size(grid.shape, grid.scheme) or (1, block_length(grid.shape, grid.scheme))
    width = units.shape[1]
    starts = range(0, width, block)
    # d cost / d scale = 0, block by block.
    products = [units[:, a : a + block] @ gram[a : a + block] for a in starts]  # [out, in] each
    left = torch.stack([_block_sums(p * units, block) for p in products], 1)  # [out, blocks, blocks]
    desired = weight @ gram  # [out, in]
    right = _block_sums(desired * units, block)  # [out, blocks]
    left, right = (_band_sums(x, high) for x in (left, right))  # [bands, ...]: rows that share their scales
    old = grid.scale.reshape(len(right), -1)  # [bands, blocks]
    if not with_shift:
        return _solve(left, right, old), None
    # Offsets are a second set of unknowns, whose units are all one.
    assert grid.shift is not None
    across = torch.stack([_block_sums(p, block) for p in products], 1)  # [out, blocks, blocks]
    ones = _block_sums(_block_sums(gram, block).T, block).T.expand(
        len(across), -1, -1
    )  # [out, blocks, blocks]
    across, ones = (_band_sums(x, high) for x in (across, ones))  # [bands, blocks, blocks]
    left = torch.cat(
        [torch.cat([left, across], 2), torch.cat([across.mT, ones], 2)], 1
    )  # [bands, 2 blocks, 2 blocks]
    right = torch.cat([right, _band_sums(_block_sums(desired, block), high)], 1)  # [bands, 2 blocks]
    found = _solve(left, right, torch.cat([old, grid.shift.reshape(len(old), -1)], 1))  # [bands, 2 blocks]
    return found[:, : old.shape[1]], found[:, old.shape[1] :]


def _band_systems(
    weight: Tensor, gram: Tensor, units: Tensor, grid: Grid, *, with_shift: bool
) -> tuple[Tensor, Tensor | None]:
    """Blocks along the output: one system of [in] (or twice that) unknowns per band of rows that share their scales."""
    block = block_length(grid.shape, grid.scheme)
    scales, shifts = [], []
    for band, first in enumerate(range(0, len(units), block)):
        part, desired = (
            units[first : first + block],
            weight[first : first + block] @ gram,
        )  # [rows of the band, in]
        left, right = gram * (part.T @ part), (part * desired).sum(0)  # [in, in], [in]
        old = grid.scale[band]  # [in]
        if with_shift:
            assert grid.shift is not None
            across = gram * part.sum(0)[:, None]  # [in, in]
            left = torch.cat(
                [torch.cat([left, across], 1), torch.cat([across.T, gram * len(part)], 1)]
            )  # [2 in, 2 in]
            right, old = torch.cat([right, desired.sum(0)]), torch.cat([old, grid.shift[band]])  # [2 in]
        found = _solve(left[None], right[None], old[None])[0]  # [in or 2 in]
        scales.append(found[: units.shape[1]])
        shifts.append(found[units.shape[1] :])
    return torch.stack(scales), torch.stack(shifts) if with_shift else None  # [blocks, in] each


def _one_block(
    weight: Tensor, gram: Tensor, units: Tensor, grid: Grid, *, with_shift: bool
) -> tuple[Tensor, Tensor | None]:
    """One scale (and offset) for the tensor."""
    old = (
        grid.scale.view(1)
        if grid.shift is None or not with_shift
        else torch.cat([grid.scale[0], grid.shift[0]])
    )
    basis = (
        [units, torch.ones_like(units)] if with_shift else [units]
    )  # what scale and offset are multiplied by
    products = [x @ gram for x in basis]  # [out, in] each
    left = torch.stack(
        [torch.stack([(p * x).sum() for x in basis]) for p in products]
    )  # [unknowns, unknowns]
    right = torch.stack([(p * weight).sum() for p in products])  # [unknowns]
    found = _solve(left[None], right[None], old[None])[0]  # [unknowns]
    return found[:1], found[1:] if with_shift else None


def _solve(left: Tensor, right: Tensor, old: Tensor) -> Tensor:
    """`left` [n, k, k] x = `right` [n, k] for n symmetric systems, pulled slightly to `old`, where unused unknowns stay."""
    left, right = left.double(), right.double()
    prior = PRIOR * left.diagonal(dim1=-2, dim2=-1)  # [n, k]
    prior = torch.where(prior > 0, prior, 1.0)
    left = left + torch.diag_embed(prior)
    found: Tensor = torch.linalg.solve(left, right + prior * old.double())  # [n, k]
    return found.float()


def _block_sums(x: Tensor, block: int) -> Tensor:
    """Sums over runs of `block` columns: [rows, blocks]; the last run may be short."""
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % block))  # [rows, blocks * block]
    return x.view(len(x), -1, block).sum(-1)  # [rows, blocks]


def _band_sums(x: Tensor, high: int) -> Tensor:
    """Sums of `x` [out, ...] over bands of `high` rows: [bands, ...]; the last band may be short."""
    if high == 1:
        return x
    bands = torch.arange(len(x), device=x.device) // high  # [out]
    return x.new_zeros(-(-len(x) // high), *x.shape[1:]).index_add_(0, bands, x)


def _per_level(x: Tensor, index: Tensor, levels: int) -> Tensor:
    """Sums of `x` [rows, in] over the columns of each code in `index` [rows, in]: [rows, levels]."""
    return x.new_zeros(len(x), levels).scatter_add_(1, index, x)


def _better(weight: Tensor, gram: Tensor, codes: Tensor, grid: Grid, *, candidate: Grid) -> Grid:
    """The candidate in the rows where it costs less; as a whole where rows share scales, or scales of scales."""
    old, new = (gram_errors(weight - values_of(codes, g), gram) for g in (grid, candidate))
    if not scales_by_row(grid):
        return candidate if float(new.sum()) < float(old.sum()) else grid
    return with_rows(grid, candidate, new < old)
