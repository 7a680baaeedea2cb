"""About how many bits a weight a budget leaves: enough to choose widths around it. The budget itself is in problem.py."""

from __future__ import annotations

import math

from fracbit.checkpoint.opened import Opened
from fracbit.pipeline.plan.memory import running_memory
from fracbit.records.recipe import Recipe
from fracbit.records.spending import Spending

SIXTEEN, EIGHT = 2.0, 8.5 / 8  # bytes of a weight that stays float, and of one in a quantized embedding table


def bits_about(
    spending: Spending, recipe: Recipe, opened: Opened, *, embeddings: bool = False
) -> float | None:
    """Bits of each weight of the linears, from average bits, a size or a memory; None without a budget.

    `embeddings`: whether tables are quantized though the recipe does not say so. Raises `BudgetError`.
    """
    if spending.average_bits is not None or not spending.asked:
        return spending.average_bits
    room = spending.size_bytes
    if room is None:
        assert spending.fits_bytes is not None
        room = (
            spending.fits_bytes - running_memory(opened.model.config, spending.context, spending.batch).bytes
        )
    tables = sum(one.out * one.width for one in opened.layers.values() if one.kind == "embedding")
    every = sum(math.prod(tensor.shape) for tensor in opened.model.parameters())
    each = EIGHT if embeddings or recipe.embeddings is not None else SIXTEEN
    beside = each * tables + SIXTEEN * max(0, every - tables - opened.weights)
    return 8 * (room - beside) / opened.weights
