"""Presets: the settings with the least measured loss, as a recipe and a budget; bench/quality has the figures.

`best`: learned tables of 2^k values (kmeans, one per tensor) over blocks of 32 to 128 with 8-bit scales. The exact
solver chooses k and block of every linear within the budget. Codes are chosen by GPTQ with coordinate descent and
closed-form refits. Then codes, scales, tables and norms are distilled from the float model.
"""

from __future__ import annotations

from fracbit.errors import RecipeError
from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import Scheme
from fracbit.records.spending import Spending

BLOCKS = (32, 48, 64, 128)
SCALES = "int8:256"
EPOCHS = 8
RATE = 5e-3  # at 2 bits


def preset(recipe: Recipe, spending: Spending) -> tuple[Recipe, Spending]:
    """The recipe with the preset's settings, and the budget with its levels; the recipe's own calibration wins.

    Raises `RecipeError` without calibration texts or a budget.
    """
    if recipe.calibration is None:
        raise RecipeError(
            f"preset {spending.preset} needs calibration text; pass --calibration FILE, or --calibration generated"
        )
    average = spending.average_bits
    if average is None:
        raise RecipeError("a preset needs a budget: give --average-bits, such as 3.25")
    # Latent weights are in units of the block scale, and the values of a table are closer with every bit.
    rate = RATE * 2.0 ** (2 - int(average))
    given = recipe.calibration.model_dump(exclude_unset=True)
    calibration = Calibration(**({"distill": EPOCHS, "rate": rate, "dtype": "float32"} | given))
    settings = {"quantizer": "descent", "search": True, "calibration": calibration}
    return recipe.model_copy(update=settings), Spending(average_bits=average, levels=levels(average))


def levels(average_bits: float) -> tuple[Scheme, ...]:
    """Schemes around a budget: its whole bits, one bit less and one bit more, at every block size."""
    width = min(max(int(average_bits), 1), 8)
    widths = [k for k in (width - 1, width, width + 1) if 1 <= k <= 8]
    return tuple(Scheme("kmeans", k, block, scale=SCALES) for k in widths for block in BLOCKS)
