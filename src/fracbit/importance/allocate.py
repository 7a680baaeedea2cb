"""From scores and a budget to a choice for every unit: the layer-wise paper's order, and the exact optimum.

- `by_order` (Dumitru et al. 2024, arXiv:2406.17415, section 3.2): sort by importance, lift from the top until the budget is
  spent. With more than two levels all units climb level by level, so two neighbouring levels are in use at the end.
- `exact`: minimize the sum of the units' predicted losses under the budget, a multiple-choice knapsack, solved to optimality
  by HiGHS through `scipy.optimize.milp`.

Both never exceed the budget, and leave less of it over than the smallest step that any unit could still take.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce

from fracbit.errors import BudgetError, RecipeError
from fracbit.importance.limits import Budget
from fracbit.importance.units import Choices, Unit, cost_table
from fracbit.records.allocation import Allocation
from fracbit.records.grouped import some_of
from fracbit.records.scores import Losses, Scores, check_scores

SECONDS = 60.0


@dataclass(frozen=True)
class Solution:
    """The number of the choice that each unit got, the bits they take, and the sum of predicted losses (NaN: none known)."""

    picks: Mapping[str, int]
    bits: int
    loss: float
    notes: tuple[str, ...] = ()

    def allocation(
        self, units: Sequence[Unit], choices: Choices, model: str = "", **origin: object
    ) -> Allocation:
        """The solution spelled out for every layer."""
        schemes = {layer: choices[self.picks[unit.name]] for unit in units for layer in unit.shapes}
        return Allocation(
            schemes, model, {"bits": self.bits, "predicted_loss": _json(self.loss), **origin}, self.notes
        )


def by_order(
    units: Sequence[Unit], choices: Choices, budget: Budget, scores: Scores, losses: Losses | None = None
) -> Solution:
    """Lift the units in the order of their scores until the budget is spent.

    `losses` are only summed into the result. Raises `BudgetError` (budget out of reach, fewer than two choices, a single
    unit), `RecipeError` (scores of another model).
    """
    check_scores(scores, [unit.name for unit in units])
    costs = _checked_costs(units, choices, budget)
    # Every unit starts with its cheapest choice.
    ladders = {unit.name: _ladder(cost) for unit, cost in zip(units, costs, strict=True)}
    cost_of = {unit.name: cost for unit, cost in zip(units, costs, strict=True)}
    steps = dict.fromkeys(ladders, 0)
    left = budget.bits - sum(cost_of[name][ladder[0]] for name, ladder in ladders.items())
    # All climb level by level; then whatever still fits.
    for level in range(1, max(map(len, ladders.values()))):
        left = _climb(scores.order(), ladders, cost_of, steps, left=left, level=level)
    left = _climb(scores.order(), ladders, cost_of, steps, left=left, level=None)
    picks = {name: ladders[name][step] for name, step in steps.items()}
    return Solution(picks, budget.bits - left, _sum(losses, picks, choices))


def exact(units: Sequence[Unit], choices: Choices, budget: Budget, losses: Losses) -> Solution:
    """The choice of least summed loss within the budget.

    A choice that costs a unit more and promises it no less loss is never taken, so a budget may be left over when nothing
    that it could buy is expected to help. Raises as `by_order`.
    """
    check_scores(losses, [unit.name for unit in units])
    costs = _checked_costs(units, choices, budget)
    column = _columns(losses, choices)
    rows = [[losses.rows[unit.name][i] for i in column] for unit in units]  # [unit][choice]
    # Only choices that nothing else beats on both cost and loss are put to the solver.
    ladders = [_frontier(cost, row) for cost, row in zip(costs, rows, strict=True)]
    taken, notes = _knapsack(
        [[costs[u][i] for i in ladder] for u, ladder in enumerate(ladders)],
        [[rows[u][i] for i in ladder] for u, ladder in enumerate(ladders)],
        budget.bits,
    )
    picks = {unit.name: ladders[u][taken[u]] for u, unit in enumerate(units)}
    bits = sum(costs[u][picks[unit.name]] for u, unit in enumerate(units))
    return Solution(picks, bits, sum(rows[u][picks[unit.name]] for u, unit in enumerate(units)), notes)


def best_uniform(
    units: Sequence[Unit], choices: Choices, bits: int, losses: Losses | None = None
) -> Solution | None:
    """The best choice that can be given to every unit within `bits`; None when even the cheapest takes more.

    Best is the least summed loss when losses are given, the most bits otherwise.
    """
    costs = cost_table(units, choices)
    common = [i for i in range(len(choices)) if all(i in cost for cost in costs)]
    totals = {i: sum(cost[i] for cost in costs) for i in common}
    within = [i for i, total in totals.items() if total <= bits]
    if not within:
        return None

    def worth(i: int) -> tuple[float, int]:
        loss = _sum(losses, dict.fromkeys((unit.name for unit in units), i), choices)
        return (0.0 if math.isnan(loss) else loss, -totals[i])

    best = min(within, key=worth)
    picks = dict.fromkeys((unit.name for unit in units), best)
    return Solution(picks, totals[best], _sum(losses, picks, choices))


def predict_losses(scores: Scores, errors: Losses) -> Losses:
    """Losses from a score that does not know schemes: its weight times each scheme's relative squared error.

    A sensitivity is nats per squared relative error and is the weight itself; of a mere order only the ranks mean anything:
    the most important unit weighs 1, the least 1 / units. Raises `RecipeError` when the two are of different models.
    """
    check_scores(errors, list(scores.values))
    weights = dict(scores.values)
    if scores.kind == "order":
        order = scores.order()
        weights = {name: 1 - place / len(order) for place, name in enumerate(order)}
    rows = {name: tuple(weights[name] * error for error in row) for name, row in errors.rows.items()}
    method = f"{scores.method} x {errors.method}"
    return Losses(errors.schemes, rows, method, scores.model, protocol=scores.protocol)


def _checked_costs(units: Sequence[Unit], choices: Choices, budget: Budget) -> list[dict[int, int]]:
    """The cost table of a problem that leaves something to choose. Raises `BudgetError`."""
    if len(set(choices)) < 2:
        raise BudgetError(
            f"{len(set(choices))} level leaves nothing to choose; give at least two, such as nf4/64,nf2/64"
        )
    if len(units) < 2:
        raise BudgetError(
            f"{len(units)} unit leaves nothing to divide a budget over; choose for single linears (granularity linear), "
            "or quantize the model with one scheme"
        )
    costs = cost_table(units, choices)
    for unit, cost in zip(units, costs, strict=True):
        if not cost:
            raise BudgetError(
                f"no level suits all linears of {unit.name} ({some_of(list(unit.shapes))}); offer one that each may have, "
                "or, where they share a scheme by granularity block alone, use granularity linear"
            )
    least, most = (sum(end(cost.values()) for cost in costs) for end in (min, max))
    if budget.bits < least or (budget.bits > most and budget.question != "device memory"):
        side = "below the lowest" if budget.bits < least else "above the highest"
        raise BudgetError(
            f"a budget of {budget.figure(budget.bits)} is {side} that these levels reach: "
            f"{budget.figure(least)} to {budget.figure(most)}; ask for something between, or offer other levels"
        )
    return costs


def _ladder(costs: Mapping[int, int]) -> list[int]:
    """Choices by rising cost; of equally dear ones the first that was offered."""
    first: dict[int, int] = {}
    for choice, cost in costs.items():
        first.setdefault(cost, choice)
    return [first[cost] for cost in sorted(first)]


def _frontier(costs: Mapping[int, int], losses: Sequence[float]) -> list[int]:
    """Choices by rising cost and falling loss: those that nothing else beats on both."""
    kept: list[int] = []
    for i in sorted(costs, key=lambda i: (costs[i], losses[i])):
        if not kept or losses[i] < losses[kept[-1]]:
            kept.append(i)
    return kept


def _climb(
    order: Sequence[str],
    ladders: Mapping[str, Sequence[int]],
    costs: Mapping[str, Mapping[int, int]],
    steps: dict[str, int],
    left: int,
    level: int | None,
) -> int:
    """Lift units in order by one step, to `level` or (None) as long as anything fits; returns the bits left."""
    while True:
        before = left
        for name in order:
            ladder, step = ladders[name], steps[name]
            if step + 1 < len(ladder) and level in (None, step + 1):
                price = costs[name][ladder[step + 1]] - costs[name][ladder[step]]
                if price <= left:
                    steps[name], left = step + 1, left - price
        if left == before or level is not None:
            return left


def _columns(losses: Losses, choices: Choices) -> list[int]:
    missing = [str(scheme) for scheme in choices if scheme not in losses.schemes]
    if missing:
        raise RecipeError(
            f"these {losses.method} losses do not cover {', '.join(missing)}; measure them for all levels"
        )
    return [losses.schemes.index(scheme) for scheme in choices]


def _sum(losses: Losses | None, picks: Mapping[str, int], choices: Choices) -> float:
    if losses is None:
        return math.nan
    column = _columns(losses, choices)
    return sum(losses.rows[name][column[pick]] for name, pick in picks.items())


def _knapsack(
    costs: list[list[int]], losses: list[list[float]], budget: int
) -> tuple[list[int], tuple[str, ...]]:
    """One entry of each row, least summed loss within the budget; rows are frontiers (cost rises, loss falls).

    HiGHS works in floating point with tolerances: costs are counted from the cheapest choice in units of their common
    divisor, and the answer is checked in integers; when it is over the budget by a tolerance, it is solved again for less.
    """
    floor = sum(row[0] for row in costs)
    extra = [[cost - row[0] for cost in row] for row in costs]
    unit = reduce(math.gcd, (cost for row in extra for cost in row), 0) or 1
    extra = [[cost // unit for cost in row] for row in extra]
    room = (budget - floor) // unit
    while True:
        taken, notes = _solve(extra, losses, room)
        over = sum(row[i] for row, i in zip(extra, taken, strict=True)) - (budget - floor) // unit
        if over <= 0:
            return taken, notes
        room -= over


def _solve(extra: list[list[int]], losses: list[list[float]], room: int) -> tuple[list[int], tuple[str, ...]]:
    """The entry that each row takes; `extra` [unit][choice] are costs above the cheapest, `room` what they may sum to."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    # One variable for each choice of each unit, all behind each other: 1 where it is taken.
    sizes = [len(row) for row in extra]  # [units]
    flat_loss = np.array([loss - row[-1] for row in losses for loss in row])  # [variables]
    flat_cost = np.array([cost for row in extra for cost in row], dtype=float)  # [variables]
    flat_loss = flat_loss / max(float(flat_loss.max()), 1e-300)
    # Every unit takes exactly one choice, and all together keep to the budget.
    owner = np.repeat(np.arange(len(sizes)), sizes)  # [variables]
    one_each = csr_array(
        (np.ones(len(owner)), (owner, np.arange(len(owner)))), shape=(len(sizes), len(owner))
    )  # [units, variables]
    with _results_kept_clean():
        result = milp(
            flat_loss,
            integrality=np.ones(len(owner)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(flat_cost[None], -np.inf, room)],
            options={"mip_rel_gap": 0.0, "time_limit": SECONDS},
        )
    if result.x is None:
        raise BudgetError(f"the solver found no allocation: {result.message}")
    taken = [int(np.argmax(part)) for part in np.split(result.x, np.cumsum(sizes)[:-1])]
    notes = (
        ()
        if result.status == 0
        else (f"the solver stopped after {SECONDS:.0f} s within {result.mip_gap:.2g} of the best",)
    )
    return taken, notes


@contextmanager
def _results_kept_clean() -> Iterator[None]:
    """Standard output goes to standard error: HiGHS prints a line at some solutions, and `--json` must stay JSON."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None
