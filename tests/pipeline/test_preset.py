"""The preset spends what it may and no more, and says what it needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from fracbit.errors import BudgetError, RecipeError
from fracbit.pipeline.plan.presets import preset
from fracbit.pipeline.quantize.calibrated import run_calibrated
from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Recipe

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def test_best_keeps_to_the_budget(tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "float")
    np.random.default_rng(0).integers(3, 96, 16 * 24, dtype=np.uint16).tofile(tmp_path / "ids.u16")
    plan = Calibration(texts=(f"{tmp_path / 'ids.u16'}?length=24",), samples=16, length=24, distill=0)
    recipe = Recipe(model=str(tmp_path / "float"), calibration=plan)
    asked = preset("best", recipe, 3.0)
    assert asked.quantizer == "descent"
    assert 2.7 < (run_calibrated(asked, tmp_path / "q").bits_per_weight or 0) <= 3.0
    with pytest.raises(RecipeError, match="--calibration"):
        preset("best", Recipe(model=str(tmp_path / "float")), 3.0)
    with pytest.raises(RecipeError, match="did you mean 'best'"):
        preset("fast", recipe, 3.0)
    with pytest.raises(BudgetError):
        preset("best", recipe, 0.4)
