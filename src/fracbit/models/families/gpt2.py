"""GPT-2: learned positions, LayerNorm, GELU; its linears are `Conv1D`, which stores its weight as [in, out]."""

from fracbit.models.family import Family, Norm, Pair, Sublayer

GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    blocks="transformer.h",
    embeddings=("transformer.wte", "transformer.wpe"),
    head="lm_head",
    linears=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    sublayers=(Sublayer(("attn",), ("attn.c_attn",)), Sublayer(("mlp",), ("mlp.c_fc",))),
    norms=(Norm("ln_1", ("attn.c_attn",)), Norm("ln_2", ("mlp.c_fc",))),
    pairs=(Pair("attn.c_attn", ("attn.c_proj",), "values last"),),
    final_norm="transformer.ln_f",
)
