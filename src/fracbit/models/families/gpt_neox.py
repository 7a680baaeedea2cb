"""GPT-NeoX and Pythia: rotary attention with q, k, v of a head side by side; both halves read the residual
stream in parallel, each through a norm of its own (or one after the other: the names are the same).
"""

from fracbit.models.family import Family, Norm, Pair, Sublayer

QKV, OUT, UP, DOWN = "attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"

GPT_NEOX = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    blocks="gpt_neox.layers",
    embeddings=("gpt_neox.embed_in",),
    head="lm_head",
    linears=((QKV,), (OUT,), (UP,), (DOWN,)),
    sublayers=(Sublayer(("attention",), (QKV,)), Sublayer(("mlp",), (UP,))),
    norms=(Norm("input_layernorm", (QKV,)), Norm("post_attention_layernorm", (UP,))),
    pairs=(Pair(QKV, (OUT,), "values by head"),),
    final_norm="gpt_neox.final_layer_norm",
)
