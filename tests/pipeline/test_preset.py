"""The preset spends what it may and no more, and says what it needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fracbit.errors import BudgetError, RecipeError
from fracbit.pipeline.plan.budget import budgeted
from fracbit.pipeline.plan.plan import open_for, plan
from fracbit.pipeline.quantize.run import write_checkpoint
from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Recipe
from fracbit.records.spending import Spending
from texts import write_ids

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def test_best_keeps_to_the_budget(tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "float")
    text = write_ids(tmp_path / "ids.u16", 16, 24)
    calibration = Calibration(texts=(text,), samples=16, length=24, distill=0)
    recipe = Recipe(model=str(tmp_path / "float"), calibration=calibration)
    best = Spending(preset="best", average_bits=3.0)
    divided = budgeted(recipe, best, open_for(recipe))
    asked, notes = divided.recipe, divided.notes
    assert asked.quantizer == "descent"
    assert notes[-1].endswith("divided by the solver exact")
    assert not [note for note in notes if "--held-out" in note]  # which a preset does not take
    assert 2.7 < (write_checkpoint(asked, tmp_path / "q").bits_per_weight or 0) <= 3.0
    with pytest.raises(RecipeError, match="--calibration"):
        plan(tmp_path / "float", best)
    with pytest.raises(BudgetError):
        plan(recipe, Spending(preset="best", average_bits=0.4))
