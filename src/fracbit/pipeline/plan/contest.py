"""The contest: a searched allocation against the best uniform scheme of no more bytes, on held-out text.

In other tools, searched allocations have missed their budget or lost to a uniform scheme. So the better one is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from fracbit.errors import BudgetError, SchemeError
from fracbit.importance import Unit
from fracbit.numerics.datatypes import check_datatype
from fracbit.pipeline.plan.scoring import WEIGHT_ERROR, make_losses
from fracbit.pipeline.study.float_model import FloatModel, measure, replaced, rounded
from fracbit.pipeline.study.weights import Weights
from fracbit.records.allocation import Allocation, uniform
from fracbit.records.scheme import Scheme

UNCHECKED = (
    "not compared with a uniform scheme of the same size; pass --held-out TEXT that the score has not seen "
    "(to quantize: --set spending.held_out=TEXT)"
)
ENOUGH = 0.75  # rivals with fewer bits than this share of the largest rival's are never better, and not tried


@dataclass(frozen=True)
class Contest:
    """Losses on held-out text in nats per token: of the float model, the searched allocation and the uniform one."""

    float_nll: float
    searched_nll: float
    uniform_nll: float
    uniform_scheme: str
    uniform_bits_per_weight: float
    tokens: int
    winner: Allocation = field(repr=False)

    @property
    def searched_won(self) -> bool:
        """Whether the searched allocation won."""
        return self.searched_nll < self.uniform_nll

    def to_json(self) -> dict[str, Any]:
        """The figures as a JSON object."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "winner"}


def contest(
    float_model: FloatModel,
    units: Sequence[Unit],
    allocation: Allocation,
    held_out: Tensor,
    *,
    levels: Sequence[Scheme | None],
    budget: int | None = None,
) -> Contest:
    """Measure the allocation and the best uniform scheme of no more bytes; the winner carries a note with the result.

    `held_out` int64 [samples, tokens]; `budget`: bits that the uniform scheme may take, by default those of the
    allocation. The uniform rival is one of the levels, at its own or any other width: the one that fits with the least
    weight error. Raises `BudgetError` when no rival fits into the allocation's bytes.
    """
    bits = budget or sum(unit.bits(allocation.schemes[next(iter(unit.shapes))]) for unit in units)
    scheme, cost = _best_rival(float_model.weights, units, bits, levels)
    names = [name for unit in units for name in unit.shapes]
    rival = uniform(names, scheme, allocation.model)
    base = measure(float_model, held_out)
    searched, plain = (_nll(float_model, each, held_out) for each in (allocation, rival))
    each = cost / sum(unit.weights for unit in units)
    facts = (
        f"on {base.tokens} held-out tokens: allocated {searched:.4f} nats, uniform {scheme} ({each:.4f} bits per weight) "
        f"{plain:.4f}, float {base.nll:.4f}"
    )
    if searched < plain:
        winner = replace(allocation, notes=(*allocation.notes, facts))
    else:
        winner = replace(rival, notes=(*allocation.notes, f"the uniform scheme won and is used: {facts}"))
    return Contest(
        float_nll=base.nll,
        searched_nll=searched,
        uniform_nll=plain,
        uniform_scheme=str(scheme),
        uniform_bits_per_weight=each,
        tokens=base.tokens,
        winner=winner,
    )


def _nll(float_model: FloatModel, allocation: Allocation, held_out: Tensor) -> float:
    """Nats per token of the model rounded as allocated."""
    with replaced(float_model, rounded(float_model, allocation.schemes)):
        return measure(float_model, held_out).nll


def _best_rival(
    weights: Weights, units: Sequence[Unit], bits: int, levels: Sequence[Scheme | None]
) -> tuple[Scheme | None, int]:
    """The uniform scheme of least weight error within `bits`, and the bits it takes."""
    rivals = [scheme for scheme in _kin(levels) if all(unit.takes(scheme) for unit in units)]
    taken = {scheme: sum(unit.bits(scheme) for unit in units) for scheme in rivals}
    taken = {scheme: cost for scheme, cost in taken.items() if cost <= bits}
    if not taken:
        raise BudgetError(
            f"no uniform scheme fits these layers into {bits} bits; add levels with larger blocks"
        )
    near = [scheme for scheme, cost in taken.items() if cost >= ENOUGH * max(taken.values())]
    errors = make_losses(weights, units, WEIGHT_ERROR, near)
    size = {unit.name: unit.weights for unit in units}
    total = [sum(size[name] * row[i] for name, row in errors.rows.items()) for i in range(len(near))]
    best = near[total.index(min(total))]
    return best, taken[best]


def _kin(levels: Sequence[Scheme | None]) -> list[Scheme | None]:
    """The levels, and each at every other width that its data type has."""
    found: dict[Scheme | None, None] = dict.fromkeys(levels)
    for level in levels:
        if level is not None:
            found |= dict.fromkeys(other for bits in range(1, 9) if _exists(other := level.with_bits(bits)))
    return list(found)


def _exists(scheme: Scheme) -> bool:
    try:
        check_datatype(scheme)
    except SchemeError:
        return False
    return True
