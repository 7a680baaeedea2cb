"""From scores to candidates: each solver divides the budget by the losses of every unit under every level."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar, get_args

from torch import Tensor

from fracbit.errors import RecipeError
from fracbit.importance import (
    Solution,
    best_uniform,
    by_order,
    cost_table,
    exact,
    predict_losses,
)
from fracbit.pipeline.plan.passes import Streamed
from fracbit.pipeline.plan.problem import Problem
from fracbit.pipeline.plan.scoring import WEIGHT_ERROR, make_losses, make_scores
from fracbit.pipeline.study.float_model import FloatModel
from fracbit.records.allocation import Allocation
from fracbit.records.progress import Progress
from fracbit.records.scheme import Scheme
from fracbit.records.scores import Losses, Scores, check_scores
from fracbit.records.spending import Solver

Value = TypeVar("Value")
Curve = tuple[tuple[float, float], ...]
"""Points (stored bits per weight, predicted loss)."""
STEPS = 17  # points of a curve
LITTLE = 0.02  # of a budget that may be left over without a note


@dataclass(frozen=True)
class Candidate:
    """One way to spend the budget: its size, and its predicted loss in the units of the score."""

    name: str
    allocation: Allocation = field(repr=False)
    bits_per_weight: float
    file_bytes: int
    predicted_loss: float | None


@dataclass(frozen=True)
class Solved:
    """The candidates, the chosen solver's first, and notes: the rest of the budget, and solvers that could not run."""

    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...]


def scores_and_losses(
    problem: Problem,
    score: str | Scores | Losses,
    float_model: FloatModel | Streamed | None = None,
    ids: Tensor | None = None,
    progress: Progress | None = None,
) -> tuple[Scores, Losses]:
    """Scores for the solver `order` and losses for `exact`, from the name of a score, from scores, or from losses.

    `float_model` and `ids` int64 [samples, tokens] are for scores that read text.
    Raises `RecipeError` for scores of another model and losses that do not cover the levels, `WeightError`.
    """
    if isinstance(score, Losses):
        return _from_losses(problem, score)
    if isinstance(score, Scores):
        return _from_scores(problem, score, progress)
    where, units, seed = float_model or problem.weights, problem.units, problem.recipe.seed
    losses = make_losses(where, units, score, problem.levels, ids=ids, seed=seed, progress=progress)
    if losses.method == score:
        return _lift(problem, losses), losses
    return make_scores(where, units, score, ids=ids, seed=seed, progress=progress), losses


def _from_losses(problem: Problem, losses: Losses) -> tuple[Scores, Losses]:
    losses = replace(losses, rows=_without_fixed(problem, losses.rows))
    check_scores(losses, [unit.name for unit in problem.units], problem.weights.fingerprint)
    missing = [str(level) for level in problem.levels if level not in losses.schemes]
    if missing:
        raise RecipeError(f"these losses do not cover {', '.join(missing)}; measure them for all levels")
    return _lift(problem, losses), losses


def _from_scores(problem: Problem, scores: Scores, progress: Progress | None) -> tuple[Scores, Losses]:
    scores = replace(scores, values=_without_fixed(problem, scores.values))
    check_scores(scores, [unit.name for unit in problem.units], problem.weights.fingerprint)
    errors = make_losses(problem.weights, problem.units, WEIGHT_ERROR, problem.levels, progress=progress)
    return scores, predict_losses(scores, errors)


def _without_fixed(problem: Problem, values: Mapping[str, Value]) -> dict[str, Value]:
    """The values of units, without those of linears (and blocks of them) that the recipe fixes."""
    units = {unit.name for unit in problem.units}
    gone = set(problem.fixed) | {
        name for name in values if any(fixed.startswith(f"{name}.") for fixed in problem.fixed)
    }
    return {name: value for name, value in values.items() if name in units or name not in gone}


def _lift(problem: Problem, losses: Losses) -> Scores:
    """The gain of lifting each unit from its cheapest level to its most expensive one, per bit."""
    column = [losses.schemes.index(level) for level in problem.levels]
    worth = {}
    for unit, cost in zip(problem.units, cost_table(problem.units, problem.levels), strict=True):
        low, high = (end(cost, key=cost.__getitem__) for end in (min, max))
        row = losses.rows[unit.name]
        worth[unit.name] = (row[column[low]] - row[column[high]]) / max(1, cost[high] - cost[low])
    return Scores(worth, losses.method, losses.model, "order", protocol=losses.protocol)


def solve(problem: Problem, scores: Scores, losses: Losses, solver: Solver = "exact") -> Solved:
    """Divide the budget by `solver`, and for comparison by the other solver and by the best uniform level.

    Raises `BudgetError` (budget out of reach, with the range).
    """
    chosen = _divide(problem, scores, losses, solver)
    found: dict[str, Solution] = {solver: chosen}
    for other in get_args(Solver):
        if other != solver:
            found[other] = _divide(problem, scores, losses, other)
    level = best_uniform(problem.units, problem.levels, problem.budget.bits, losses)
    if level is not None:
        found["uniform"] = level
    return Solved(
        tuple(_candidate(problem, name, solution, losses.method) for name, solution in found.items()),
        (*chosen.notes, *_left_over(problem, chosen)),
    )


@dataclass(frozen=True)
class UniformLevel:
    """One level for every layer: what it takes in the terms of the question, its predicted loss, and whether it `fits`."""

    scheme: Scheme | None
    bits_per_weight: float
    bytes: int
    predicted_loss: float
    fits: bool


def neighbours(problem: Problem, losses: Losses, reach: int = 3) -> tuple[UniformLevel, ...]:
    """The best level that all layers may have within the budget, between those next to it by size, the smallest first.

    `reach`: how many on either side. Levels that some layer may not have, or of which the losses say nothing, are left out.
    """
    costs, budget = cost_table(problem.units, problem.levels), problem.budget
    found = []
    for i, level in enumerate(problem.levels):
        if level in losses.schemes and all(i in cost for cost in costs):
            bits, column = sum(cost[i] for cost in costs), losses.schemes.index(level)
            loss = sum(row[column] for row in losses.rows.values())
            size = budget.other_bytes + -(-bits // 8)
            found.append(UniformLevel(level, budget.per_weight(bits), size, loss, fits=bits <= budget.bits))
    found.sort(key=lambda each: each.bytes)
    best = max((i for i, each in enumerate(found) if each.fits), default=0)
    return tuple(found[max(0, best - reach) : best + reach + 1])


def curves_of(problem: Problem, scores: Scores, losses: Losses) -> dict[str, Curve]:
    """Predicted loss over the whole reachable range, by each solver, and the uniform schemes as points."""
    costs = cost_table(problem.units, problem.levels)
    least, most = (sum(end(cost.values()) for cost in costs) for end in (min, max))
    steps = [least + (most - least) * i // (STEPS - 1) for i in range(STEPS)]
    budgets = [replace(problem.budget, bits=bits, question="average bits") for bits in steps]
    curves: dict[str, Curve] = {}
    for solver in get_args(Solver):
        solved = [_divide(replace(problem, budget=budget), scores, losses, solver) for budget in budgets]
        curves[solver] = tuple((problem.budget.per_weight(s.bits), s.loss) for s in solved)
    return curves | {"uniform": _uniform_points(problem, costs, losses)}


def _uniform_points(problem: Problem, costs: Sequence[Mapping[int, int]], losses: Losses) -> Curve:
    points = []
    for i, level in enumerate(problem.levels):
        if not all(i in cost for cost in costs):
            continue
        column = losses.schemes.index(level)
        total = sum(cost[i] for cost in costs)
        points.append((problem.budget.per_weight(total), sum(row[column] for row in losses.rows.values())))
    return tuple(sorted(points))


def _divide(problem: Problem, scores: Scores, losses: Losses, solver: Solver) -> Solution:
    if solver == "exact":
        return exact(problem.units, problem.levels, problem.budget, losses)
    return by_order(problem.units, problem.levels, problem.budget, scores, losses=losses)


def _candidate(problem: Problem, name: str, solution: Solution, method: str) -> Candidate:
    budget = problem.budget
    allocation = solution.allocation(
        problem.units,
        problem.levels,
        problem.weights.fingerprint,
        solver=name,
        score=method,
        budget=budget.figure(budget.bits),
    )
    return Candidate(
        name,
        allocation,
        bits_per_weight=budget.per_weight(solution.bits),
        file_bytes=problem.file_bytes(allocation.schemes),
        predicted_loss=None if math.isnan(solution.loss) else solution.loss,
    )


def _left_over(problem: Problem, solution: Solution) -> tuple[str, ...]:
    """A note if much of the budget is left, with the reason."""
    left = problem.budget.bits - solution.bits
    if left < LITTLE * problem.budget.bits:
        return ()
    taken = {unit.name: solution.picks[unit.name] for unit in problem.units}
    costs = cost_table(problem.units, problem.levels)
    steps = [
        price - cost[taken[unit.name]]
        for unit, cost in zip(problem.units, costs, strict=True)
        for price in cost.values()
        if price > cost[taken[unit.name]]
    ]
    why = "no larger scheme is expected to help" if steps else "every layer has the largest level"
    if steps and min(steps) > left:
        why = "the smallest step to a larger scheme needs more"
    return (f"{100 * left / problem.budget.bits:.1f} % of the budget is left: {why}",)
