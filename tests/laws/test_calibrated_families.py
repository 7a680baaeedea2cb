"""Every family through the calibrated loop, much switched on: saved, loaded, near the float model, nothing left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import families
from fracbit.checkpoint.load import load
from fracbit.errors import RecipeError
from fracbit.models.experts import split_experts
from fracbit.models.quant_linear import QuantLinear
from fracbit.models.skeleton import quantizable
from fracbit.pipeline.quantize.run import write_checkpoint
from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Override, Recipe
from fracbit.records.scheme import Scheme
from outputs import logits, manifest
from texts import write_ids


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "ids.u16"
    write_ids(path, 24, 24, families.VOCABULARY)
    return path


ROTATABLE = {
    "llama", "llama-tied-biased", "mistral", "qwen2", "qwen3", "granite", "smollm3", "seed_oss", "gemma", "phi3",
    "mixtral", "qwen2_moe", "qwen3_moe",
}  # fmt: skip
FAMILIES = [*families.CONFIGS, "starcoder2"]  # the last one by its structure


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_in_the_calibrated_loop(name: str, ids: Path, tmp_path: Path) -> None:
    model = families.model_of(name)
    model.save_pretrained(tmp_path / "float")
    plan = Calibration(
        texts=(f"{ids}?length=24",), samples=16, length=24, transforms=("smooth",), axis="predicted", tweak="auto",
    )  # fmt: skip
    recipe = Recipe(
        model=str(tmp_path / "float"),
        scheme=Scheme("nf", 6, 16),
        quantizer="gptq",
        outliers="cost:0.03",
        calibration=plan,
    )
    notes = write_checkpoint(recipe, tmp_path / "q").notes
    made, facts = load(tmp_path / "q"), manifest(tmp_path / "q")
    packed = {n: module for n, module in made.named_modules() if isinstance(module, QuantLinear)}
    split_experts(model)
    assert (
        set(packed) == set(quantizable(model)) == {n for n, row in facts["layers"].items() if "loss" in row}
    )
    assert len(facts["tweaks"]) == 3
    x = torch.from_numpy(np.fromfile(ids, dtype=np.uint16).astype(np.int64)).view(-1, 24)[:4]
    wanted, found = logits(model, x), logits(made, x)
    apart = (found - wanted).square().mean(-1)  # by token: one routed to another expert says nothing
    assert float(apart.median()) < 0.01 * float(wanted.var())
    assert any("expert saw" in note for note in notes) == ("moe" in name or name == "mixtral")
    assert any("did nothing" in note for note in notes) == (name == "starcoder2")


@pytest.mark.parametrize("name", families.CONFIGS)
def test_the_float_model_gives_the_same_or_is_refused(name: str, ids: Path, tmp_path: Path) -> None:
    """Law: kept float, rotated and saved, a model gives the same to 1e-5, for every family that allows it."""
    model = families.model_of(name)
    model.save_pretrained(tmp_path / "float")
    plan = Calibration(texts=(f"{ids}?length=24",), samples=8, length=16, batch=4, transforms=("rotate",))
    everything = (Override(layers="*", keep=True),)
    asked = Recipe(model=str(tmp_path / "float"), calibration=plan, overrides=everything)
    if name not in ROTATABLE:
        with pytest.raises(RecipeError, match=r"leave rotate out|leave it out"):
            write_checkpoint(asked, tmp_path / "q")
        assert not (tmp_path / "q").exists()
        return
    write_checkpoint(asked, tmp_path / "q")
    rotated, wanted = load(tmp_path / "q"), logits(model)
    assert (logits(rotated) - wanted).abs().max() < 1e-5 * max(1.0, float(wanted.abs().max()))
    before, after = model.get_input_embeddings().weight, rotated.get_input_embeddings().weight
    assert (before - after).abs().max() > 0.1
    assert rotated.config.tie_word_embeddings is False
    assert torch.allclose(before.norm(dim=1), after.norm(dim=1), rtol=1e-4)
