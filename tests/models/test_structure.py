"""Architectures outside the table: found by structure, with a note, and walked like the others."""

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fracbit.errors import SourceError
from fracbit.models.blocks import blocks, groups, is_linear, linears, unit_of
from fracbit.models.experts import split_experts
from fracbit.models.find import discover, family_of
from fracbit.models.skeleton import quantizable
from fracbit.models.walk import advance, embed, head

Build = Callable[[PreTrainedConfig], PreTrainedModel]

SIZES = {"vocab_size": 67, "hidden_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
WIDE = SIZES | {"num_key_value_heads": 2, "intermediate_size": 43, "head_dim": 10, "pad_token_id": None}
UNKNOWN = {
    "gptj": hf.GPTJConfig(**SIZES, rotary_dim=4, bos_token_id=1, eos_token_id=2),
    "olmo2": hf.Olmo2Config(**WIDE, eos_token_id=2),
    "starcoder2": hf.Starcoder2Config(**WIDE, bos_token_id=1, eos_token_id=2),
    "cohere2": hf.Cohere2Config(**WIDE, sliding_window=5, eos_token_id=2),
    "mpt": hf.MptConfig(vocab_size=67, d_model=40, n_heads=4, n_layers=3),
    "olmoe": hf.OlmoeConfig(**WIDE, num_experts=5, num_experts_per_tok=2, eos_token_id=2),
}


@pytest.fixture(params=list(UNKNOWN))
def unknown(request: pytest.FixtureRequest, build_model: Build) -> PreTrainedModel:
    return build_model(UNKNOWN[request.param])


def test_unknown_architectures_are_walked(unknown: PreTrainedModel, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        whole = unknown(tokens).logits
    split_experts(unknown)
    family = family_of(unknown)
    assert unknown.config.model_type in family.note
    hidden = embed(unknown, family, tokens, batch=2)
    for _, block in blocks(unknown, family):
        hidden = advance(block, hidden)
    torch.testing.assert_close(head(unknown, family, hidden), whole, rtol=1e-4, atol=1e-5)


def test_unknown_architectures_lose_no_linear(unknown: PreTrainedModel) -> None:
    split_experts(unknown)
    family = family_of(unknown)
    for _, block in blocks(unknown, family):
        scan = [name for name, module in block.named_modules() if is_linear(module)]
        assert sorted(linears(block, family)) == sorted(scan)
        assert all(unit_of(family, name) == (name,) for name in scan)
    assert family.head
    assert family.embeddings
    layers = quantizable(unknown, family, include_head=True, include_embeddings=True)
    assert [layer.kind for layer in layers.values() if layer.block is None] == ["embedding", "head"]


def test_structure_agrees_with_the_table(model: PreTrainedModel) -> None:
    split_experts(model)
    known, found = family_of(model), discover(model)
    assert found.blocks == known.blocks
    assert found.head == known.head
    assert found.embeddings == known.embeddings[:1]
    for _, block in blocks(model, known):
        names = {name for name, module in block.named_modules() if is_linear(module)}
        assert set(linears(block, found)) == names


def test_experts_that_cannot_be_split_are_noted(build_model: Build) -> None:
    model = build_model(hf.GptOssConfig(**WIDE, num_local_experts=4, num_experts_per_tok=2, eos_token_id=2))
    assert split_experts(model) == []
    assert "mlp.experts) stay float" in family_of(model).note


def test_experts_must_be_split_before_linears_are_read(build_model: Build) -> None:
    config = hf.Qwen3MoeConfig(**WIDE, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=11)
    model = build_model(config)
    family = family_of(model)
    _, block = blocks(model, family)[0]
    with pytest.raises(SourceError, match="call split_experts"):
        groups(block, family)
    assert split_experts(model) == [f"model.layers.{index}.mlp.experts" for index in range(3)]
    assert len(linears(block, family)) == 4 + 5 * 3
    assert split_experts(model) == []


def test_nothing_repeats() -> None:
    class Flat(hf.LlamaForCausalLM):
        def __init__(self, config: PreTrainedConfig) -> None:
            super().__init__(config)
            self.model.layers = nn.ModuleList()

    with pytest.raises(SourceError, match="no list of repeated blocks"):
        family_of(Flat(hf.LlamaConfig(**WIDE)))


def test_blocks_elsewhere_than_the_table_says_are_still_found() -> None:
    base = hf.LlamaModel(hf.LlamaConfig(**WIDE))
    family = family_of(base)
    assert family.blocks == "layers"
    with pytest.raises(SourceError, match=r"no blocks at 'model\.layers'"):
        blocks(base, family_of(hf.LlamaForCausalLM(base.config)))


def test_states_of_another_shape_are_refused(build_model: Build, tokens: torch.Tensor) -> None:
    extra = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 67, "laurel_rank": 4}
    kinds = {"altup_num_inputs": 2, "num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 3}
    model = build_model(hf.Gemma3nTextConfig(**WIDE, **extra, **kinds, activation_sparsity_pattern=[0.0] * 3))
    with pytest.raises(SourceError, match="quantize this one without data"):
        embed(model, family_of(model), tokens)
