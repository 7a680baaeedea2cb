"""Weights in and out of modules, tensors in and out of memory, experts in and out of one tensor."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fracbit.errors import SourceError, WeightError
from fracbit.models.blocks import bias_of, blocks, shape_of, weight_of
from fracbit.models.experts import split_experts
from fracbit.models.find import family_of
from fracbit.models.install import materialize, release, replace, set_weight
from fracbit.models.skeleton import skeleton


@pytest.mark.parametrize("module", [nn.Linear(5, 3), Conv1D(3, 5)])
def test_weights_are_out_by_in(module: nn.Module) -> None:
    weight = torch.randn(3, 5)
    set_weight(module, weight)
    assert shape_of(module) == (3, 5)
    assert torch.equal(weight_of(module), weight)
    x = torch.randn(2, 5)
    torch.testing.assert_close(module(x), x @ weight.T + bias_of(module))


def test_a_weight_keeps_the_type_it_is_stored_in() -> None:
    module = nn.Linear(5, 3, bias=False, dtype=torch.bfloat16)
    set_weight(module, torch.full((3, 5), 0.1))
    assert weight_of(module).dtype == torch.bfloat16
    assert bias_of(module) is None


def test_what_is_not_a_weight_is_refused() -> None:
    with pytest.raises(WeightError, match=r"\(5, 3\) does not fit Linear"):
        set_weight(nn.Linear(5, 3), torch.zeros(5, 3))
    with pytest.raises(WeightError, match="LayerNorm has no two-dimensional"):
        weight_of(nn.LayerNorm(3))


def test_replace_returns_what_was_there(llama: PreTrainedModel) -> None:
    old, new = llama.model.layers[1].mlp.up_proj, nn.Linear(40, 43)
    assert replace(llama, "model.layers.1.mlp.up_proj", new) is old
    assert llama.model.layers[1].mlp.up_proj is new


def test_materialize_casts_floats(llama: PreTrainedModel) -> None:
    _, block = blocks(llama, family_of(llama))[0]
    state = dict(block.state_dict())
    release(block)
    materialize(block, state, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in block.parameters()} == {torch.bfloat16}


def test_materialize_refuses_what_does_not_fit(llama: PreTrainedModel) -> None:
    empty = skeleton(llama.config)
    state = dict(llama.state_dict())
    with pytest.raises(SourceError, match=r"no tensors named model\.layers\.7"):
        materialize(empty, {"model.layers.7.up.weight": torch.zeros(2)})
    with pytest.raises(SourceError, match=r"shape \(3,\) in the checkpoint and \(40,\)"):
        materialize(empty, {"model.norm.weight": torch.zeros(3)})
    state.pop("model.norm.weight")
    with pytest.raises(SourceError, match=r"no tensors were given for model\.norm\.weight"):
        materialize(empty, state)


@pytest.mark.parametrize("same", [True, False])
def test_tied_tensors_that_differ_on_disk_are_untied(same: bool) -> None:
    sizes = {"hidden_size": 40, "intermediate_size": 43, "num_hidden_layers": 1, "num_attention_heads": 4}
    empty = skeleton(hf.LlamaConfig(vocab_size=67, tie_word_embeddings=True, **sizes))
    table = torch.randn(67, 40)
    head = table.clone() if same else torch.randn(67, 40)
    materialize(empty, {"model.embed_tokens.weight": table, "lm_head.weight": head}, partial=True)
    assert (empty.lm_head.weight is empty.model.embed_tokens.weight) == same
    assert torch.equal(weight_of(empty.lm_head), head)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_split_experts_give_the_same_logits(tokens: torch.Tensor, kind: str) -> None:
    sizes = {"hidden_size": 40, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {
        "num_experts": 6,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
    }
    config = hf.AutoConfig.for_model(
        kind, vocab_size=67, num_key_value_heads=2, head_dim=10, **sizes, **experts
    )
    fused = hf.AutoModelForCausalLM.from_config(config).train(False)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.normal_(std=0.2)
    split = copy.deepcopy(fused)
    split_experts(split)
    torch.testing.assert_close(split(tokens).logits, fused(tokens).logits, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in split.parameters()) == sum(p.numel() for p in fused.parameters())
