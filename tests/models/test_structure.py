"""Architectures outside the table: found by structure, with a note, and walked like the others."""

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

import families
from fracbit.errors import SourceError
from fracbit.models.blocks import blocks, groups, is_linear, linears, sublayer_of
from fracbit.models.experts import split_experts
from fracbit.models.find import family_of, known_family
from fracbit.models.skeleton import quantizable
from fracbit.models.walk import embed

WIDE = families.LLAMA_LIKE | {"eos_token_id": 2}


@pytest.fixture(params=list(families.UNKNOWN))
def unknown(request: pytest.FixtureRequest) -> PreTrainedModel:
    return families.model_of(request.param)


def test_unknown_architectures_are_walked(unknown: PreTrainedModel, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        whole = unknown(tokens).logits
    split_experts(unknown)
    family = family_of(unknown)
    assert unknown.config.model_type in family.note
    torch.testing.assert_close(families.walked(unknown, tokens), whole, rtol=1e-4, atol=1e-5)


def test_unknown_architectures_lose_no_linear(unknown: PreTrainedModel) -> None:
    split_experts(unknown)
    family = family_of(unknown)
    for _, block in blocks(unknown, family):
        scan = [name for name, module in block.named_modules() if is_linear(module)]
        assert sorted(linears(block, family)) == sorted(scan)
        assert all(sublayer_of(family, name) == (name,) for name in scan)
    assert family.head
    assert family.embeddings
    layers = quantizable(unknown, family, include_head=True, include_embeddings=True)
    assert [layer.kind for layer in layers.values() if layer.block is None] == ["embedding", "head"]


def test_experts_of_no_known_layout_stay_float_and_are_noted() -> None:
    model = families.model_of("olmoe")
    for index in range(3):
        experts = model.get_submodule(f"model.layers.{index}.mlp.experts")
        experts.register_parameter("third_proj", nn.Parameter(torch.zeros(5, 4, 4)))
    assert split_experts(model) == []
    assert "mlp.experts) stay float" in family_of(model).note


def test_experts_must_be_split_before_linears_are_read() -> None:
    model = families.model_of("qwen3_moe")
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


def test_several_states_a_token_are_walked(tokens: torch.Tensor) -> None:
    extra = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 67, "laurel_rank": 4}
    kinds = {"altup_num_inputs": 2, "num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 3}
    model = families.model_of(
        "Gemma3nTextConfig", **WIDE, **extra, **kinds, activation_sparsity_pattern=[0.0] * 3
    )
    assert embed(model, family_of(model), tokens).states.shape == (5, 2, 11, 40)
    torch.testing.assert_close(families.walked(model, tokens), model(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["q_proj", "mlp.experts.1.up_proj"])
def test_a_linear_in_no_unit_is_judged_by_itself(name: str, llama: PreTrainedModel) -> None:
    family = known_family(llama.config)
    assert family is not None
    assert sublayer_of(family, name) == (name,)
