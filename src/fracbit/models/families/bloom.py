"""BLOOM: ALiBi, a LayerNorm on the embeddings, q, k, v of a head side by side; attention and MLP add the
residual themselves.

A config switch takes the residual after the norm instead of before it: then the norms cannot be folded into
their readers.
"""

from dataclasses import replace

from fracbit.models.family import Family, Norm, Pair, Sublayer

QKV, OUT, UP, DOWN = (
    "self_attention.query_key_value",
    "self_attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)

BLOOM = Family(
    name="bloom",
    model_types=("bloom",),
    blocks="transformer.h",
    embeddings=("transformer.word_embeddings",),
    head="lm_head",
    linears=((QKV,), (OUT,), (UP,), (DOWN,)),
    sublayers=(Sublayer(("self_attention",), (QKV,)), Sublayer(("mlp",), (UP,))),
    norms=(Norm("input_layernorm", (QKV,)), Norm("post_attention_layernorm", (UP,))),
    pairs=(Pair(QKV, (OUT,), "values by head"),),
    final_norm="transformer.ln_f",
    when=(("apply_residual_connection_post_layernorm", (False,)),),
)

BLOOM_POST_NORM = replace(
    BLOOM,
    name="bloom, residual after the norm",
    norms=tuple(replace(norm, exclusive=False) for norm in BLOOM.norms),
    when=(),
)
