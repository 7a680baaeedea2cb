"""Tiny random models of every family, with odd sizes; gains and biases are random too, so that no law holds
by accident.
"""

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCABULARY = 67
LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 40,
    "intermediate_size": 43,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "pad_token_id": None,
}
SPARSE = LLAMA_LIKE | {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 11}
GEMMA = LLAMA_LIKE | {"sliding_window": 5, "head_dim": 12}
NEOX = {
    "vocab_size": VOCABULARY,
    "hidden_size": 40,
    "intermediate_size": 43,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": None,
}
FALCON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 40,
    "ffn_hidden_size": 43,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 40,
    "ffn_dim": 43,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 40,
    "max_position_embeddings": 64,
}

CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, object]]] = {
    "llama": (hf.LlamaConfig, LLAMA_LIKE),
    "llama-tied-biased": (
        hf.LlamaConfig,
        LLAMA_LIKE | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": (hf.MistralConfig, LLAMA_LIKE | {"sliding_window": 5}),
    "qwen2": (
        hf.Qwen2Config,
        LLAMA_LIKE | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": (hf.Qwen3Config, LLAMA_LIKE),
    "granite": (
        hf.GraniteConfig,
        LLAMA_LIKE | {"residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 1.5},
    ),
    "smollm3": (hf.SmolLM3Config, LLAMA_LIKE),
    "seed_oss": (hf.SeedOssConfig, LLAMA_LIKE),
    "gemma": (hf.GemmaConfig, LLAMA_LIKE),
    "gemma2": (hf.Gemma2Config, GEMMA | {"query_pre_attn_scalar": 12}),
    "gemma3": (
        hf.Gemma3TextConfig,
        GEMMA | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "phi3": (hf.Phi3Config, LLAMA_LIKE),
    "mixtral": (hf.MixtralConfig, LLAMA_LIKE | {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        hf.Qwen2MoeConfig,
        SPARSE | {"shared_expert_intermediate_size": 13, "mlp_only_layers": [1]},
    ),
    "qwen3_moe": (hf.Qwen3MoeConfig, SPARSE),
    "opt": (hf.OPTConfig, OPT),
    "opt-norms-last": (hf.OPTConfig, OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    "gpt2": (
        hf.GPT2Config,
        {"vocab_size": VOCABULARY, "n_embd": 40, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 43},
    ),
    "gpt_neox": (hf.GPTNeoXConfig, NEOX),
    "gpt_neox-sequential": (hf.GPTNeoXConfig, NEOX | {"use_parallel_residual": False}),
    "bloom": (hf.BloomConfig, {"vocab_size": VOCABULARY, "hidden_size": 40, "n_layer": 3, "n_head": 4}),
    "bloom-post-norm": (
        hf.BloomConfig,
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 40,
            "n_layer": 3,
            "n_head": 4,
            "apply_residual_connection_post_layernorm": True,
        },
    ),
    "falcon-7b": (hf.FalconConfig, FALCON | {"multi_query": True, "parallel_attn": True}),
    "falcon-40b": (hf.FalconConfig, FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": (
        hf.FalconConfig,
        FALCON
        | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "bias": True},
    ),
    "falcon-rw": (
        hf.FalconConfig,
        FALCON | {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
    ),
}


def build(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model in float32; matrices large enough that every part matters to the logits."""
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


@pytest.fixture(params=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> PreTrainedConfig:
    kind, values = CONFIGS[request.param]
    return kind(**values)


@pytest.fixture
def model(config: PreTrainedConfig) -> PreTrainedModel:
    return build(config)


@pytest.fixture
def tokens() -> torch.Tensor:
    """Five samples of eleven tokens, longer than the sliding windows of the tiny models."""
    return torch.randint(0, VOCABULARY, (5, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def build_model() -> Callable[[PreTrainedConfig], PreTrainedModel]:
    return build


@pytest.fixture
def llama() -> PreTrainedModel:
    return build(hf.LlamaConfig(**LLAMA_LIKE))
