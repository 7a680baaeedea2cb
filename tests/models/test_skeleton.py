"""A skeleton costs nothing, knows every layer, and finds each tensor under the names of any checkpoint."""

import time
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from transformers import PreTrainedConfig, PreTrainedModel

from families import fill, saved
from fracbit.errors import SourceError
from fracbit.models.blocks import blocks
from fracbit.models.experts import Cut
from fracbit.models.find import family_of
from fracbit.models.origin import Origin, origins
from fracbit.models.skeleton import quantizable, skeleton


@pytest.mark.parametrize("kind", [hf.GPT2Config, hf.BloomConfig])
def test_names_on_the_hub_may_lack_the_prefix(
    kind: type[PreTrainedConfig], tokens: torch.Tensor, tmp_path: Path
) -> None:
    real = hf.AutoModelForCausalLM.from_config(
        kind(vocab_size=67, hidden_size=40, num_hidden_layers=2, num_attention_heads=4)
    )
    real.train(False)
    disk = {name.removeprefix("transformer."): value for name, value in saved(real, tmp_path).items()}
    disk["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    empty = skeleton(real.config)
    fill(empty, disk)
    assert origins(empty, disk).unused == ("h.0.attn.bias",)
    torch.testing.assert_close(empty(tokens).logits, real(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [hf.MixtralConfig, hf.Qwen3MoeConfig])
def test_experts_may_be_fused_on_disk(kind: type[PreTrainedConfig], tokens: torch.Tensor) -> None:
    sizes = {"hidden_size": 40, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {
        "num_experts": 3,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
    }
    real = hf.AutoModelForCausalLM.from_config(
        kind(vocab_size=67, num_key_value_heads=2, head_dim=10, **sizes, **experts)
    )
    real.train(False)
    with torch.no_grad():
        for parameter in real.parameters():
            parameter.normal_(std=0.2)
    disk = dict(real.state_dict())
    empty = skeleton(real.config)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    assert origins(empty, disk).tensors[name] == Origin(
        ("model.layers.1.mlp.experts.gate_up_proj",), cut=Cut(2, 3, "second")
    )
    fill(empty, disk)
    torch.testing.assert_close(empty(tokens).logits, real(tokens).logits, rtol=1e-5, atol=1e-5)


def test_a_tensor_that_is_not_there_is_missing(llama: PreTrainedModel) -> None:
    disk = dict(llama.state_dict())
    del disk["model.layers.1.mlp.up_proj.weight"]
    disk["model.layers.9.mlp.up_proj.weight"] = torch.zeros(1)
    found = origins(skeleton(llama.config), disk)
    assert found.missing == ("model.layers.1.mlp.up_proj.weight",)
    assert found.unused == ("model.layers.9.mlp.up_proj.weight",)


@pytest.mark.parametrize("on_disk", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_tied_tensor_needs_one_name(on_disk: str, tokens: torch.Tensor) -> None:
    config = hf.LlamaConfig(
        vocab_size=67,
        hidden_size=40,
        intermediate_size=43,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    real = hf.AutoModelForCausalLM.from_config(config)
    disk = {
        name: value
        for name, value in real.state_dict().items()
        if "embed" not in name and "lm_head" not in name
    }
    disk[on_disk] = real.lm_head.weight.detach()
    empty = skeleton(config)
    fill(empty, disk)
    assert empty.lm_head.weight is empty.model.embed_tokens.weight
    torch.testing.assert_close(empty(tokens).logits, real(tokens).logits)


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        (hf.BloomConfig(hidden_size=14336, n_layer=70, n_head=112, vocab_size=250880), 176.2),
        (
            hf.LlamaConfig(
                hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
            ),
            78.4,
        ),
    ],
)
def test_a_large_model_costs_nothing(config: PreTrainedConfig, billions: float) -> None:
    start = time.perf_counter()
    empty = skeleton(config)
    layers = quantizable(empty)
    assert time.perf_counter() - start < 20
    assert sum(parameter.numel() for parameter in empty.parameters()) / 1e9 == pytest.approx(
        billions, abs=0.1
    )
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert len(layers) == len(blocks(empty, family_of(empty))) * (4 if config.model_type == "bloom" else 7)


@pytest.mark.parametrize("kind", [hf.T5Config, hf.ViTConfig])
def test_no_causal_language_model(kind: type[PreTrainedConfig]) -> None:
    with pytest.raises(SourceError, match="no causal language model can be built"):
        skeleton(kind())


@pytest.mark.parametrize("name", ["tales-xs", "tales-s", "tales-m", "tales-l"])
def test_shared_models_fill_their_skeletons(shared: Path, name: str) -> None:
    disk = load_file(shared / "models" / name / "model.safetensors")
    empty = skeleton(hf.AutoConfig.from_pretrained(shared / "models" / name))
    fill(empty, disk)
    layers = quantizable(empty, include_head=True)
    assert len(layers) == 7 * empty.config.num_hidden_layers + 1
    assert layers["lm_head"].tied == "model.embed_tokens"
    assert not any(tensor.is_meta for tensor in [*empty.parameters(), *empty.buffers()])
