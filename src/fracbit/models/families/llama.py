"""Llama and what shares its block: Mistral, Qwen2, Qwen3, Granite, SmolLM3, Seed-OSS.

`x + o(attention(q, k, v))`, then `x + down(act(gate) * up)`, an RMSNorm before each half. The norms on
queries and keys that Qwen3 adds act inside a head: no linear reads them.
"""

from fracbit.models.family import Family, Norm, Pair, Sublayer

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj")
HEAD_NORMS = (Norm("self_attn.q_norm", exclusive=False), Norm("self_attn.k_norm", exclusive=False))
VALUE = Pair("self_attn.v_proj", ("self_attn.o_proj",), "values last", "num_key_value_heads")

LLAMA = Family(
    name="llama",
    model_types=("llama", "mistral", "ministral", "qwen2", "qwen3", "granite", "smollm3", "seed_oss"),
    blocks="model.layers",
    embeddings=("model.embed_tokens",),
    head="lm_head",
    linears=(ATTENTION, ("self_attn.o_proj",), MLP, ("mlp.down_proj",)),
    sublayers=(Sublayer(("self_attn",), ATTENTION), Sublayer(("mlp",), MLP)),
    norms=(Norm("input_layernorm", ATTENTION), Norm("post_attention_layernorm", MLP), *HEAD_NORMS),
    pairs=(VALUE, Pair("mlp.up_proj", ("mlp.down_proj",))),
    final_norm="model.norm",
)
