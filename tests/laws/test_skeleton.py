"""Law: for every family a skeleton has the layers of the real model and is filled by what the real model saves."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from families import fill, saved
from fracbit.models.experts import split_experts
from fracbit.models.find import family_of
from fracbit.models.origin import origins
from fracbit.models.skeleton import quantizable, skeleton


def test_a_saved_checkpoint_fills_the_skeleton(
    model: PreTrainedModel, tokens: torch.Tensor, tmp_path: Path
) -> None:
    disk = saved(model, tmp_path)
    empty = skeleton(model.config)
    fill(empty, disk)
    assert origins(empty, disk).unused == ()
    torch.testing.assert_close(empty(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)


def test_layers_are_those_of_the_real_model(config: PreTrainedConfig, model: PreTrainedModel) -> None:
    split_experts(model)
    layers = quantizable(skeleton(config), include_head=True, include_embeddings=True)
    assert layers == quantizable(model, include_head=True, include_embeddings=True)
    for layer in layers.values():
        weight = model.get_parameter(f"{layer.name}.weight")
        assert tuple(weight.shape) == (
            (layer.width, layer.out) if layer.transposed else (layer.out, layer.width)
        )
        assert layer.transposed == (config.model_type == "gpt2" and layer.kind == "linear")
        assert layers[layer.group].block == layer.block
    inside = {name for name in layers if layers[name].kind == "linear"}
    assert set(quantizable(model)) == inside
    assert [layer.kind for layer in layers.values() if layer.block is None] == ["embedding", "head"]
    tied = {layer.tied for layer in layers.values()} - {None}
    assert tied == (
        {family_of(model).embeddings[0]} if config.get_text_config().tie_word_embeddings else set()
    )
