"""The table of blueprints: which operations the decode step of a model type is made of.

A type whose block is like that of another is one more name in its line. Where a type has variants, their order counts: the
first one with conditions that fit the config is taken.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fracbit.models.blueprint import (
    AddTo,
    Attend,
    Blueprint,
    Either,
    Embed,
    GateBy,
    Head,
    Multiply,
    Normalize,
    Operation,
    Positions,
    RunExperts,
    Split,
    WeighBy,
)
from fracbit.models.family import fits

Operations = tuple[Operation, ...]

# --- Llama and what shares its block ---------------------------------------------------------------------------------------

PROJECTIONS: Operations = (
    Multiply(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "n", ("q", "k", "v")),
)
HEAD_NORMS: Operations = (
    Normalize("self_attn.q_norm", "q", "q"),
    Normalize("self_attn.k_norm", "k", "k"),
)
OUT: Operations = (Multiply(("self_attn.o_proj",), "a", ("s",)),)
GATED: Operations = (
    Multiply(("mlp.gate_proj", "mlp.up_proj"), "n", ("gate", "up")),
    GateBy("mlp.act_fn"),
    Multiply(("mlp.down_proj",), "gate", ("s",)),
)


def _llama_block(attend: Attend, mlp: Operations, factor: str = "") -> Operations:
    """An RMS norm before attention and before the MLP, each added to the stream."""
    add = AddTo("s", factor=factor)
    attention = (Normalize("input_layernorm"), *PROJECTIONS, *HEAD_NORMS, attend, *OUT, add)
    return (*attention, Normalize("post_attention_layernorm"), *mlp, add)


def _normed_on_the_way_out(before: tuple[str, str], after: tuple[str, str], attend: Attend) -> Operations:
    """Each half normed before it is added: with norms before it too (Gemma 2), or none (OLMo 2)."""

    def half(first: str, operations: Operations, last: str) -> Operations:
        begin = Normalize(first) if first else AddTo("x", "n", anew=True)
        return (begin, *operations, Normalize(last, "s", "s"), AddTo("s"))

    first = half(before[0], (*PROJECTIONS, *HEAD_NORMS, attend, *OUT), after[0])
    return (*first, *half(before[1], GATED, after[1]))


LLAMA = Blueprint(
    model_types=("llama", "granite", "seed_oss"),
    before=(Embed("model.embed_tokens", "embedding_multiplier"),),
    block=_llama_block(Attend("self_attn"), GATED, "residual_multiplier"),
    after=(Normalize("model.norm"), Head("lm_head", divisor="logits_scaling")),
    rotary="model.rotary_emb",
)
SLIDING = replace(
    LLAMA, model_types=("mistral",), block=_llama_block(Attend("self_attn", window="all"), GATED)
)
BY_LAYER = Attend("self_attn", window="layer_types")
QWEN = replace(
    LLAMA, model_types=("qwen2", "qwen3", "smollm3", "ministral"), block=_llama_block(BY_LAYER, GATED)
)
OLMO = replace(LLAMA, model_types=("olmo",), only=(("clip_qkv", (None,)),))
OLMO2 = replace(
    LLAMA,
    model_types=("olmo2",),
    block=_normed_on_the_way_out(
        ("", ""), ("post_attention_layernorm", "post_feedforward_layernorm"), Attend("self_attn")
    ),
)
CAUSAL = ("use_bidirectional_attention", (None, False))
GEMMA = replace(LLAMA, model_types=("gemma",), block=_llama_block(Attend("self_attn"), GATED), only=(CAUSAL,))
GEMMA2 = replace(
    GEMMA,
    model_types=("gemma2",),
    block=_normed_on_the_way_out(
        ("input_layernorm", "pre_feedforward_layernorm"),
        ("post_attention_layernorm", "post_feedforward_layernorm"),
        replace(BY_LAYER, cap="attn_logit_softcapping"),
    ),
    after=(Normalize("model.norm"), Head("lm_head", cap="final_logit_softcapping")),
)
GEMMA3 = replace(GEMMA2, model_types=("gemma3_text",), only=(CAUSAL, ("attn_logit_softcapping", (None,))))
PHI3 = replace(
    LLAMA,
    model_types=("phi3",),
    block=(
        Normalize("input_layernorm"),
        Multiply(("self_attn.qkv_proj",), "n", ("qkv",)),
        Split("qkv", ("q", "k", "v"), "stacked", "num_key_value_heads"),
        Attend("self_attn", window="all"),
        *OUT,
        AddTo("s"),
        Normalize("post_attention_layernorm"),
        Multiply(("mlp.gate_up_proj",), "n", ("both",)),
        Split("both", ("gate", "up"), "halves"),
        GateBy("mlp.activation_fn"),
        Multiply(("mlp.down_proj",), "gate", ("s",)),
        AddTo("s"),
    ),
)

# --- mixtures of experts ---------------------------------------------------------------------------------------------------


def _expert(path: str, to: str) -> Operations:
    return (
        Multiply((f"{path}.gate_proj", f"{path}.up_proj"), "n", (f"{to}gate", f"{to}up")),
        GateBy(f"{path}.act_fn", f"{to}gate", f"{to}up"),
        Multiply((f"{path}.down_proj",), f"{to}gate", (to,)),
    )


SHARED: Operations = (
    *_expert("mlp.shared_expert", "t"),
    Multiply(("mlp.shared_expert_gate",), "n", ("g",)),
    WeighBy("g", "t"),
    AddTo("t", "s"),
)
SPARSE: Operations = (
    Either("mlp.experts", (RunExperts("mlp.gate", "mlp.experts", to="s"), Either("mlp.shared_expert", SHARED)), GATED),
)  # fmt: skip
MIXTRAL = replace(
    LLAMA,
    model_types=("mixtral", "qwen3_moe"),
    block=_llama_block(Attend("self_attn", window="all"), SPARSE),
)
QWEN2_MOE = replace(LLAMA, model_types=("qwen2_moe",), block=_llama_block(BY_LAYER, SPARSE))
GPT_OSS = replace(
    LLAMA,
    model_types=("gpt_oss",),
    block=_llama_block(BY_LAYER, (RunExperts("mlp.router", "mlp.experts", to="s"),)),
)

# --- norms with a mean, and MLPs without a gate ------------------------------------------------------------------------------

STARCODER2 = replace(
    LLAMA,
    model_types=("starcoder2",),
    block=_llama_block(
        Attend("self_attn", window="all"),
        (Multiply(("mlp.c_fc",), "n", ("up",), "mlp.act"), Multiply(("mlp.c_proj",), "up", ("s",))),
    ),
)
GPT2 = Blueprint(
    model_types=("gpt2",),
    before=(Embed("transformer.wte"), Positions("transformer.wpe")),
    block=(
        Normalize("ln_1"),
        Multiply(("attn.c_attn",), "n", ("qkv",)),
        Split("qkv", ("q", "k", "v"), "stacked"),
        Attend("attn", "num_attention_heads", turned=False),
        Multiply(("attn.c_proj",), "a", ("s",)),
        AddTo("s"),
        Normalize("ln_2"),
        Multiply(("mlp.c_fc",), "n", ("up",), "mlp.act"),
        Multiply(("mlp.c_proj",), "up", ("s",)),
        AddTo("s"),
    ),
    after=(Normalize("transformer.ln_f"), Head("lm_head")),
    only=(("add_cross_attention", (None, False)),),
)


def _opt_block(first: bool) -> Operations:
    """Norms before each half, or after it is added (OPT-350m)."""
    own: Operations = (Normalize("self_attn_layer_norm"),)
    last: Operations = (Normalize("final_layer_norm"),)
    as_it_is: Operations = (AddTo("x", "n", anew=True),)
    return (
        *(own if first else as_it_is),
        *PROJECTIONS,
        Attend("self_attn", "num_attention_heads", turned=False),
        Multiply(("self_attn.out_proj",), "a", ("s",)),
        AddTo("s"),
        *(last if first else (Normalize("self_attn_layer_norm", "x", "x"), *as_it_is)),
        Multiply(("fc1",), "n", ("up",), "activation_fn"),
        Multiply(("fc2",), "up", ("s",)),
        AddTo("s"),
        *(() if first else (Normalize("final_layer_norm", "x", "x"),)),
    )


DECODER = "model.decoder"
_PROJECTED: Operations = (
    Multiply((f"{DECODER}.project_in",), "e", ("x",)),
    Positions(f"{DECODER}.embed_positions"),
)
OPT = Blueprint(
    model_types=("opt",),
    before=(
        Either(
            f"{DECODER}.project_in",
            (Embed(f"{DECODER}.embed_tokens", to="e"), *_PROJECTED),
            (Embed(f"{DECODER}.embed_tokens"), Positions(f"{DECODER}.embed_positions")),
        ),
    ),
    block=_opt_block(True),
    after=(
        Either(f"{DECODER}.final_layer_norm", (Normalize(f"{DECODER}.final_layer_norm"),), (AddTo("x", "n", anew=True),)),
        Either(
            f"{DECODER}.project_out",
            (Multiply((f"{DECODER}.project_out",), "n", ("o",)), Head("lm_head", "o")),
            (Head("lm_head"),),
        ),
    ),
    when=(("do_layer_norm_before", (True,)),),
)  # fmt: skip
OPT_POST_NORM = replace(OPT, block=_opt_block(False), when=())

# --- attention and MLP side by side ------------------------------------------------------------------------------------------


def _beside(norms: tuple[str, str], split: Split, attend: Attend, parallel: bool) -> Operations:
    """Both halves read the stream, each through its norm or that of both; or the second half reads what the first added."""
    attention: Operations = (
        Normalize(norms[0]),
        Multiply((f"{attend.module}.query_key_value",), "n", ("qkv",)),
        split,
        attend,
        Multiply((f"{attend.module}.dense",), "a", ("s",)),
    )
    middle: Operations = () if norms[0] == norms[1] else (Normalize(norms[1]),)
    mlp: Operations = (
        Multiply(("mlp.dense_h_to_4h",), "n", ("up",), "mlp.act"),
        Multiply(("mlp.dense_4h_to_h",), "up", ("t",)),
        AddTo("t"),
    )
    if parallel:
        return (*attention, *middle, *mlp, AddTo("s"))
    return (*attention, AddTo("s"), *middle, *mlp)


GROUPS = Split("qkv", ("q", "k", "v"), "groups")
ALL_HEADS = Attend("attention", "num_attention_heads")
TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
GPT_NEOX = Blueprint(
    model_types=("gpt_neox",),
    before=(Embed("gpt_neox.embed_in"),),
    block=_beside(TWO_NORMS, GROUPS, ALL_HEADS, parallel=True),
    after=(Normalize("gpt_neox.final_layer_norm"), Head("lm_head")),
    rotary="gpt_neox.rotary_emb",
    when=(("use_parallel_residual", (True,)),),
)
GPT_NEOX_SEQUENTIAL = replace(GPT_NEOX, block=_beside(TWO_NORMS, GROUPS, ALL_HEADS, parallel=False), when=())


def _falcon(norms: tuple[str, str], parallel: bool, new: bool, **when: Any) -> list[Blueprint]:
    """With rotations or ALiBi; keys and values for all queries, for each, or for groups (the new architecture)."""
    attend = replace(ALL_HEADS, module="self_attention", repeated=new)
    layouts: list[tuple[Split, Attend, dict[str, Any]]]
    if new:
        layouts = [(replace(GROUPS, kv_heads="num_kv_heads"), replace(attend, kv_heads="num_kv_heads"), {})]
    else:
        stacked = replace(GROUPS, layout="stacked", kv_heads=1)
        layouts = [
            (stacked, replace(attend, kv_heads=1), {"multi_query": True}),
            (GROUPS, attend, {"multi_query": False}),
        ]
    found = []
    for split, one, more in layouts:
        for alibi in (False, True):
            chosen = replace(one, turned=not alibi, alibi="scaled" if alibi else "")
            given = {"new_decoder_architecture": new, "alibi": alibi, **more, **when}
            found.append(
                Blueprint(
                    model_types=("falcon",),
                    before=(Embed("transformer.word_embeddings"),),
                    block=_beside(norms, split, chosen, parallel),
                    after=(Normalize("transformer.ln_f"), Head("lm_head")),
                    rotary="" if alibi else "transformer.rotary_emb",
                    when=tuple(
                        (name, value if isinstance(value, tuple) else (value,))
                        for name, value in given.items()
                    ),
                )
            )
    return found


ONE_NORM = ("input_layernorm", "input_layernorm")
FALCON = [
    *_falcon(("ln_attn", "ln_mlp"), True, True, parallel_attn=True, num_ln_in_parallel_attn=(None, 2)),
    *_falcon(ONE_NORM, True, True, parallel_attn=True, num_ln_in_parallel_attn=1),
    *_falcon(ONE_NORM, True, False, parallel_attn=True),
    *_falcon(TWO_NORMS, False, False, parallel_attn=False),
]


def _bloom(after_norm: bool) -> Blueprint:
    """The residual is what is read by the norm, or what it gives (`after_norm`)."""
    kept: Operations = (AddTo("n", "x", anew=True),) if after_norm else ()
    attend = Attend("self_attention", "num_attention_heads", turned=False, alibi="plain")
    block: Operations = (
        Normalize("input_layernorm"),
        *kept,
        Multiply(("self_attention.query_key_value",), "n", ("qkv",)),
        GROUPS,
        attend,
        Multiply(("self_attention.dense",), "a", ("s",)),
        AddTo("s"),
        Normalize("post_attention_layernorm"),
        *kept,
        Multiply(("mlp.dense_h_to_4h",), "n", ("up",), "mlp.gelu_impl"),
        Multiply(("mlp.dense_4h_to_h",), "up", ("s",)),
        AddTo("s"),
    )
    return Blueprint(
        model_types=("bloom",),
        before=(
            Embed("transformer.word_embeddings"),
            Normalize("transformer.word_embeddings_layernorm", "x", "x"),
        ),
        block=block,
        after=(Normalize("transformer.ln_f"), Head("lm_head")),
        when=(("apply_residual_connection_post_layernorm", (after_norm,)),),
        only=(("slow_but_exact", (None, False)),),
    )


BLUEPRINTS: tuple[Blueprint, ...] = (
    LLAMA, SLIDING, QWEN, OLMO, OLMO2, GEMMA, GEMMA2, GEMMA3, PHI3, MIXTRAL, QWEN2_MOE, GPT_OSS, STARCODER2, GPT2,
    OPT, OPT_POST_NORM, GPT_NEOX, GPT_NEOX_SEQUENTIAL, *FALCON, _bloom(False), _bloom(True),
)  # fmt: skip


def covered_types() -> tuple[str, ...]:
    """Model types that have a blueprint, sorted."""
    return tuple(sorted({name for one in BLUEPRINTS for name in one.model_types}))


def blueprint_of(config: Any) -> Blueprint | None:
    """The one of a config, None where there is none."""
    mine = (one for one in BLUEPRINTS if config.model_type in one.model_types)
    return next((one for one in mine if fits(one.when, config)), None)
