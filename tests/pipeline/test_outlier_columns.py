"""Columns chosen before a run: where the outputs of a conspicuous unit go in a real block."""

from __future__ import annotations

from pathlib import Path

import torch

from families import tiny_llama
from fracbit.checkpoint.opened import open_float
from fracbit.models.blocks import weight_of
from fracbit.pipeline.quantize.columns import producer_spreads


def test_spreads_come_from_the_layer_that_produces_the_input(tmp_path: Path) -> None:
    model = tiny_llama(hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    layers = model.model.layers
    with torch.no_grad():  # one conspicuous unit in each producer
        model.model.embed_tokens.weight[:, 3] *= 50
        layers[0].mlp.up_proj.weight[7] *= 50
        layers[0].self_attn.o_proj.weight[5] *= 50
        layers[0].mlp.down_proj.weight[9] *= 50
        layers[0].self_attn.v_proj.weight[8] *= 50  # the first unit of the second key-value head
    model.save_pretrained(tmp_path)
    spreads = producer_spreads(
        open_float(str(tmp_path)), lambda name: weight_of(model.get_submodule(name)).float()
    )
    found = {name.removeprefix("model.layers."): int(spread.argmax()) for name, spread in spreads.items()}
    assert len(found) == 14
    assert {found[f"0.self_attn.{name}_proj"] for name in "qkv"} == {3}
    assert {found[f"0.mlp.{name}_proj"] for name in ("gate", "up")} == {5}
    assert found["0.mlp.down_proj"] == 7
    assert {found[f"1.self_attn.{name}_proj"] for name in "qkv"} == {9}
    # Heads 2 and 3 of the queries share the second key-value head: columns 16 and 24 of o.
    assert spreads["model.layers.0.self_attn.o_proj"].topk(2).indices.sort().values.tolist() == [16, 24]
