"""Tiny random models of every family, with odd sizes; gains and biases are random too, so that no law holds by accident.

The tables name transformers' classes, and makers import it when they are called: a test that asks for no model need not wait.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

Sizes = dict[str, Any]

VOCABULARY = 67
SIZES: Sizes = {
    "vocab_size": VOCABULARY,
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
NEOX = SIZES | {"intermediate_size": 43, "pad_token_id": None}
LLAMA_LIKE = NEOX | {"num_key_value_heads": 2, "head_dim": 10}
SPARSE = LLAMA_LIKE | {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 11}
GEMMA = LLAMA_LIKE | {"sliding_window": 5, "head_dim": 12}
FALCON = SIZES | {"ffn_hidden_size": 43}
OPT = SIZES | {"ffn_dim": 43, "word_embed_proj_dim": 40, "max_position_embeddings": 64}
BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 40, "n_layer": 3, "n_head": 4}

CONFIGS: Mapping[str, tuple[str, Sizes]] = {
    "llama": ("LlamaConfig", LLAMA_LIKE),
    "llama-tied-biased": (
        "LlamaConfig",
        LLAMA_LIKE | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ("MistralConfig", LLAMA_LIKE | {"sliding_window": 5}),
    "qwen2": (
        "Qwen2Config",
        LLAMA_LIKE | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", LLAMA_LIKE),
    "granite": (
        "GraniteConfig",
        LLAMA_LIKE | {"residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 1.5},
    ),
    "smollm3": ("SmolLM3Config", LLAMA_LIKE),
    "seed_oss": ("SeedOssConfig", LLAMA_LIKE),
    "gemma": ("GemmaConfig", LLAMA_LIKE),
    "gemma2": ("Gemma2Config", GEMMA | {"query_pre_attn_scalar": 12}),
    "gemma3": (
        "Gemma3TextConfig",
        GEMMA | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "phi3": ("Phi3Config", LLAMA_LIKE),
    "mixtral": ("MixtralConfig", LLAMA_LIKE | {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        SPARSE | {"shared_expert_intermediate_size": 13, "mlp_only_layers": [1]},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", SPARSE),
    "opt": ("OPTConfig", OPT),
    "opt-norms-last": ("OPTConfig", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 40, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 43},
    ),
    "gpt_neox": ("GPTNeoXConfig", NEOX),
    "gpt_neox-sequential": ("GPTNeoXConfig", NEOX | {"use_parallel_residual": False}),
    "bloom": ("BloomConfig", BLOOM),
    "bloom-post-norm": ("BloomConfig", BLOOM | {"apply_residual_connection_post_layernorm": True}),
    "falcon-7b": ("FalconConfig", FALCON | {"multi_query": True, "parallel_attn": True}),
    "falcon-40b": ("FalconConfig", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": (
        "FalconConfig",
        FALCON
        | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "bias": True},
    ),
    "falcon-rw": (
        "FalconConfig",
        FALCON | {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
    ),
}
"""Every line of the table of families, and the switches inside a family that change how a block is walked."""

UNKNOWN: Mapping[str, tuple[str, Sizes]] = {
    "gptj": ("GPTJConfig", SIZES | {"rotary_dim": 4, "bos_token_id": 1, "eos_token_id": 2}),
    "olmo2": ("Olmo2Config", LLAMA_LIKE | {"eos_token_id": 2}),
    "starcoder2": ("Starcoder2Config", LLAMA_LIKE | {"bos_token_id": 1, "eos_token_id": 2}),
    "cohere2": ("Cohere2Config", LLAMA_LIKE | {"sliding_window": 5, "eos_token_id": 2}),
    "mpt": ("MptConfig", {"vocab_size": VOCABULARY, "d_model": 40, "n_heads": 4, "n_layers": 3}),
    "olmoe": ("OlmoeConfig", LLAMA_LIKE | {"num_experts": 5, "num_experts_per_tok": 2, "eos_token_id": 2}),
}
"""Architectures outside the table, which are found by their structure."""


def config_of(name: str, **changes: Any) -> PreTrainedConfig:
    """The config of a family by its name in a table, or of a class by its own: `config_of("OPTConfig", **sizes)`."""
    import transformers

    kind, sizes = {**CONFIGS, **UNKNOWN}.get(name, (name, {}))
    return getattr(transformers, kind)(**(sizes | changes))  # type: ignore[no-any-return]


def build(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model in float32; matrices large enough that every part matters to the logits."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    if model._can_set_experts_implementation():
        # The default, a grouped product, refuses rows that are not a multiple of 16 bytes; these models have
        # odd sizes.
        model.set_experts_implementation("eager")
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model


def model_of(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of a family, `build(config_of(name))`."""
    return build(config_of(name, **changes), seed)


def tokens(samples: int = 5, length: int = 11, seed: int = 1) -> torch.Tensor:
    """Ids [samples, length] of the families' vocabulary; eleven are more than a sliding window of the tiny models holds."""
    import torch

    return torch.randint(0, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random Llama of about 0.1M weights as transformers starts it: `tiny_llama(seed=1, intermediate_size=44, ...)`.

    Keywords are LlamaConfig's. No block size of 32 or more divides its widths, 48 and 132. The same arguments
    give the same weights, and the caller's random state is left alone.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: Sizes = {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 132,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()


def walked(model: PreTrainedModel, ids: torch.Tensor, batch: int = 2) -> torch.Tensor:
    """Logits of a model that is walked block by block, `batch` samples at a time."""
    from fracbit.models.blocks import blocks
    from fracbit.models.find import family_of
    from fracbit.models.walk import advance, embed, head

    family = family_of(model)
    hidden = embed(model, family, ids, batch)
    for _, block in blocks(model, family):
        hidden = advance(block, hidden)
    return head(model, family, hidden)


def saved(model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that transformers stores for a model, by the names in its file."""
    from safetensors.torch import load_file

    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def fill(empty: PreTrainedModel, disk: Mapping[str, torch.Tensor]) -> None:
    """Fill a skeleton with the tensors of a checkpoint, which must hold them all."""
    from fracbit.models.install import materialize
    from fracbit.models.origin import origins

    found = origins(empty, disk)
    assert found.missing == ()
    tensors = {
        name: origin.read([disk[each] for each in origin.names]) for name, origin in found.tensors.items()
    }
    materialize(empty, tensors)
