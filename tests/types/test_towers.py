"""Towers for images and sound, quantized beside the text model that they belong to."""

from __future__ import annotations

from pathlib import Path

import check
import pytest
import tiny
import torch
from torch import nn

import fracbit
from fracbit.checkpoint.load import load
from fracbit.checkpoint.opened import open_float
from fracbit.errors import RecipeError
from fracbit.models.quant_linear import QuantLinear
from fracbit.numerics import decode, quantize_tensor
from fracbit.records.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own

KINDS = {
    "image:llava": "vision_tower", "image:llama4": "vision_model", "image:qwen2_vl": "visual", "image:gemma3": "vision_tower",
    "image:idefics3": "vision_model", "multimodal:voxtral": "audio_tower", "image:mllama": "vision_model",
    "causal:git": "image_encoder",
}  # fmt: skip
"""Types, and what the path of their tower contains."""


@pytest.mark.parametrize("kind", KINDS)
def test_the_linears_of_towers_are_rounded_and_run(kind: str, tmp_path: Path) -> None:
    """Every linear of a tower's blocks, and those alone beside the text model's, whose bytes stay as they are without it."""
    tiny.model_of(kind).save_pretrained(tmp_path / "float")
    scheme = check.SCHEME
    recipe = Recipe(model=str(tmp_path / "float"), scheme=scheme, towers=scheme)
    result = fracbit.quantize(recipe, tmp_path / "small", progress=None)
    made = check._loaded(tiny.auto_of(kind), tmp_path / "small")
    twin = check._loaded(tiny.auto_of(kind), tmp_path / "float")
    opened = open_float(tmp_path / "float")
    towers, held = set(opened.towers), dict(made.named_modules())
    packed = {name for name, module in held.items() if isinstance(module, QuantLinear)}
    assert towers
    assert all(KINDS[kind] in name for name in towers)
    assert towers <= packed
    assert any(f"{len(towers)} linears of towers" in note for note in result.notes)
    for name in towers:
        weight = twin.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        module = held[name]
        assert isinstance(module, QuantLinear)
        wanted = decode(quantize_tensor(weight.detach().float(), scheme))
        assert torch.equal(decode(module.packed), wanted), name
    inputs = tiny.inputs_of(kind, length=check.LENGTH)
    assert torch.isfinite(check.logits(made, inputs)).all()
    fracbit.quantize(recipe.model_copy(update={"towers": None}), tmp_path / "text", progress=None)
    text = check._loaded(tiny.auto_of(kind), tmp_path / "text")
    if not inputs.keys() - {"input_ids"}:  # no image goes in
        assert torch.equal(check.logits(made, inputs), check.logits(text, inputs))


def test_images_go_through_packed_towers_as_through_decoded_ones(tmp_path: Path) -> None:
    made = tiny.model_of("image:llava")
    made.save_pretrained(tmp_path / "float")
    recipe = Recipe(model=str(tmp_path / "float"), scheme=check.SCHEME, towers=check.SCHEME)
    result = fracbit.quantize(recipe, tmp_path / "small", progress=None)
    assert not any("could not be tried" in note for note in result.notes)
    small, twin = load(tmp_path / "small", "float32"), load(tmp_path / "float", "float32")
    for name in open_float(tmp_path / "float").towers:
        weight = twin.get_submodule(name).weight
        weight.data = decode(quantize_tensor(weight.detach(), check.SCHEME))
    size = twin.config.vision_config.image_size
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, wanted = (model.get_submodule("model.vision_tower")(pixels)[0] for model in (small, twin))
    assert check.apart(found, wanted) < check.TOLERANCE


def test_a_class_for_text_alone_leaves_packed_towers_out(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    kind = "image:llama4"
    tiny.model_of(kind).save_pretrained(tmp_path / "float")
    recipe = Recipe(model=str(tmp_path / "float"), scheme=check.SCHEME, towers=check.SCHEME)
    fracbit.quantize(recipe, tmp_path / "small", progress=None)
    whole, text = (
        check._loaded(auto, tmp_path / "small") for auto in (tiny.auto_of(kind), AutoModelForCausalLM)
    )
    inputs = tiny.inputs_of(kind, length=check.LENGTH)
    assert check.apart(check.logits(text, inputs), check.logits(whole, inputs)) < check.TOLERANCE


def test_a_model_without_towers_is_refused(tmp_path: Path) -> None:
    tiny.model_of("causal:gpt2").save_pretrained(tmp_path / "float")
    recipe = Recipe(model=str(tmp_path / "float"), scheme=check.SCHEME, towers=check.SCHEME)
    with pytest.raises(RecipeError, match="which has no tower for images or sound"):
        fracbit.quantize(recipe, tmp_path / "small", progress=None)
