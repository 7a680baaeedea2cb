"""Tiny random models of many families in vLLM beside fracbit: q, k, v, gate and up with a scheme each, tables quantized.

Run it like vllm_agreement.py, which compares. What is shown is that names, fused layers, biases, tied heads and embeddings find
their places in vLLM's model of a family; the sizes are such that vLLM's attention takes them. For docs/engines.md.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from vllm_agreement import ENGINE, compare, missing, windows

SIZES: dict[str, Any] = {
    "vocab_size": 192,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "pad_token_id": None,
}
EXPERTS = SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SIZES),
    "llama-tied-biased": (
        "LlamaConfig",
        SIZES | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "vocab_size": 200},
    ),
    "mistral": ("MistralConfig", SIZES),
    "qwen2": ("Qwen2Config", SIZES),
    "qwen3": ("Qwen3Config", SIZES),
    "gemma": ("GemmaConfig", SIZES),
    "gemma2": ("Gemma2Config", SIZES | {"query_pre_attn_scalar": 32}),
    "gemma3": ("Gemma3TextConfig", SIZES),
    "phi3": ("Phi3Config", SIZES),
    "granite": ("GraniteConfig", SIZES),
    "smollm3": ("SmolLM3Config", SIZES),
    "olmo2": ("Olmo2Config", SIZES),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 192, "n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 128},
    ),
    "opt": (
        "OPTConfig",
        {"vocab_size": 192, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 256,
         "word_embed_proj_dim": 128, "max_position_embeddings": 128},
    ),
    "qwen2_moe": ("Qwen2MoeConfig", EXPERTS | {"shared_expert_intermediate_size": 64, "mlp_only_layers": [1]}),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS),
    "mixtral": ("MixtralConfig", SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip
FUSED = ("phi3",)
"""Those whose files hold the fused layers."""
APART = {
    "*.q_proj": "int3z/32",
    "*.k_proj": "kmeans4/32",
    "*.v_proj": "int8/row",
    "*.gate_proj": "nf4/64",
    "*.up_proj": "int5z/64 out",
}


def checkpoint(name: str, work: Path, tables: bool) -> Path:
    """A tiny model of a family, quantized; k of the second block and up of the third stay float."""
    import torch
    import transformers

    import fracbit

    kind, sizes = FAMILIES[name]
    torch.manual_seed(0)
    source, folder = work / f"{name}-float", work / name
    config = getattr(transformers, kind)(**sizes)
    config.dtype = torch.float32
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        scale = 0.3 if parameter.dim() == 1 else 1.5 * parameter.shape[-1] ** -0.5
        parameter.data = parameter.data * (parameter.dim() == 1) + scale * torch.randn_like(parameter)
    model.save_pretrained(source)
    kept = [{"layers": pattern, "keep": True} for pattern in ("*.1.*.k_proj", "*.2.*.up_proj")]
    changed = [{"layers": pattern, "scheme": scheme} for pattern, scheme in APART.items()]
    apart = [*changed, *kept] if hasattr(config, "num_key_value_heads") and name not in FUSED else []
    more: dict[str, Any] = {"embeddings": "int6/32"} if tables else {}
    tied = config.tie_word_embeddings
    more |= {"head": "int7z/32"} if tables and not tied else {}
    recipe = fracbit.Recipe(model=str(source), scheme="int4z/32", overrides=apart, **more)
    fracbit.quantize(recipe, folder, overwrite=True, progress=False, allow_float=1.0)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}; all by default"
    )
    parser.add_argument("--float-tables", action="store_true", help="leave embeddings and heads float")
    parser.add_argument(
        "--engine", type=Path, default=ENGINE, help="the Python of an environment with vLLM and fracbit"
    )
    given = parser.parse_args()
    if missing(given.engine):
        return
    for name in given.families or FAMILIES:
        with tempfile.TemporaryDirectory() as work:
            try:
                folder = checkpoint(name, Path(work), not given.float_tables)
                ids = windows(folder, Path(), count=4, length=64)
                found = compare(folder, ids, "float32", compiled=False, engine=given.engine)
            except SystemExit as refused:
                print(f"{name}: {str(refused).strip().splitlines()[-1]}", flush=True)
                continue
            print(
                "{checkpoint}: mean {mean_difference_of_log_probability:.2g}, largest {largest_difference:.2g}, "
                "generated {same_generated:.0%} the same".format(**found),
                flush=True,
            )


if __name__ == "__main__":
    main()
