"""Plan before anything is written: what a budget buys, who gets what, and what the run itself will need.

    weights on disk -> units, costs -> losses (a score's) -> order, exact, uniform -> Plan

Data-free scores read one weight at a time; a score that reads text loads the float model once. `contest` then measures the
chosen allocation and the best uniform scheme of no more bytes on held-out tokens, and takes the uniform one when it wins:
searched allocations have missed their target and lost to uniform in other tools.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from importlib.util import find_spec
from typing import Literal, TypeVar, cast, get_args

from torch import Tensor

from fracbit.checkpoint.format import tensor_name
from fracbit.checkpoint.source import Source, open_source, tensor_hash
from fracbit.errors import BudgetError, RecipeError, SchemeError
from fracbit.importance import (
    Budget,
    Granularity,
    Solution,
    Unit,
    average_bits,
    best_uniform,
    by_order,
    cost_table,
    device_memory,
    exact,
    file_size,
    predict_losses,
)
from fracbit.models.blocks import blocks
from fracbit.models.find import family_of
from fracbit.models.skeleton import skeleton
from fracbit.numerics.datatypes import check_datatype
from fracbit.numerics.packed import outlier_count, part_shapes
from fracbit.pipeline.plan.memory import running_memory
from fracbit.pipeline.plan.sampling import sampling_notes
from fracbit.pipeline.plan.scoring import make_losses, make_scores
from fracbit.pipeline.quantize.rotate import untie
from fracbit.pipeline.quantize.schedule import SHARD_BYTES, Item, Schedule, make_schedule
from fracbit.pipeline.quantize.stream import model_config
from fracbit.pipeline.study.float_model import (
    FloatModel,
    Weights,
    measure,
    replaced,
    rounded,
    weights_on_disk,
)
from fracbit.quantizers import RoundToNearest
from fracbit.records.allocation import Allocation, uniform
from fracbit.records.progress import Progress
from fracbit.records.recipe import Override, Recipe
from fracbit.records.scheme import Scheme
from fracbit.records.scores import Losses, Scores, check_scores

Solver = Literal["exact", "order"]
Value = TypeVar("Value")
UNCHECKED = (
    "not compared with a uniform scheme of no more bytes: name a text that no score saw with --held-out"
)
PROCESS_BYTES = 450 << 20  # Python, torch and transformers, resident before any tensor
TIMED = 1 << 20
REPEATS = 5
PATIENCE = 1.0  # seconds
STEPS = 17


@dataclass(frozen=True)
class Ask:
    """What may be spent: exactly one of `average_bits`, `size` and `fits` (bytes); `context` and `batch` go with `fits`."""

    average_bits: float | None = None
    size: int | None = None
    fits: int | None = None
    context: int = 2048
    batch: int = 1

    def __post_init__(self) -> None:
        """Refuse none and several. Raises `BudgetError`."""
        if sum(value is not None for value in (self.average_bits, self.size, self.fits)) != 1:
            raise BudgetError(
                "ask for exactly one of --average-bits 3.5, --size 1.2GB and --fits 8GB --context 4096"
            )


@dataclass(frozen=True)
class Candidate:
    """One way to spend the budget: what it takes, and what it is predicted to lose in the units of its losses."""

    name: str
    allocation: Allocation
    bits_per_weight: float
    file_bytes: int
    predicted_loss: float | None


@dataclass(frozen=True)
class Needs:
    """What the run itself will take: resident memory, disk and time."""

    memory_bytes: int
    disk_bytes: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Candidates, the chosen one first; `curve` has (stored bits per weight, predicted loss) by solver, for the picture."""

    budget: str
    losses: Losses
    candidates: tuple[Candidate, ...]
    curve: Mapping[str, tuple[tuple[float, float], ...]]
    needs: Needs
    notes: tuple[str, ...] = ()

    @property
    def chosen(self) -> Candidate:
        """The allocation to write."""
        return self.candidates[0]


@dataclass(frozen=True, eq=False)
class Problem:
    """Everything that decides an allocation but the scores: the model on disk, its units, the levels, the budget.

    `fixed`: linears that an override of the recipe takes out of the budget; `other_bytes` and `other_shapes`: what is written
    beside the units' layers; `shards`: files it would be spread over.
    """

    recipe: Recipe
    source: Source
    weights: Weights
    units: tuple[Unit, ...]
    levels: tuple[Scheme | None, ...]
    budget: Budget
    fixed: Mapping[str, Scheme | None]
    other_bytes: int
    other_shapes: Mapping[str, Sequence[int]]
    shards: int

    def spelled_out(self, allocation: Allocation) -> Allocation:
        """The allocation with the layers that the recipe fixes beside it: every linear of the model is named."""
        schemes = {**self.fixed, **allocation.schemes}
        return replace(allocation, schemes={name: schemes[name] for name in self.weights.layers})


def make_problem(
    recipe: Recipe,
    levels: Sequence[Scheme | None],
    ask: Ask,
    granularity: Granularity = "block",
    fused: bool = False,
    whole: bool = False,
) -> Problem:
    """Read a model's headers and work out how many bits its linears may take.

    Embeddings, head and linears that an override names follow the recipe; all other linears get one of the levels in place of
    its `scheme`. Data-free scores will look at a sample of the rows of large weights, at all of them when `whole`.
    Raises `SourceError`, `BudgetError`, `SchemeError`, `RecipeError` when overrides name every linear.
    """
    for level in levels:
        if level is not None:
            check_datatype(level)
    source = open_source(recipe.model, recipe.revision, recipe.trust_remote_code)
    weights = weights_on_disk(recipe.model, recipe.trust_remote_code, whole)
    named = _overridden(recipe, weights.layers)
    units = _as_run(recipe, weights.units(granularity, fused, named))
    layers = {name for unit in units for name in unit.shapes if name not in unit.shared}
    schedule, shards = _schedule(recipe, source, {name for unit in units for name in unit.shapes})
    items = [item for items in schedule.shards.values() for item in items]
    others = [item for item in items if item.name.removesuffix(".weight") not in layers]
    shapes = {name: shape for item in others for name, shape in _written_shapes(recipe, item, source).items()}
    rest = sum(_written_bytes(recipe, item) for item in others)
    other = rest + _most_header_bytes(units, levels, shapes, schedule.bytes, shards)
    count = sum(unit.weights for unit in units)
    stored = [item.stored for item in others if item.stored is not None]
    fixed_bits = sum(8 * _written_bytes(recipe, item) for item in others if item.stored is not None)
    fixed_weights = sum(math.prod(each.shape) for each in stored)
    if ask.average_bits is not None:
        budget = average_bits(ask.average_bits, count, fixed_bits, fixed_weights)
    elif ask.size is not None:
        budget = file_size(ask.size, count, other)
    else:
        running = running_memory(model_config(source, recipe.trust_remote_code), ask.context, ask.batch)
        budget = device_memory(ask.fits or 0, count, other + running.bytes)
    budget = replace(budget, fixed_bits=fixed_bits, fixed_weights=fixed_weights)
    fixed = {name: schedule.decisions[name].scheme for name in named}
    return Problem(recipe, source, weights, units, tuple(levels), budget, fixed, rest, shapes, shards)


def _overridden(recipe: Recipe, layers: Iterable[str]) -> tuple[str, ...]:
    """The linears that an override names. Raises `RecipeError` when that is all of them."""
    layers = list(layers)
    named = tuple(
        name for name in layers if any(fnmatchcase(name, override.layers) for override in recipe.overrides)
    )
    if layers and len(named) == len(layers):
        raise RecipeError(
            "overrides and --keep name every linear of the model: nothing is left to divide a budget over; take some out, "
            "or leave the budget out"
        )
    return named


def _as_run(recipe: Recipe, units: Iterable[Unit]) -> tuple[Unit, ...]:
    """The units with what a calibrated run adds to their schemes: columns in 16 bits, an axis that it chooses."""
    plan = recipe.calibration
    if plan is None:
        return tuple(units)
    return tuple(replace(unit, outliers=plan.outliers, either_axis=plan.axis != "scheme") for unit in units)


def _fixed_unit(recipe: Recipe, item: Item) -> Unit:
    """A quantized tensor that shares no budget, as a unit; only linears of the blocks have what `_as_run` adds."""
    assert item.layer is not None
    assert item.stored is not None
    unit = Unit(item.layer.name, {item.layer.name: item.stored.shape})
    return _as_run(recipe, [unit])[0] if item.layer.kind == "linear" else unit


def _written_bytes(recipe: Recipe, item: Item) -> int:
    return item.bytes if item.stored is None else _fixed_unit(recipe, item).bits(item.stored.scheme) // 8


def _written_shapes(recipe: Recipe, item: Item, source: Source) -> dict[str, Sequence[int]]:
    """The tensors that an item becomes in the file, by name."""
    if item.stored is None:
        return {item.name: source.tensors[item.origin.name].shape}
    return dict(_stored_shapes(_fixed_unit(recipe, item), item.stored.scheme))


def make_plan(
    problem: Problem,
    scores: str | Scores | Losses = "weight-error",
    solver: Solver = "exact",
    subject: FloatModel | None = None,
    ids: Tensor | None = None,
    curve: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Solve the problem; `scores` is the name of a score, or scores and losses that were made earlier.

    `subject` and `ids` are for scores that read text; `curve` solves for the whole reachable range too.
    Raises `RecipeError`, `BudgetError`, `WeightError`.
    """
    named, losses = _valued(problem, scores, subject, ids, progress)
    chosen = _solve(problem, problem.budget, named, losses, solver)
    found: dict[str, Solution] = {solver: chosen}
    for other in _solvers():
        if other != solver:
            found[other] = _solve(problem, problem.budget, named, losses, other)
    level = best_uniform(problem.units, problem.levels, problem.budget.bits, losses)
    if level is not None:
        found["uniform"] = level
    candidates = tuple(_candidate(problem, name, solution, losses.method) for name, solution in found.items())
    alone = (
        ()
        if "exact" in found
        else ("the exact optimum is not beside it: that needs scipy (fracbit[budget])",)
    )
    notes = (*chosen.notes, *alone, *_left_over(problem, chosen), *sampling_notes(losses.protocol))
    needs = needs_of(problem, candidates[0].allocation)
    figure = problem.budget.figure(problem.budget.bits)
    curves = _curves(problem, named, losses) if curve else {}
    return Plan(figure, losses, candidates, curves, needs, notes)


def check_granularity(name: str) -> Granularity:
    """`name` as a granularity. Raises `RecipeError`."""
    if name in get_args(Granularity):
        return cast(Granularity, name)
    raise RecipeError(f"granularity {name!r} is not known; use block or linear")


def check_solver(name: str) -> Solver:
    """`name` as a solver. Raises `RecipeError`."""
    if name in get_args(Solver):
        return cast(Solver, name)
    raise RecipeError(f"solver {name!r} is not known; use exact or order")


def allocated(recipe: Recipe, allocation: Allocation) -> Recipe:
    """The recipe with the allocation as overrides, one a layer, after those it had: later ones win."""
    mine = tuple(
        Override(layers=name, keep=True) if scheme is None else Override(layers=name, scheme=scheme)
        for name, scheme in allocation.schemes.items()
    )
    return recipe.model_copy(update={"overrides": (*recipe.overrides, *mine)})


def written_bytes(problem: Problem, schemes: Mapping[str, Scheme | None]) -> int:
    """Bytes of the weight files with these schemes: never less than what will be written, and closer than 1 kB a shard."""
    given = [(unit, schemes[next(iter(unit.shapes))]) for unit in problem.units]
    bits = sum(unit.bits(scheme) for unit, scheme in given)
    names = dict(problem.other_shapes)
    for unit, scheme in given:
        names |= _stored_shapes(unit, scheme)
    size = problem.other_bytes + bits // 8
    return size + _header_bytes(names, size, problem.shards)


def _most_header_bytes(
    units: Sequence[Unit],
    levels: Sequence[Scheme | None],
    names: Mapping[str, Sequence[int]],
    size: int,
    shards: int,
) -> int:
    """Bytes of the headers when every layer has every part that some level stores."""
    names = dict(names)
    for unit in units:
        for level in levels:
            names |= _stored_shapes(unit, level)
    return _header_bytes(names, size, shards)


def _stored_shapes(unit: Unit, scheme: Scheme | None) -> dict[str, tuple[int, ...]]:
    """The tensors of a unit in the file, by name, and how the header writes their shapes."""
    names: dict[str, tuple[int, ...]] = {}
    for layer, shape in unit.shapes.items():
        if layer in unit.shared:
            continue
        if scheme is None:
            names[f"{layer}.weight"] = shape
            continue
        kept = outlier_count(shape[1], unit.outliers) if unit.outliers else 0
        for part, (_, size) in part_shapes(scheme, shape, kept).items():
            names[tensor_name(layer, part)] = (math.prod(size),) if part == "codes" else size
    return names


def _header_bytes(names: Mapping[str, Sequence[int]], size: int, shards: int) -> int:
    """Bytes of safetensors headers that list these tensors, every offset as long as the largest."""
    entries = {
        name: {"dtype": "BF16", "shape": list(shape), "data_offsets": [size, size]}
        for name, shape in names.items()
    }
    return len(json.dumps(entries, separators=(",", ":"))) + 64 * shards


def needs_of(problem: Problem, allocation: Allocation) -> Needs:
    """Memory, disk and time of quantizing as planned, without what writing to the disk takes.

    Time: each scheme is timed on a piece of its first layer, as is the hash of what is read, which a second thread makes.
    """
    shapes = {name: shape for unit in problem.units for name, shape in unit.shapes.items()}
    largest = max(out * width for out, width in shapes.values())
    file_bytes = written_bytes(problem, allocation.schemes)
    first = next(iter(shapes))
    piece = _piece(problem.weights, first, shapes[first])
    hashing = _seconds(partial(tensor_hash, piece)) / (piece.numel() * piece.element_size())
    rounding = 0.0
    for scheme in dict.fromkeys(allocation.schemes.values()):
        mine = [name for name, given in allocation.schemes.items() if given == scheme]
        if scheme is not None:
            piece = _piece(problem.weights, mine[0], shapes[mine[0]])
            weights = sum(shapes[name][0] * shapes[name][1] for name in mine)
            fill = partial(RoundToNearest(), piece, scheme, None)
            rounding += _seconds(fill) * weights / piece.numel()
    # A tensor as read, as fp32, its codes before packing and their temporaries; beside them the shard that is being filled.
    memory = PROCESS_BYTES + 16 * largest + min(SHARD_BYTES, file_bytes)
    return Needs(memory, file_bytes, max(rounding, hashing * problem.source.bytes))


def _piece(weights: Weights, name: str, shape: tuple[int, int]) -> Tensor:
    """The first rows of a layer, about `TIMED` weights."""
    return weights.rows(name, (slice(0, min(shape[0], max(1, TIMED // shape[1]))),))


def _seconds(work: Callable[[], object]) -> float:
    """How long something takes when nothing else happens: the least of a few times, of fewer when it takes long."""
    taken: list[float] = []
    while len(taken) < REPEATS and sum(taken) < PATIENCE:
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)


@dataclass(frozen=True)
class Contest:
    """What held-out tokens say: nats per token of the float model, of the searched allocation and of the uniform one."""

    float_nll: float
    searched_nll: float
    uniform_nll: float
    uniform_scheme: str
    uniform_bits_per_weight: float
    tokens: int
    winner: Allocation

    @property
    def kept(self) -> bool:
        """Whether the searched allocation won."""
        return self.searched_nll < self.uniform_nll


def contest(
    subject: FloatModel,
    units: Sequence[Unit],
    allocation: Allocation,
    held_out: Tensor,
    levels: Sequence[Scheme | None],
    budget: int | None = None,
) -> Contest:
    """Measure the allocation and the best uniform scheme of no more bytes; the winner carries a note of what happened.

    `budget`: bits that the uniform scheme may take, those of the allocation when it is not given. Uniform rivals are
    the levels and their kin of every other width, the best by weight error of those that fit.
    Raises `BudgetError` when not even one bit everywhere fits into the allocation's bytes.
    """
    bits = budget or sum(unit.bits(allocation.schemes[next(iter(unit.shapes))]) for unit in units)
    scheme, cost = _best_rival(subject.weights, units, bits, levels)
    base = measure(subject, held_out)
    with replaced(subject, rounded(subject, allocation.schemes)):
        searched = measure(subject, held_out).nll
    names = [name for unit in units for name in unit.shapes]
    with replaced(subject, rounded(subject, dict.fromkeys(names, scheme))):
        plain = measure(subject, held_out).nll
    each = cost / sum(unit.weights for unit in units)
    facts = (
        f"on {base.tokens} held-out tokens: allocated {searched:.4f} nats, uniform {scheme} ({each:.4f} bits per weight) "
        f"{plain:.4f}, float {base.nll:.4f}"
    )
    if searched < plain:
        winner = replace(allocation, notes=(*allocation.notes, facts))
    else:
        note = f"the uniform scheme won and is used: {facts}"
        winner = replace(uniform(names, scheme, allocation.model), notes=(*allocation.notes, note))
    return Contest(base.nll, searched, plain, str(scheme), each, base.tokens, winner)


def _best_rival(
    weights: Weights, units: Sequence[Unit], bits: int, levels: Sequence[Scheme | None]
) -> tuple[Scheme | None, int]:
    rivals = [scheme for scheme in _kin(levels) if sum(unit.bits(scheme) for unit in units) <= bits]
    if not rivals:
        raise BudgetError(
            f"{bits} bits do not hold these layers under any one scheme; offer levels with larger blocks"
        )
    taken = {scheme: sum(unit.bits(scheme) for unit in units) for scheme in rivals}
    # Only those that use what there is: fewer bits of the same kind are never better.
    near = [scheme for scheme in rivals if taken[scheme] >= 0.75 * max(taken.values())]
    errors = make_losses(weights, units, "weight-error", near)
    size = {unit.name: unit.weights for unit in units}
    total = [sum(size[name] * row[i] for name, row in errors.rows.items()) for i in range(len(near))]
    best = near[total.index(min(total))]
    return best, taken[best]


def _kin(levels: Sequence[Scheme | None]) -> list[Scheme | None]:
    """The levels, and each at every other width that its data type has."""
    found: dict[Scheme | None, None] = dict.fromkeys(levels)
    for level in levels:
        for bits in range(1, 9) if level is not None else ():
            assert level is not None
            try:
                check_datatype(level.with_bits(bits))
            except SchemeError:
                continue
            found[level.with_bits(bits)] = None
    return list(found)


def _valued(
    problem: Problem,
    scores: str | Scores | Losses,
    subject: FloatModel | None,
    ids: Tensor | None,
    progress: Progress | None,
) -> tuple[Scores, Losses]:
    """Scores for the order and losses for the optimum, from whatever was given."""
    names = [unit.name for unit in problem.units]
    where = subject or problem.weights
    if isinstance(scores, Losses):
        scores = replace(scores, rows=_without_fixed(problem, scores.rows))
        check_scores(scores, names, problem.weights.model)
        missing = [str(level) for level in problem.levels if level not in scores.schemes]
        if missing:
            raise RecipeError(f"these losses do not cover {', '.join(missing)}; measure them for all levels")
        return _lift(problem, scores), scores
    if isinstance(scores, Scores):
        scores = replace(scores, values=_without_fixed(problem, scores.values))
        check_scores(scores, names, problem.weights.model)
        errors = make_losses(
            problem.weights, problem.units, "weight-error", problem.levels, progress=progress
        )
        return scores, predict_losses(scores, errors)
    losses = make_losses(where, problem.units, scores, problem.levels, ids, problem.recipe.seed, progress)
    if losses.method == scores:
        return _lift(problem, losses), losses
    return make_scores(where, problem.units, scores, None, ids, problem.recipe.seed, progress), losses


def _without_fixed(problem: Problem, values: Mapping[str, Value]) -> dict[str, Value]:
    """Values of units; those of linears, and of whole blocks of them, that the recipe fixes are not needed."""
    units = {unit.name for unit in problem.units}
    gone = set(problem.fixed) | {
        name for name in values if any(fixed.startswith(f"{name}.") for fixed in problem.fixed)
    }
    return {name: value for name, value in values.items() if name in units or name not in gone}


def _lift(problem: Problem, losses: Losses) -> Scores:
    """What lifting a unit from the cheapest level to the dearest is worth, per bit it costs."""
    costs = cost_table(problem.units, problem.levels)
    total = [sum(cost[i] for cost in costs) for i in range(len(problem.levels))]
    low, high = total.index(min(total)), total.index(max(total))
    column = [losses.schemes.index(problem.levels[i]) for i in (low, high)]
    worth = losses.scores(*column)
    price = {
        unit.name: max(1, cost[high] - cost[low]) for unit, cost in zip(problem.units, costs, strict=True)
    }
    return replace(worth, values={name: value / price[name] for name, value in worth.values.items()})


def _solvers() -> tuple[Solver, ...]:
    """Those that can run here: the exact one needs scipy, an extra."""
    return ("exact", "order") if find_spec("scipy") else ("order",)


def _solve(problem: Problem, budget: Budget, scores: Scores, losses: Losses, solver: Solver) -> Solution:
    if solver == "exact":
        return exact(problem.units, problem.levels, budget, losses)
    return by_order(problem.units, problem.levels, budget, scores, losses)


def _candidate(problem: Problem, name: str, solution: Solution, method: str) -> Candidate:
    allocation = solution.allocation(
        problem.units, problem.levels, problem.weights.model, solver=name, score=method,
        budget=problem.budget.figure(problem.budget.bits),
    )  # fmt: skip
    size = written_bytes(problem, allocation.schemes)
    loss = None if solution.loss != solution.loss else solution.loss
    return Candidate(name, allocation, problem.budget.per_weight(solution.bits), size, loss)


def _left_over(problem: Problem, solution: Solution) -> tuple[str, ...]:
    left = problem.budget.bits - solution.bits
    if left < 0.02 * problem.budget.bits:
        return ()
    taken = {unit.name: solution.picks[unit.name] for unit in problem.units}
    costs = cost_table(problem.units, problem.levels)
    steps = [
        price - cost[taken[unit.name]]
        for unit, cost in zip(problem.units, costs, strict=True)
        for price in cost
        if price > cost[taken[unit.name]]
    ]
    why = "nothing it could buy is expected to help" if steps else "every layer has the dearest level"
    if steps and min(steps) > left:
        why = "the smallest step that is left to take costs more"
    return (f"{100 * left / problem.budget.bits:.1f} % of the budget is left: {why}",)


def _curves(problem: Problem, scores: Scores, losses: Losses) -> dict[str, tuple[tuple[float, float], ...]]:
    """Predicted loss over the whole reachable range, by both solvers, and the uniform schemes as points."""
    costs = cost_table(problem.units, problem.levels)
    least, most = sum(map(min, costs)), sum(map(max, costs))
    budgets = [
        replace(problem.budget, bits=least + (most - least) * i // (STEPS - 1), question="average bits")
        for i in range(STEPS)
    ]
    curves: dict[str, tuple[tuple[float, float], ...]] = {}
    for solver in _solvers():
        solved = [_solve(problem, budget, scores, losses, solver) for budget in budgets]
        curves[solver] = tuple((problem.budget.per_weight(s.bits), s.loss) for s in solved)
    points = []
    for i, level in enumerate(problem.levels):
        column = losses.schemes.index(level)
        total = sum(cost[i] for cost in costs)
        points.append((problem.budget.per_weight(total), sum(row[column] for row in losses.rows.values())))
    curves["uniform"] = tuple(sorted(points))
    return curves


def _schedule(recipe: Recipe, source: Source, layers: Iterable[str]) -> tuple[Schedule, int]:
    """What will be written, as if the budget's `layers` stayed float, and over how many files.

    A calibrated run writes a file for each block and one for the rest; a rotation makes two matrices of a tied head and table.
    """
    floats = allocated(recipe, Allocation(dict.fromkeys(layers)))
    config = model_config(source, recipe.trust_remote_code)
    untied = recipe.calibration is not None and untie(config, recipe.calibration.transforms)
    shell = skeleton(config, trust_remote_code=recipe.trust_remote_code)
    schedule = make_schedule(floats, source, shell, untied=untied)
    if recipe.calibration is None:
        return schedule, len(schedule.shards)
    return schedule, 1 + len(list(blocks(shell, family_of(shell))))
