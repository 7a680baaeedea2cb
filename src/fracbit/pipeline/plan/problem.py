"""The question of a plan: the units of a model, the levels that each may get, and the bits of the budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from fracbit.checkpoint.opened import Opened
from fracbit.errors import BudgetError, RecipeError
from fracbit.importance import Budget, Unit, average_bits, cost_table, device_memory, file_size
from fracbit.numerics.datatypes import check_datatype
from fracbit.pipeline.plan.about import EIGHT, SIXTEEN
from fracbit.pipeline.plan.memory import RunningMemory, running_memory
from fracbit.pipeline.plan.written import Rest, as_run, most_bytes_beside, rest_of, written_bytes
from fracbit.pipeline.study.weights import Weights, weights_on_disk
from fracbit.records.allocation import Allocation
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import Scheme
from fracbit.records.sizes import print_size
from fracbit.records.spending import ONE_BUDGET, Spending

SHORT = 256  # tokens of the context that is offered where memory is too little


@dataclass(frozen=True, eq=False)
class Problem:
    """Everything that decides an allocation, except the scores.

    `weights`: the model's linears on disk; `units` share the `budget`, and each gets one of the `levels`; `fixed`:
    linears whose scheme an override of the recipe sets; `rest`: what is written besides the units.
    """

    recipe: Recipe
    opened: Opened = field(repr=False)
    weights: Weights = field(repr=False)
    units: tuple[Unit, ...] = field(repr=False)
    levels: tuple[Scheme | None, ...]
    budget: Budget
    fixed: Mapping[str, Scheme | None] = field(repr=False)
    rest: Rest = field(repr=False)

    def spelled_out(self, allocation: Allocation) -> Allocation:
        """The allocation with the layers that the recipe fixes: it names every linear of the model."""
        schemes = {**self.fixed, **allocation.schemes}
        return replace(allocation, schemes={name: schemes[name] for name in self.weights.layers})

    def bits(self, schemes: Mapping[str, Scheme | None]) -> int:
        """Stored bits of the units when their layers get these schemes."""
        return sum(unit.bits(schemes[next(iter(unit.shapes))]) for unit in self.units)

    def file_bytes(self, schemes: Mapping[str, Scheme | None]) -> int:
        """Bytes of the weight files when the units' layers get these schemes; a little more than what will be written."""
        return written_bytes(self.units, self.rest, schemes)


def make_problem(
    recipe: Recipe,
    opened: Opened,
    spending: Spending,
    whole: bool = False,
    *,
    some: Mapping[str, frozenset[Scheme | None]] | None = None,
) -> Problem:
    """Work out from a model's headers how many bits its linears may take.

    `opened`: the recipe's model. Embeddings, head and linears that an override names follow the recipe; all other linears get
    one of the levels in place of its `scheme`. Data-free scores will read a sample of the rows of large weights, or all
    rows with `whole`. `some`: the levels that single linears may have, where not all may have all.
    Raises `SourceError`, `BudgetError`, `SchemeError`, `RecipeError` when overrides name every linear.
    """
    levels = spending.schemes
    for level in levels:
        if level is not None:
            check_datatype(level)
    weights = weights_on_disk(opened, whole)
    named = _overridden(recipe, weights.layers)
    units = as_run(recipe, weights.units(spending.granularity, spending.fused, named))
    units = units if not some else tuple(replace(unit, levels=_common(unit, some)) for unit in units)
    rest = rest_of(recipe, opened, units)
    beside = most_bytes_beside(units, rest, levels)
    budget = _budget(spending, opened, units, rest, beside=beside)
    fixed = {name: rest.schemes[name] for name in named}
    return Problem(recipe, opened, weights, units=units, levels=levels, budget=budget, fixed=fixed, rest=rest)


def _common(unit: Unit, some: Mapping[str, frozenset[Scheme | None]]) -> frozenset[Scheme | None]:
    """The levels that all linears of a unit may have."""
    return frozenset.intersection(*(some[name] for name in unit.shapes))


def _overridden(recipe: Recipe, layers: Iterable[str]) -> tuple[str, ...]:
    """The linears that an override names. Raises `RecipeError` when that is all of them."""
    layers = list(layers)
    named = tuple(
        name for name in layers if any(fnmatchcase(name, override.layers) for override in recipe.overrides)
    )
    if layers and len(named) == len(layers):
        raise RecipeError(
            "overrides and --keep name every linear of the model, so no layer is left to share the budget; "
            "remove some, or leave the budget out"
        )
    return named


def _check_fits(
    fits: int,
    spending: Spending,
    opened: Opened,
    *,
    units: Iterable[Unit],
    rest: Rest,
    beside: int,
    running: RunningMemory,
) -> None:
    """Refuse a memory that holds the model at no level: with the least that would do, its parts, and how to need less.

    Raises `BudgetError`.
    """
    least = -(-sum(min(cost.values(), default=0) for cost in cost_table(list(units), spending.schemes)) // 8)
    need = least + beside + running.bytes
    if fits >= need:
        return
    parts = (
        f"{print_size(least)} for the layers at the smallest level, {print_size(beside)} for what stays as it is, "
        f"{print_size(running.cache)} for the KV cache of {spending.context} tokens, {print_size(running.activations)} for "
        "activations"
    )
    ways = dict(_ways(spending, opened, rest, running))
    left = need - sum(ways.values())
    enough = "" if left <= fits else f"; even so it takes {print_size(left)}"
    savings = "; ".join(f"{how} saves about {print_size(size)}" for how, size in ways.items())
    raise BudgetError(
        f"{print_size(fits)} is too little: this model takes at least {print_size(need)}: {parts}; {savings}{enough}"
    )


def _ways(
    spending: Spending, opened: Opened, rest: Rest, running: RunningMemory
) -> Iterator[tuple[str, int]]:
    """Settings that need less memory, with the bytes that each saves."""
    embeddings = (
        one
        for name, one in opened.layers.items()
        if one.kind == "embedding" and rest.schemes.get(name) is None
    )
    tables = sum(one.out * one.width for one in embeddings)
    if tables:
        yield "--set embeddings=int8/64", int((SIXTEEN - EIGHT) * tables)
    if spending.context > SHORT:
        shorter = running_memory(opened.model.config, SHORT, spending.batch)
        yield f"--set spending.context={SHORT}", running.bytes - shorter.bytes


def _budget(spending: Spending, opened: Opened, units: Iterable[Unit], rest: Rest, beside: int) -> Budget:
    """The bits of the units, from the requested budget; `beside`: bytes of the files besides the units."""
    count = sum(unit.weights for unit in units)
    size, fits = spending.size_bytes, spending.fits_bytes
    if spending.average_bits is not None:
        budget = average_bits(
            spending.average_bits, count, fixed_bits=rest.quantized_bits, fixed_weights=rest.quantized_weights
        )
    elif size is not None:
        budget = file_size(size, count, beside)
    elif fits is not None:
        running = running_memory(opened.model.config, spending.context, spending.batch)
        _check_fits(fits, spending, opened, units=units, rest=rest, beside=beside, running=running)
        budget = device_memory(fits, count, beside + running.bytes)
    else:
        raise BudgetError(ONE_BUDGET)
    return replace(budget, fixed_bits=rest.quantized_bits, fixed_weights=rest.quantized_weights)
