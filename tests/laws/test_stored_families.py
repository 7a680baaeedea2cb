"""Law: every family is quantized, stored and loaded to the float model with the stored weights in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from families import CONFIGS, model_of
from fracbit.checkpoint.load import load
from fracbit.models.blocks import weight_of
from fracbit.models.experts import split_experts
from fracbit.models.install import set_weight
from fracbit.models.quant_linear import QuantLinear
from fracbit.models.skeleton import quantizable
from fracbit.numerics import decode
from fracbit.pipeline.quantize.run import write_checkpoint
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import Scheme
from outputs import logits

FAMILIES = [*CONFIGS, "starcoder2"]  # the last one is not in the table: found by structure


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_end_to_end(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    model.save_pretrained(tmp_path / "float")
    result = write_checkpoint(
        Recipe(model=str(tmp_path / "float"), scheme=Scheme("int", 8, 32, offset="float")), tmp_path / "q"
    )
    loaded = load(tmp_path / "q")
    packed = {layer: module for layer, module in loaded.named_modules() if isinstance(module, QuantLinear)}
    split_experts(model)
    assert set(packed) == set(quantizable(model))
    for layer, module in packed.items():
        weight = weight_of(model.get_submodule(layer)).detach().clone()
        set_weight(model.get_submodule(layer), decode(module.packed))
        assert float((decode(module.packed) - weight).abs().max()) < 0.01 * float(weight.abs().max())
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    assert bool(result.notes) == (name == "starcoder2")


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_hub_files_without_the_base_models_prefix(name: str, tmp_path: Path) -> None:
    """The hub's GPT-2 and BLOOM files say `h.0...`, without `transformer.` in front."""
    model = model_of(name)
    model.transformer.save_pretrained(tmp_path / "float")
    write_checkpoint(Recipe(model=str(tmp_path / "float"), scheme=Scheme("int", 8, 32)), tmp_path / "q")
    model.save_pretrained(tmp_path / "whole")
    write_checkpoint(Recipe(model=str(tmp_path / "whole"), scheme=Scheme("int", 8, 32)), tmp_path / "r")
    assert torch.equal(logits(load(tmp_path / "q")), logits(load(tmp_path / "r")))
