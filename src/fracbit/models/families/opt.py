"""OPT: learned positions, LayerNorm with bias, a ReLU MLP that lies in the block itself (there is no `mlp`
module).

OPT-350m norms after each half instead of before: its norms feed the residual stream as well and can be
tweaked, not folded.
"""

from dataclasses import replace

from fracbit.models.family import Family, Norm, Pair, Sublayer

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

OPT = Family(
    name="opt",
    model_types=("opt",),
    blocks="model.decoder.layers",
    embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    head="lm_head",
    linears=(ATTENTION, ("self_attn.out_proj",), ("fc1",), ("fc2",)),
    sublayers=(Sublayer(("self_attn",), ATTENTION), Sublayer(("fc1", "activation_fn", "fc2"), ("fc1",))),
    norms=(Norm("self_attn_layer_norm", ATTENTION), Norm("final_layer_norm", ("fc1",))),
    pairs=(
        Pair("self_attn.v_proj", ("self_attn.out_proj",), "values last"),
        # max(0, s x) = s max(0, x) for s > 0, and for no other activation that OPT offers.
        Pair("fc1", ("fc2",), when=(("activation_function", ("relu",)),)),
    ),
    final_norm="model.decoder.final_layer_norm",
    when=(("do_layer_norm_before", (True,)),),
)

OPT_POST_NORM = replace(
    OPT,
    name="opt, norms last",
    norms=(
        Norm("self_attn_layer_norm", ("fc1",), exclusive=False),
        Norm("final_layer_norm", exclusive=False),
    ),
    final_norm="",
    when=(),
)
