"""A budget in a quantizing run: the scheme that it buys every layer, as overrides of the recipe."""

from __future__ import annotations

from pathlib import Path

from fracbit.checkpoint.opened import Opened
from fracbit.errors import RecipeError
from fracbit.pipeline.plan.plan import make_plan
from fracbit.pipeline.study.weights import weights_on_disk
from fracbit.records.allocation import allocated, check_allocation, load_allocation
from fracbit.records.progress import Progress
from fracbit.records.recipe import Recipe
from fracbit.records.spending import Spending


def budgeted(
    recipe: Recipe, spending: Spending, opened: Opened, progress: Progress | None = None
) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with a scheme for every layer that the budget buys, and notes; its own overrides hold, within the budget.

    `opened`: the recipe's model (`plan.open_for`). Without a budget the recipe comes back as it is. With `held_out`, the
    allocation is measured against the best uniform scheme of no more bytes, which is taken when it wins.
    Raises `BudgetError` (with the reachable range), `RecipeError`, `SourceError`, `DataError`.
    """
    if spending == Spending():
        return recipe, ()
    if "scheme" in recipe.model_fields_set:
        raise RecipeError(
            "a budget chooses every layer's scheme among spending.levels: leave out --scheme and the recipe's [scheme]; "
            "[[overrides]] and --keep hold beside it"
        )
    found = make_plan(recipe, spending, opened, progress=progress)
    divided = f"{found.chosen.bits_per_weight:.4f} bits per weight divided by {found.chosen.name}"
    return allocated(found.problem.recipe, found.allocation), (*found.notes, divided)


def planned(recipe: Recipe, path: Path, opened: Opened) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with the schemes of an allocation that `fracbit plan -o` wrote, and its notes; the recipe's own overrides win.

    Raises `FormatError`, `RecipeError` for an allocation of another model, or a scheme beside it.
    """
    if "scheme" in recipe.model_fields_set:
        raise RecipeError(
            f"{path} names the scheme of every linear, so another cannot be used; edit the file, or give --keep, or "
            "--set head=... or embeddings=..., which hold beside it"
        )
    allocation = load_allocation(path)
    weights = weights_on_disk(opened)
    check_allocation(allocation, list(weights.layers), weights.fingerprint)
    first = allocated(recipe.model_copy(update={"overrides": ()}), allocation)
    return recipe.model_copy(update={"overrides": (*first.overrides, *recipe.overrides)}), allocation.notes
