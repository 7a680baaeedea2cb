"""Presets: the combination that was measured to lose least, as a recipe; bench/quality says by how much.

`best`: learned tables of 2^k values (kmeans, one per tensor) over blocks of 32 to 128 with 8-bit scales, k and block of every
linear chosen by the exact solver under the budget; GPTQ with coordinate descent and closed-form refits; then distillation of
codes, scales, tables and norms from the float model.
"""

from __future__ import annotations

from fracbit.errors import RecipeError, near_matches
from fracbit.pipeline.plan.problem import Ask, allocated, make_plan, make_problem
from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import Scheme

PRESETS = ("best",)
BLOCKS = (32, 48, 64, 128)
SCALES = "int8:256"
EPOCHS = 8
RATE = 5e-3  # at 2 bits


def preset(name: str, recipe: Recipe, average_bits: float) -> Recipe:
    """The `recipe` with the preset's schemes at `average_bits` stored bits per weight; its own calibration settings win.

    Raises `RecipeError` for an unknown preset or without calibration texts, `BudgetError` for bits out of reach.
    """
    if name not in PRESETS:
        raise RecipeError(f"unknown preset {name!r}; {near_matches(name, PRESETS)}")
    if recipe.calibration is None:
        raise RecipeError(
            "preset best fits to data; name texts with --calibration FILE, or --calibration generated"
        )
    problem = make_problem(recipe, levels(average_bits), Ask(average_bits=average_bits), "linear")
    plan = make_plan(problem)
    given = recipe.calibration.model_dump(exclude_unset=True)
    rate = RATE * 2.0 ** (
        2 - int(average_bits)
    )  # latent weights count in block scales: values lie closer with every bit
    calibration = Calibration(**({"distill": EPOCHS, "rate": rate, "dtype": "float32"} | given))
    settings = {"quantizer": "descent", "search": True, "calibration": calibration}
    return allocated(recipe.model_copy(update=settings), plan.chosen.allocation)


def levels(average_bits: float) -> tuple[Scheme, ...]:
    """Schemes around a budget: the width below it, one less and one more, at every block."""
    width = min(max(int(average_bits), 1), 8)
    widths = [k for k in (width - 1, width, width + 1) if 1 <= k <= 8]
    return tuple(Scheme("kmeans", k, block, scale=SCALES) for k in widths for block in BLOCKS)
