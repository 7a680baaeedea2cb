"""The preset spends what it may and no more, and says what it needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fracbit.errors import BudgetError, RecipeError
from fracbit.pipeline.plan.about import bits_about
from fracbit.pipeline.plan.budget import budgeted
from fracbit.pipeline.plan.memory import running_memory
from fracbit.pipeline.plan.plan import open_for, plan
from fracbit.pipeline.plan.presets import SMALL, preset
from fracbit.pipeline.quantize.run import write_checkpoint
from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import Scheme
from fracbit.records.spending import PRESETS, SAMPLES, Spending
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


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("average", [None, 3.25])
def test_every_preset_works_with_and_without_a_budget(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path, name: str, average: float | None
) -> None:
    tiny_llama().save_pretrained(tmp_path / "float")
    text = write_ids(tmp_path / "ids.u16", 16, 24)
    calibration = Calibration(texts=(text,), samples=16, length=24)
    recipe = Recipe(model=str(tmp_path / "float"), calibration=None if name == "fast" else calibration)
    terms = Spending(preset=name, average_bits=average)
    asked = budgeted(recipe, terms, open_for(recipe)).recipe
    quick = None if asked.calibration is None else asked.calibration.model_copy(update={"distill": 0})
    made = write_checkpoint(asked.model_copy(update={"calibration": quick}), tmp_path / "q")
    assert made.bits_per_weight is not None
    assert (0.85 * average if average else 4.1) < made.bits_per_weight <= (average or 4.6)
    if average is None:
        with pytest.raises(BudgetError, match="divides a budget"):
            plan(recipe, terms)


@pytest.mark.parametrize("name", ["fast", "best"])
@pytest.mark.parametrize("limit", ["size", "fits"])
def test_a_preset_keeps_to_a_size_or_a_memory(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path, name: str, limit: str
) -> None:
    """With widths around what is left for the linears."""
    tiny_llama(hidden_size=128, intermediate_size=384, num_attention_heads=4, head_dim=32).save_pretrained(
        tmp_path / "float"
    )
    text = write_ids(tmp_path / "ids.u16", 16, 24)
    calibration = None if name == "fast" else Calibration(texts=(text,), samples=16, length=24, distill=0)
    recipe = Recipe(model=str(tmp_path / "float"), calibration=calibration)
    opened = open_for(recipe)
    even = write_checkpoint(
        recipe.model_copy(update={"scheme": Scheme("int", 4, 32, offset="zero")}), tmp_path / "even"
    )
    beside = 0 if limit == "size" else running_memory(opened.model.config, 64).bytes
    terms = Spending(preset=name, context=64, **{limit: str(even.bytes + beside)})  # type: ignore[arg-type]
    about = bits_about(terms, recipe, opened)
    assert about is not None
    assert abs(about - 4.5) < 1
    asked = budgeted(recipe, terms, opened).recipe
    made = write_checkpoint(asked, tmp_path / "q")
    assert 0.9 * even.bytes < made.bytes <= even.bytes
    with pytest.raises(BudgetError, match="exactly one"):
        Spending(preset=name, size="1MB", average_bits=3)


WEIGHED = {"weigh": "loss"}
MIXED = {"builtin": 0.125}
SETTINGS: dict[tuple[str, int, float | None], tuple[str, bool, dict[str, object]]] = {
    ("fast", SMALL + 1, None): ("rtn", False, {}),
    ("fast", SMALL + 1, 3.25): ("rtn", False, {}),
    ("good", SMALL, None): ("gptq", True, WEIGHED),
    ("good", SMALL + 1, 3.0): ("gptq", True, WEIGHED | MIXED),
    ("good", SMALL + 1, 2.9): ("gptq", True, MIXED),
    ("best", SMALL + 1, None): ("gptq", True, {"tweak": "train"} | MIXED),
    ("best", SMALL + 1, 2.5): ("gptq", True, {"tweak": "train"} | MIXED),
    ("best", SMALL, None): ("descent", True, {"distill": 8, "rate": 5e-3 / 4, "dtype": "float32"}),
    ("best", SMALL, 3.9): ("descent", True, {"distill": 8, "rate": 5e-3 / 2, "dtype": "float32"}),
}
"""(preset, weights, average bits) -> quantizer, search, and what its calibration says."""


@pytest.mark.parametrize(("name", "weights", "average"), SETTINGS)
def test_settings_of_presets(name: str, weights: int, average: float | None) -> None:
    quantizer, search, calibration = SETTINGS[name, weights, average]
    texts = Calibration(texts=("t",))
    spending = Spending(preset=name, average_bits=average)
    found, terms = preset(Recipe(model="m", calibration=texts), spending, weights)
    assert (found.quantizer, found.search) == (quantizer, search)
    assert found.calibration == texts.model_copy(update=calibration)
    tables = name == "best" and weights <= SMALL
    if average is None:
        fine = Scheme("int", 4, 32, offset="float", scale="int4:256")
        assert found.scheme == (Scheme("kmeans", 4, 64, scale="int8:256") if tables else fine)
        assert not terms.asked
    else:
        assert terms.average_bits == average
        guided = name == "good" or (name == "best" and weights > SMALL)
        assert (terms.score, terms.samples) == (("guided-error", 16) if guided else ("weight-error", SAMPLES))
        assert {level.dtype for level in terms.schemes if level} == {"kmeans" if tables else "int"}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_keep_to_grids_of_engines(name: str) -> None:
    recipe = Recipe(model="m", calibration=Calibration(texts=("t",)))
    alone, terms = preset(recipe, Spending(preset=name, engine="vllm"), SMALL + 1)
    assert alone.scheme == Scheme("int", 4, 64, offset="zero")
    assert terms == Spending(engine="vllm")
    _, terms = preset(recipe, Spending(preset=name, average_bits=2.5, engine="vllm"), SMALL + 1)
    assert terms.levels is None, "those of the engine"
    assert terms.engine == "vllm"
    with pytest.raises(RecipeError, match="unknown engine 'vlm'; did you mean 'vllm'"):
        Spending(preset=name, engine="vlm")


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_recipe_says_itself_wins(name: str) -> None:
    own = Calibration(texts=("t",), tweak="closed", distill=1)
    recipe = Recipe(model="m", calibration=own, quantizer="descent:rounds=2", scheme=Scheme("nf", 4, 32))
    found, _ = preset(recipe, Spending(preset=name), SMALL + 1)
    assert (found.quantizer, found.scheme) == (recipe.quantizer, recipe.scheme)
    assert found.calibration is not None
    assert (found.calibration.tweak, found.calibration.distill) == ("closed", 1)
