"""Falcon, four ways: attention and MLP after one another (falcon-rw, with ALiBi), side by side behind one
norm (7B, 11B), or side by side behind a norm each (40B, 180B). Queries, keys and values are one matrix,
multi-query in 7B, in groups `[queries..., key, value]` elsewhere.
"""

from dataclasses import replace

from fracbit.models.family import Family, Norm, Pair, Sublayer

QKV, OUT, UP, DOWN = (
    "self_attention.query_key_value",
    "self_attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)
NEW = "new_decoder_architecture"

FALCON_SEQUENTIAL = Family(
    name="falcon, sequential",
    model_types=("falcon",),
    blocks="transformer.h",
    embeddings=("transformer.word_embeddings",),
    head="lm_head",
    linears=((QKV,), (OUT,), (UP,), (DOWN,)),
    sublayers=(Sublayer(("self_attention",), (QKV,)), Sublayer(("mlp",), (UP,))),
    norms=(Norm("input_layernorm", (QKV,)), Norm("post_attention_layernorm", (UP,))),
    pairs=(
        Pair(QKV, (OUT,), "values by head", "num_kv_heads", when=((NEW, (True,)),)),
        Pair(QKV, (OUT,), "values last", 1, when=((NEW, (False,)), ("multi_query", (True,)))),
        Pair(QKV, (OUT,), "values by head", when=((NEW, (False,)), ("multi_query", (False,)))),
    ),
    final_norm="transformer.ln_f",
    when=((NEW, (False,)), ("parallel_attn", (False,))),
)

FALCON_TWO_NORMS = replace(
    FALCON_SEQUENTIAL,
    name="falcon, parallel with two norms",
    norms=(Norm("ln_attn", (QKV,)), Norm("ln_mlp", (UP,))),
    when=((NEW, (True,)), ("num_ln_in_parallel_attn", (None, 2))),
)

FALCON_ONE_NORM = replace(
    FALCON_SEQUENTIAL,
    name="falcon, parallel with one norm",
    linears=((QKV, UP), (OUT,), (DOWN,)),
    norms=(Norm("input_layernorm", (QKV, UP)),),
    when=(("parallel_attn", (True,)),),
)
