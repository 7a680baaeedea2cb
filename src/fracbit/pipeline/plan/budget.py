"""A budget in a quantizing run: it gives every layer a scheme, as overrides of the recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fracbit.checkpoint.opened import Opened
from fracbit.data import Samples
from fracbit.errors import RecipeError
from fracbit.pipeline.plan.plan import make_plan
from fracbit.pipeline.plan.presets import preset
from fracbit.pipeline.plan.target import for_engine
from fracbit.pipeline.study.weights import weights_on_disk
from fracbit.records.allocation import allocated, check_allocation, load_allocation
from fracbit.records.progress import Progress
from fracbit.records.recipe import Recipe
from fracbit.records.resources import Needs
from fracbit.records.spending import Spending


@dataclass(frozen=True, eq=False)
class Divided:
    """A recipe with a scheme for every layer, notes, and the samples of its calibration if a score has read them.

    `needs`: what the run will take, if a plan has measured it.
    """

    recipe: Recipe
    notes: tuple[str, ...] = ()
    samples: Samples | None = None
    needs: Needs | str = ""


def budgeted(
    recipe: Recipe,
    spending: Spending,
    opened: Opened,
    device: str = "cpu",
    *,
    measured: bool = False,
    progress: Progress | None = None,
) -> Divided:
    """The recipe with a scheme for every layer within the budget. The recipe's own overrides still apply.

    `opened`: the recipe's model (`open_for`); `device`: of the run; `measured`: whether a plan tries what that will take.
    Without a budget, the recipe is returned unchanged. With
    `held_out`, the allocation is compared with the best uniform scheme of no more bytes, and the better one is used.
    Raises `BudgetError` (with the reachable range), `RecipeError`, `SourceError`, `DataError`.
    """
    if spending == Spending():
        return Divided(recipe)
    if not spending.asked:
        own, terms = recipe, spending
        if spending.preset is not None:
            recipe, terms = preset(recipe, spending, opened.weights)
        made = for_engine(recipe, terms, opened, own=own)
        return Divided(made.recipe, made.notes)
    found = make_plan(recipe, spending, opened, device=device, measured=measured, progress=progress)
    how = f"divided by the solver {found.chosen.name}"
    if found.contest is not None and not found.contest.searched_won:
        how = "the same scheme for every layer"
    return Divided(found.recipe, (*found.notes, f"{found.reached}, {how}"), found.samples, found.needs)


def planned(recipe: Recipe, path: Path, opened: Opened) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with the schemes of an allocation that `fracbit plan -o` wrote, and its notes; the recipe's own overrides win.

    Raises `FormatError`, `RecipeError` for an allocation of another model, or if the recipe has a scheme too.
    """
    if "scheme" in recipe.model_fields_set:
        raise RecipeError(
            f"{path} names the scheme of every linear, so --scheme cannot be used; edit the file instead. --keep, "
            "--set head=... and --set embeddings=... still apply"
        )
    allocation = load_allocation(path)
    weights = weights_on_disk(opened)
    check_allocation(allocation, list(weights.layers), weights.fingerprint)
    first = allocated(recipe.model_copy(update={"overrides": ()}), allocation)
    return recipe.model_copy(update={"overrides": (*first.overrides, *recipe.overrides)}), allocation.notes
