"""Phi-3 and Phi-4: Llama's block with q, k, v in one matrix and gate, up in another."""

from dataclasses import replace

from fracbit.models.families.llama import LLAMA
from fracbit.models.family import Norm, Pair, Sublayer

PHI3 = replace(
    LLAMA,
    name="phi3",
    model_types=("phi3",),
    linears=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    sublayers=(Sublayer(("self_attn",), ("self_attn.qkv_proj",)), Sublayer(("mlp",), ("mlp.gate_up_proj",))),
    norms=(
        Norm("input_layernorm", ("self_attn.qkv_proj",)),
        Norm("post_attention_layernorm", ("mlp.gate_up_proj",)),
    ),
    pairs=(
        Pair("self_attn.qkv_proj", ("self_attn.o_proj",), "values last", "num_key_value_heads"),
        Pair("mlp.gate_up_proj", ("mlp.down_proj",)),
    ),
)
