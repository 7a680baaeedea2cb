"""One sweep over the input columns: each is rounded to the grid at a target that the errors of the other columns have moved.

The target is `weight + error @ coupling` (numerics/linalg.py): with the causal coupling and no error to begin with, a sweep is
GPTQ; with the symmetric one and the error of earlier codes, it is a pass of coordinate descent. Columns go in batches: what
the rest of the matrix contributes is one matrix product per batch, what the batch does to itself is a rank-1 step per column
(the lazy batches of arXiv:2210.17323, Sec. 3.3). Everything is transposed, `[in, out]`, so that a column is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fracbit.numerics.datatypes import DataType
from fracbit.numerics.grid import Grid
from fracbit.numerics.layout import spread
from fracbit.numerics.linalg import Coupling

BATCH = 32  # columns; the rank-1 steps inside a batch then stay in the cache


@dataclass(frozen=True, eq=False)
class Lattice:
    """A grid spread over the weights it serves, transposed: `scale`, `shift` [in, out] or broadcastable."""

    table: DataType
    scale: Tensor
    shift: Tensor | None

    def columns(self, index: Tensor) -> Lattice:
        """The lattice of some input columns."""
        pick = [x if x is None or x.shape[0] == 1 else x[index] for x in (self.scale, self.shift)]
        assert pick[0] is not None
        return Lattice(self.table, pick[0], pick[1])


Refit = Callable[[Tensor, Tensor], Lattice]
"""(targets [in of the batch, out], column numbers) -> the lattice of these columns, fitted when they are reached."""


def spread_grid(grid: Grid) -> Lattice:
    """The grid of a weight [out, in] as a lattice."""
    scale = spread(grid.scale, grid.shape, grid.scheme).T.contiguous()  # [in or 1, out or 1]
    shift = None if grid.shift is None else spread(grid.shift, grid.shape, grid.scheme).T.contiguous()
    return Lattice(grid.table, scale, shift)


def sweep(
    weight: Tensor, coupling: Coupling, lattice: Lattice | Refit, error: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round every column once, in the coupling's order.

    `weight` and `error` (weight minus its present value; None: nothing is rounded yet) are [in, out], transposed.
    Returns codes uint8 and error, both [in, out].
    """
    order, matrix = coupling.order, coupling.matrix
    weight = weight[order]  # [in, out], in visiting order from here on
    error = torch.zeros_like(weight) if error is None else error[order]
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for first in range(0, len(weight), BATCH):
        last = min(first + BATCH, len(weight))
        # What the columns outside the batch ask of it: one product.
        seen = first if coupling.causal else len(weight)
        target = torch.addmm(weight[first:last], matrix[:seen, first:last].T, error[:seen])  # [batch, out]
        here = order[first:last]  # [batch]
        part = lattice.columns(here) if isinstance(lattice, Lattice) else lattice(target, here)
        # What its columns ask of one another: a rank-1 step each.
        inside = matrix[first:last, first:last]  # [batch, batch]
        _round_batch(
            target, inside, part, weight=weight[first:last], error=error[first:last], codes=codes[first:last]
        )
    back = torch.empty_like(order)  # [in]
    back[order] = torch.arange(len(order), device=order.device)
    return codes[back], error[back]  # [in, out] each, in stored order


def _round_batch(
    target: Tensor, matrix: Tensor, lattice: Lattice, *, weight: Tensor, error: Tensor, codes: Tensor
) -> None:
    """Round the columns of one batch in order: all but `matrix` [batch, batch] are [batch, out].

    `target`, `error` and `codes` are this sweep's own and are written to.
    """
    rounding = _uniform(lattice) if lattice.table.step is not None else _table(lattice)
    for i in range(len(target)):
        code, value = rounding(target[i], i)
        new = weight[i] - value  # [out]
        if i + 1 < len(target):
            target[i + 1 :].addr_(matrix[i, i + 1 :], new - error[i])
        error[i] = new
        codes[i] = code


Rounding = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(target [out], its column's number in the batch) -> codes [out] and their values [out]."""


def _uniform(lattice: Lattice) -> Rounding:
    """Evenly spaced values: a rounding of numbers, four times as fast as a search in a table."""
    assert lattice.table.step is not None
    top = lattice.table.levels - 1
    step = lattice.scale * lattice.table.step  # [batch or 1, out or 1]
    bottom = lattice.scale * lattice.table.low  # [batch or 1, out or 1]
    base = bottom if lattice.shift is None else lattice.shift + bottom
    inverse = torch.where(step != 0, 1 / step, 0.0)

    def round_column(target: Tensor, i: int) -> tuple[Tensor, Tensor]:
        row = i if len(step) > 1 else 0
        code = (target - base[row]).mul_(inverse[row]).round_().clamp_(0, top)  # [out]
        return code, torch.addcmul(base[row], code, step[row])

    return round_column


def _table(lattice: Lattice) -> Rounding:
    table = lattice.table
    inverse = torch.where(lattice.scale != 0, 1 / lattice.scale, 0.0)  # [batch or 1, out or 1]

    def round_column(target: Tensor, i: int) -> tuple[Tensor, Tensor]:
        row = i if len(inverse) > 1 else 0
        shift = None if lattice.shift is None else lattice.shift[row]
        x = (target if shift is None else target - shift) * inverse[row]  # [out]
        code = table.nearest(x[:, None])  # [out, 1]
        value = table.look_up(code)[:, 0] * lattice.scale[row]  # [out]
        return code[:, 0], value if shift is None else value + shift

    return round_column
