"""A budget in a quantizing run: a preset, or levels divided by the exact solver, turned into the overrides of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from fracbit.errors import BudgetError, RecipeError
from fracbit.importance import read_size, score_method
from fracbit.pipeline.plan.presets import preset
from fracbit.pipeline.plan.problem import (
    UNCHECKED,
    Ask,
    allocated,
    check_granularity,
    check_solver,
    contest,
    make_plan,
    make_problem,
)
from fracbit.pipeline.study.float_model import load_float, weights_on_disk
from fracbit.pipeline.study.texts import overlap_of, samples_of, seen_notes
from fracbit.records.allocation import check_allocation, load_allocation, read_levels
from fracbit.records.progress import Progress
from fracbit.records.recipe import Recipe
from fracbit.records.scores import Losses, Scores, load_scores

LEVELS = "int4z/64,int3z/64,int2z/64"


@dataclass(frozen=True)
class Spending:
    """What a run may spend, as it is written on the command line; everything None or empty asks for nothing.

    `score`: the name of a data-free score, or a JSON file of scores or losses.
    """

    preset: str | None = None
    average_bits: float | None = None
    size: str | None = None
    fits: str | None = None
    context: int = 2048
    levels: str | None = None
    score: str = "weight-error"
    held_out: str | None = None
    granularity: str = "linear"
    fused: bool = False
    batch: int = 1
    solver: str = "exact"

    @property
    def asked(self) -> bool:
        """Whether there is a budget at all."""
        return any(value is not None for value in (self.preset, self.average_bits, self.size, self.fits))


def named_scores(score: str) -> str | Scores | Losses:
    """What `--score` names: a method of the table, or the scores or losses of a JSON file. Raises `FormatError`."""
    return load_scores(Path(score)) if Path(score).suffix == ".json" else score


def planned(recipe: Recipe, path: Path) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with the schemes of an allocation that `fracbit plan -o` wrote, and its notes; the recipe's own overrides win.

    Raises `FormatError`, `RecipeError` for an allocation of another model, or a scheme beside it.
    """
    if "scheme" in recipe.model_fields_set:
        raise RecipeError(
            f"{path} names the scheme of every linear, so another has nowhere to go; edit the file, or give --keep, --head or "
            "--embeddings, which hold beside it"
        )
    allocation = load_allocation(path)
    weights = weights_on_disk(recipe.model, recipe.trust_remote_code)
    check_allocation(allocation, list(weights.layers), weights.model)
    first = allocated(recipe.model_copy(update={"overrides": ()}), allocation)
    return recipe.model_copy(update={"overrides": (*first.overrides, *recipe.overrides)}), allocation.notes


def budgeted(
    recipe: Recipe, spending: Spending, progress: Progress | None = None
) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with a scheme for every layer that the budget buys, and notes; its own overrides hold, within the budget.

    With `held_out`, the allocation is measured against the best uniform scheme of no more bytes, which is taken when it
    wins. Raises `BudgetError` (with the reachable range), `RecipeError`, `SourceError`, `DataError`.
    """
    if not spending.asked:
        if spending != Spending():
            raise BudgetError(
                "--levels, --score, --solver, --granularity, --fused, --held-out, --context and --batch go with a budget: "
                "--average-bits, --size or --fits"
            )
        return recipe, ()
    if "scheme" in recipe.model_fields_set:
        raise RecipeError(
            f"a budget chooses every layer's scheme among --levels {spending.levels or LEVELS}: leave out --dtype, --bits, "
            "--block, --axis, --offset, --scale and the recipe's [scheme]; [[overrides]] and --keep hold beside it"
        )
    if spending.preset is not None:
        if spending.average_bits is None:
            raise RecipeError("a preset needs its budget: give --average-bits, such as 3.25")
        if replace(spending, preset=None, average_bits=None) != Spending():
            raise RecipeError(
                f"preset {spending.preset} chooses for itself: beside --average-bits no --size, --fits, --levels, --score, "
                "--solver, --granularity, --fused or --held-out goes with it"
            )
        return preset(spending.preset, recipe, spending.average_bits), ()
    ask = Ask(
        spending.average_bits,
        read_size(spending.size) if spending.size else None,
        read_size(spending.fits) if spending.fits else None,
        spending.context,
        spending.batch,
    )
    granularity = check_granularity(spending.granularity)
    scores = named_scores(spending.score)
    if isinstance(scores, str) and not score_method(scores).data_free:
        raise RecipeError(
            f"score {scores!r} reads text; measure it first: fracbit score {recipe.model} --method {scores} --text TEXT "
            f"--granularity {granularity} --levels {spending.levels or LEVELS} -o losses.json, then --score losses.json"
        )
    problem = make_problem(recipe, read_levels(spending.levels or LEVELS), ask, granularity, spending.fused)
    plan = make_plan(problem, scores, check_solver(spending.solver), progress=progress)
    notes = (*plan.notes, f"{plan.chosen.bits_per_weight:.4f} bits per weight divided by {plan.chosen.name}")
    if spending.held_out is None:
        return allocated(recipe, plan.chosen.allocation), (*notes, UNCHECKED)
    subject = load_float(recipe.model)
    unseen = samples_of(spending.held_out, recipe.model, subject, seed=recipe.seed)
    measured = contest(
        subject, problem.units, plan.chosen.allocation, unseen, problem.levels, problem.budget.bits
    )
    texts = () if recipe.calibration is None else recipe.calibration.texts
    shared = overlap_of(spending.held_out, texts, recipe.model, subject) if texts else ()
    shared += seen_notes(spending.held_out, plan.losses.protocol.get("text"), recipe.model, subject)
    return allocated(recipe, measured.winner), (*notes, *measured.winner.notes, *shared)
