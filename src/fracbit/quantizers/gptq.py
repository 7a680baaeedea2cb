"""GPTQ for every data type, axis, block and offset, and its refinement by coordinate descent and closed-form scales.

A weight is rounded column by column; the error of a column moves the targets of the columns that follow, by the Cholesky
factor of the inputs' gram matrix, so that tr((W - Q) G (W - Q)^T) grows least (Frantar et al. 2022, arXiv:2210.17323).

- Blocks along the input share scales between columns: the grid is placed on the original weight, up front (static groups),
  and columns go in order of energy. Blocks along the output (AdaDim, Heo et al. 2023, arXiv:2309.15531): a column carries
  its own scales, so its grid is placed when it is reached, on the error-compensated column, in any order.
- With `rounds`, scales, offsets and tables are refitted to the codes in closed form (quantizers/refit.py) and the codes to
  the grid by coordinate descent, in turn, until nothing is gained. That is also how learned codebooks are refined.
- Never worse than round-to-nearest: where it is, which needs a grid too coarse to feed errors into, the round-to-nearest
  codes are kept and a note says so. A gram matrix that cannot be factored raises the damping, with a note.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fracbit.errors import WeightError
from fracbit.numerics.datatypes import is_fitted
from fracbit.numerics.grid import Grid, codes_in, codes_of, grid_of, in_16_bits, moved, pack, values_of
from fracbit.numerics.layout import row_chunks
from fracbit.numerics.linalg import (
    DAMPING,
    LARGEST_DAMPING,
    Coupling,
    by_energy,
    damped,
    descent,
    eliminate,
    feedback,
    gram_errors,
)
from fracbit.numerics.packed import PackedTensor, decode, quantized_columns
from fracbit.numerics.ranges import fit
from fracbit.numerics.stats import Stats
from fracbit.quantizers.column_loop import Lattice, spread_grid, sweep
from fracbit.quantizers.quantizer import Quantized
from fracbit.quantizers.refit import refit_scales, refit_table
from fracbit.records.checked import Checked
from fracbit.records.scheme import Scheme

CHECKED = 1 << 18  # weights of round-to-nearest between two looks at what they cost so far
DESCENT_ROUNDS = 12  # at most
ENOUGH = 1e-3  # relative gain of a round below which refinement stops


class Gptq(Checked):
    """GPTQ. `search` places block ranges by least weighted error.

    - `damping`: added to the diagonal of the Gram matrix, relative to the diagonal's mean.
    - `rounds`: at most so many rounds of closed-form refits and coordinate descent follow (0: plain GPTQ).
    """

    called: ClassVar[str] = "quantizer gptq"
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    reads: ClassVar[frozenset[str]] = frozenset({"gram"})

    search: bool = False
    damping: float = Field(DAMPING, gt=0, le=LARGEST_DAMPING)
    rounds: int = Field(0, ge=0)

    def __call__(
        self,
        weight: Tensor,
        scheme: Scheme,
        stats: Stats | None = None,
        *,
        columns: Tensor | None = None,
        coupling: Coupling | None = None,
    ) -> Quantized:
        """Quantize `weight` [out, in]; the costs are the rows' parts of tr((W - Q) G (W - Q)^T).

        `columns` int [p] stay in 16 bits and are moved to where they best repair the error of the others. Raises
        `WeightError` without a gram matrix or when it does not fit.
        """
        weight = weight.float()
        gram = _gram_of(stats, weight)  # [in, in]
        if columns is not None and len(columns):
            return self._with_columns(weight, scheme, gram, columns)
        coupling = self._feedback(gram) if coupling is None else coupling
        packed, costs, notes = self._quantize(weight, scheme, gram, coupling)
        return Quantized(packed, costs, gram_errors(weight, gram), notes)

    def couple(self, stats: Stats | None) -> Coupling | None:
        """How errors feed back: one factorization for all linears that read the same inputs."""
        return None if stats is None or stats.gram is None else self._feedback(stats.gram)

    def _feedback(self, gram: Tensor) -> Coupling:
        return feedback(gram, by_energy(gram), self.damping)

    def _quantize(
        self, weight: Tensor, scheme: Scheme, gram: Tensor, coupling: Coupling
    ) -> tuple[PackedTensor, Tensor, tuple[str, ...]]:
        """The packed weight, what each row costs [out], and notes."""
        notes: tuple[str, ...] = ()
        if coupling.damping > self.damping:
            notes = (
                f"damping raised from {self.damping:g} to {coupling.damping:g}: the gram matrix could not be factored",
            )
        energy = gram.diagonal()  # [in]
        start = fit(weight, scheme, energy, self.search)
        solution = self._solve(weight, start, energy, coupling)
        if self.rounds:
            solution = in_turn(
                weight, gram, solution, coupling.order, damping=self.damping, rounds=self.rounds
            )
        packed, costs, guarded = _not_worse(weight, gram, start, solution)
        return packed, costs, notes + guarded

    def _solve(self, weight: Tensor, grid: Grid, energy: Tensor, coupling: Coupling) -> Rounded:
        """GPTQ itself: one causal sweep, with the grid fitted on the way where columns carry their own scales."""
        transposed = weight.T.contiguous()  # [in, out]
        if own_scales(grid.scheme):
            fits = _ColumnFits(grid.scheme, energy, self.search)
            codes, error = sweep(transposed, coupling, fits)  # [in, out] each
            grid = fits.assembled(grid)
            if isinstance(grid.scheme.scale, str):
                return Rounded(grid, codes.T.contiguous(), error)
            # Scales that are quantized are known only now: round again, to what is stored.
        codes, error = sweep(transposed, coupling, spread_grid(grid))
        return Rounded(grid, codes.T.contiguous(), error)

    def _with_columns(self, weight: Tensor, scheme: Scheme, gram: Tensor, columns: Tensor) -> Quantized:
        columns = columns.to(torch.int32).sort().values  # [p]
        free, quantized = columns.long(), quantized_columns(columns, weight.shape[1])  # [p], [quantized]
        if not len(quantized):
            raise WeightError(
                f"all {len(free)} columns are to stay in 16 bits, nothing is left to quantize; keep fewer, or leave "
                "the layer float"
            )
        # Quantize the others against the gram matrix that is left when these columns repair what they can.
        reduced, follow = eliminate(
            gram, quantized, free, self.damping
        )  # [quantized, quantized], [quantized, p]
        packed, _, notes = self._quantize(weight[:, quantized], scheme, reduced, self._feedback(reduced))
        # Move them to where they do.
        repaired = weight[:, free] + (weight[:, quantized] - decode(packed)) @ follow  # [out, p]
        shape = (weight.shape[0], weight.shape[1])
        packed = replace(packed, shape=shape, columns=columns, outliers=in_16_bits(repaired))
        return Quantized(packed, gram_errors(weight - decode(packed), gram), gram_errors(weight, gram), notes)


class Descent(Gptq):
    """GPTQ refined by rounds of closed-form refits and coordinate descent."""

    called: ClassVar[str] = "quantizer descent"

    rounds: int = Field(DESCENT_ROUNDS, ge=0)


@dataclass(frozen=True, eq=False)
class Rounded:
    """Codes [out, in] on a grid, and `error` [in, out] = (weight - decoded)^T."""

    grid: Grid
    codes: Tensor
    error: Tensor


def in_turn(
    weight: Tensor, gram: Tensor, solution: Rounded, order: Tensor, *, damping: float, rounds: int
) -> Rounded:
    """Refit grid to codes and codes to grid in turn, at most `rounds` times, inputs in `order` [in]; the cost never rises."""
    matrix = damped(gram, damping)  # [in, in]
    step = descent(gram, order, damping)
    transposed = weight.T.contiguous()  # [in, out]
    cost = float(gram_errors(solution.error.T, matrix).sum())
    for _ in range(rounds):
        # The grid for these codes, ...
        grid = refit_scales(weight, matrix, solution.grid, solution.codes)
        grid, codes = refit_table(weight, matrix, grid, solution.codes)
        # ... and the codes for this grid.
        error = (weight - values_of(codes, grid)).T  # [in, out]
        codes, error = sweep(transposed, step, spread_grid(grid), error)  # [in, out] each
        new = float(gram_errors(error.T, matrix).sum())
        if new < cost:
            solution = Rounded(grid, codes.T.contiguous(), error)
        if not new < cost * (1 - ENOUGH):
            break
        cost = new
    return solution


def refined(
    weight: Tensor, packed: PackedTensor, gram: Tensor, damping: float = DAMPING, rounds: int = DESCENT_ROUNDS
) -> tuple[Quantized, Quantized]:
    """A packed weight that something else chose, as it is and moved on its own grid towards `weight` [out, in].

    The second never costs more than the first by tr((W - Q) G (W - Q)^T): zero points stay, codes and scales move.
    """
    grid, codes = grid_of(packed), codes_in(packed)  # [out, in]
    powers = gram_errors(weight, gram)  # [out]
    start = Rounded(grid, codes, (weight - values_of(codes, grid)).T)
    old = Quantized(packed, gram_errors(start.error.T, gram), powers)
    found = in_turn(weight, gram, start, by_energy(gram), damping=damping, rounds=rounds)
    costs = gram_errors(found.error.T, gram)  # [out]
    if not float(costs.sum()) < float(old.costs.sum()):
        return old, old
    return old, Quantized(pack(found.codes, found.grid), costs, powers)


def own_scales(scheme: Scheme) -> bool:
    """Whether every input column has scales of its own, so that its grid can wait until the column is reached."""
    inside = isinstance(scheme.block, int) or scheme.block == "row"
    return scheme.axis == "out" and inside and not is_fitted(scheme)


class _ColumnFits:
    """Grids of columns with scales of their own, fitted batch by batch during a sweep and put together afterwards."""

    def __init__(self, scheme: Scheme, energy: Tensor, search: bool) -> None:
        self.scheme = scheme if isinstance(scheme.scale, str) else replace(scheme, scale="fp32")
        self.energy, self.search = energy, search
        self.columns: list[Tensor] = []
        self.grids: list[Grid] = []

    def __call__(self, target: Tensor, columns: Tensor) -> Lattice:
        grid = fit(target.T.contiguous(), self.scheme, self.energy[columns], self.search)
        self.columns.append(columns)
        self.grids.append(grid)
        return spread_grid(grid)

    def assembled(self, like: Grid) -> Grid:
        """One grid in the stored order of columns, its scales rounded to what `like` stores."""
        place = torch.cat(self.columns).argsort()  # [in]

        def joined(part: Callable[[Grid], Tensor | None]) -> Tensor | None:
            parts = [x for x in map(part, self.grids) if x is not None]
            return torch.cat(parts, 1)[:, place] if parts else None  # [blocks, in]

        scale = joined(lambda grid: grid.scale)
        assert scale is not None
        return moved(like, scale, joined(lambda grid: grid.shift), joined(lambda grid: grid.zeros))


def _not_worse(
    weight: Tensor, gram: Tensor, start: Grid, solution: Rounded
) -> tuple[PackedTensor, Tensor, tuple[str, ...]]:
    """The solution, or round-to-nearest on the grid it started from where that costs less; and what each row costs.

    Round-to-nearest is dearer as soon as its first rows cost more than all of the solution: the others are not multiplied.
    """
    packed = pack(solution.codes, solution.grid)
    costs = gram_errors(weight - decode(packed), gram)  # [out]
    most, spent = float(costs.sum()), 0.0
    codes, nearest = codes_of(weight, start), []
    for first, last in row_chunks(start.shape, start.scheme, CHECKED):
        rounded = values_of(codes[first:last], start, first, last)  # [rows, in]
        nearest.append(gram_errors(weight[first:last] - rounded, gram))  # [rows]
        spent += float(nearest[-1].sum())
        if not spent < most:
            return packed, costs, ()
    return pack(codes, start), torch.cat(nearest), ("round-to-nearest kept: feeding errors back cost more",)


def _gram_of(stats: Stats | None, weight: Tensor) -> Tensor:
    if stats is None or stats.gram is None:
        raise WeightError(
            "gptq reads the gram matrix of the inputs; observe calibration data first, or use rtn"
        )
    if stats.gram.shape != (weight.shape[1], weight.shape[1]):
        raise WeightError(
            f"a gram matrix {tuple(stats.gram.shape)} does not fit a weight {tuple(weight.shape)}"
        )
    return stats.gram
