"""Every family, end to end: a random model is saved as its hub files are, quantized, loaded and compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fracbit.checkpoint.load import load
from fracbit.models.blocks import weight_of
from fracbit.models.quant_linear import QuantLinear
from fracbit.numerics import decode
from fracbit.pipeline.quantize.stream import run
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import Scheme

IDS = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2}
SIZES = IDS | {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 132, "head_dim": 12,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
GPT2 = IDS | {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_inner": 132, "n_positions": 64}
CONFIGS: dict[str, dict[str, object]] = {
    "llama": SIZES,
    "mistral": SIZES,
    "qwen2": SIZES,
    "qwen3": SIZES,
    "gemma": SIZES,
    "gemma2": SIZES | {"query_pre_attn_scalar": 12},
    "gemma3_text": SIZES | {"query_pre_attn_scalar": 12},
    "phi3": SIZES,
    "opt": SIZES | {"ffn_dim": 132, "word_embed_proj_dim": 48},
    "gpt2": GPT2,
    "gpt_neox": SIZES,
    "bloom": {"hidden_size": 48, "n_layer": 2, "n_head": 4, "vocab_size": 96, "pad_token_id": 0},
    "falcon": {name: size for name, size in SIZES.items() if name != "head_dim"},
    "starcoder2": SIZES,  # not in the table: found by structure
}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_family_end_to_end(model_type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **CONFIGS[model_type])).eval()
    model.save_pretrained(tmp_path / "float")
    result = run(
        Recipe(model=str(tmp_path / "float"), scheme=Scheme("int", 8, 32, offset="float")), tmp_path / "q"
    )
    loaded = load(tmp_path / "q")
    packed = {name: module for name, module in loaded.named_modules() if isinstance(module, QuantLinear)}
    assert len(packed) >= 8
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        exact, found = model(ids).logits, loaded(ids).logits
    assert float((exact - found).abs().max()) < 0.02 * float(exact.abs().max()) + 1e-3
    for name, module in packed.items():
        weight = weight_of(model.get_submodule(name)).detach()
        assert float((decode(module.packed) - weight).abs().max()) < 0.01 * float(weight.abs().max())
    assert bool(result.notes) == (model_type == "starcoder2")


@pytest.mark.parametrize("model_type", ["gpt2", "bloom"])
def test_hub_files_without_the_base_models_prefix(model_type: str, tmp_path: Path) -> None:
    """The hub's GPT-2 and BLOOM files say `h.0...`, without `transformer.` in front."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **CONFIGS[model_type])).eval()
    model.transformer.save_pretrained(tmp_path / "float")
    run(Recipe(model=str(tmp_path / "float"), scheme=Scheme("int", 8, 32)), tmp_path / "q")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        exact, found = model(ids).logits, load(tmp_path / "q")(ids).logits
    assert float((exact - found).abs().max()) < 0.03 * float(exact.abs().max()) + 1e-3
