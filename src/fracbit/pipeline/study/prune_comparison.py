"""Dropping blocks compared with lowering their bits, in one order and at equal size.

The comparison of arXiv:2406.17415, section 5: at equal size, quantizing the less important layers should beat removing them,
except where they would fall to 2 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from torch import Tensor

from fracbit.errors import RecipeError
from fracbit.importance import Unit
from fracbit.pipeline.study.float_model import FloatModel, rounded
from fracbit.pipeline.study.variants import Picks, losses_of
from fracbit.records.progress import Progress
from fracbit.records.scheme import Scheme
from fracbit.records.scores import Scores

Point: TypeAlias = tuple[float, float]
"""Stored bits per weight of the whole model, and nats per token."""
HIGH, LOW, DROPPED = 0, 1, 2


def compare_with_quantizing(
    float_model: FloatModel,
    units: Sequence[Unit],
    scores: Scores,
    *,
    high: Scheme | None,
    low: Scheme | None,
    held_out: Tensor,
    progress: Progress | None = None,
) -> dict[str, list[Point]]:
    """Compare dropping blocks with lowering them from `high` to `low`: the lines `pruned` and `quantized`.

    `units` are blocks; `held_out` int64 [samples, tokens]. Bits are divided by the weights of the whole model, so that
    dropped blocks count as saved. Both lines start with every block at `high` (None: float) and change one block after
    another, the least important first. Raises `RecipeError` when `low` takes no fewer bits than `high`.
    """
    if sum(unit.bits(low) for unit in units) >= sum(unit.bits(high) for unit in units):
        raise RecipeError(
            f"--low {low or 'float'} takes no fewer bits than --high {high or 'float'}; name a smaller scheme"
        )
    filled = [
        [rounded(float_model, dict.fromkeys(unit.shapes, scheme)) for scheme in (high, low)] for unit in units
    ]
    picks = _picks([unit.name for unit in units], scores)
    losses: dict[Picks, float] = {}
    for these, nats in losses_of(
        float_model, picks.values(), lambda block, n: None if n == DROPPED else filled[block][n], held_out
    ):
        losses[these] = float(nats.mean())
        if progress is not None:
            progress("comparing", len(losses), len(set(picks.values())))
    lines: dict[str, list[Point]] = {way: [] for way, _ in picks}
    for (way, _), these in picks.items():
        lines[way].append((_bits(units, these, (high, low)), losses[these]))
    return lines


def _picks(names: Sequence[str], scores: Scores) -> dict[tuple[str, int], Picks]:
    """The option of every block, by way and number of lowered or dropped blocks; at least one block stays."""
    place = {name: index for index, name in enumerate(names)}
    order = [place[name] for name in reversed(scores.order())]
    ways = {"quantized": (LOW, len(names)), "pruned": (DROPPED, len(names) - 1)}
    return {
        (way, count): tuple(number if index in order[:count] else HIGH for index in range(len(names)))
        for way, (number, most) in ways.items()
        for count in range(most + 1)
    }


def _bits(units: Sequence[Unit], these: Picks, schemes: tuple[Scheme | None, Scheme | None]) -> float:
    """Stored bits per weight of the whole model."""
    kept = [(unit, schemes[n]) for unit, n in zip(units, these, strict=True) if n != DROPPED]
    return sum(unit.bits(scheme) for unit, scheme in kept) / sum(unit.weights for unit in units)


def at_equal_size(lines: Mapping[str, Sequence[Point]]) -> list[tuple[Point, Point | None]]:
    """Every pruned model with the largest quantized one of no more bits: (bits, nats) each; None if all are larger."""
    found: list[tuple[Point, Point | None]] = []
    for pruned in lines["pruned"]:
        within = [point for point in lines["quantized"] if point[0] <= pruned[0] + 1e-9]
        found.append((pruned, max(within, default=None)))
    return found
