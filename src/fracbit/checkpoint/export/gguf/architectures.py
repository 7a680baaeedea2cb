"""The families that llama.cpp runs, as data: its name, what its file says, which tokenizers, and what it cannot run.

What happens to the weights is not here: names come from the package `gguf`, and the order of rows from what transformers
undoes when it reads a file (rows.py); only Falcon's is missing there.

Ref: convert_hf_to_gguf.py and src/models of llama.cpp, build 11434.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from fracbit.checkpoint.export.gguf.size_keys import (
    BASIC,
    HEADS,
    USUAL,
    USUAL_BASE,
    WIDTH,
    ModelSettings,
    SizeKey,
    Value,
    besides,
    entry,
    head_size,
    long_attention,
    nonzero,
    original_length,
    other_base,
    positions,
    rotated_size,
    scaling,
    times_width,
    usual,
    without,
)
from fracbit.errors import FormatError

VocabularyKind: TypeAlias = Literal["sentencepiece", "llama", "bytes"]
"""How a vocabulary is written: a model of sentencepiece, the same in tokenizer.json, or merges of bytes."""


@dataclass(frozen=True)
class TokenRules:
    """What llama.cpp's converter says of a tokenizer, whatever the tokenizer's files say.

    `ids` of special tokens, by kind; whether tokens of a kind are `added` to a text; `space`: whether one is put before it.
    """

    ids: Mapping[str, int] = field(default_factory=dict)
    added: Mapping[str, bool] = field(default_factory=dict)
    space: bool | None = None


@dataclass(frozen=True)
class Architecture:
    """A family as llama.cpp knows it.

    `name`: its own name. `spellings`: its tokenizers; the first that a folder has is written. `only`: entries of the config
    with the values that llama.cpp runs. `scalings`: how positions may be scaled. `window`: every so many layers see everything,
    the others a window; 0 where llama.cpp has no windows. `groups`: how many groups of heads stand one after another in the
    rows of q, k and v; None where transformers knows their order. `like`: the family whose tensors are changed in the same
    way, where transformers does not read files of this one. `unrotated`: of every so many layers the last has no positions.
    `base`: the only base of the positions; 0 where the file names it. `says_type`: the file names its type.

    Of the tokenizer: `rules` hold for one of sentencepiece, `by_vocabulary` for one of so many tokens. `own_space`: its own
    files say whether a space is put before a text. `plain_added`: an added token is never special by its look.
    """

    name: str
    keys: tuple[SizeKey, ...]
    spellings: tuple[VocabularyKind, ...] = ("bytes",)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    scalings: tuple[str, ...] = ()
    window: int = 0
    groups: Value | None = None
    like: str = ""
    unrotated: int = 0
    base: int = 0
    says_type: bool = True
    rules: TokenRules = TokenRules()
    by_vocabulary: Mapping[int, TokenRules] = field(default_factory=dict)
    own_space: bool = False
    plain_added: bool = False


def _kv_heads_of_falcon(settings: ModelSettings) -> Any:
    """Heads of k and v: one for all, unless the config says otherwise."""
    several = settings.get("new_decoder_architecture") or not settings.get("multi_query")
    return settings["num_kv_heads"] if several else 1


VOCABULARY = SizeKey("vocab_size", "uint32", entry("vocab_size"))
WINDOW = SizeKey("attention.sliding_window", "uint32", lambda settings: settings.get("sliding_window") or 0)
ROTATED = SizeKey("rope.dimension_count", "uint32", rotated_size)
LAYER_NORM = usual("attention.layer_norm_epsilon")
BASE = SizeKey("rope.freq_base", "float32", other_base)
SCALES = {
    "attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling",
}  # fmt: skip
"""What Granite multiplies by, by llama.cpp's name."""
GEMMA = usual("attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length")
FOURFOLD = SizeKey("feed_forward_length", "uint32", times_width(4, "n_inner", "ffn_hidden_size"))
EXPERTS = (
    SizeKey("expert_feed_forward_length", "uint32", entry("moe_intermediate_size")),
    SizeKey("expert_shared_feed_forward_length", "uint32", entry("shared_expert_intermediate_size")),
)
SILU = {"hidden_act": ("silu",)}
UNTIED = {"tie_word_embeddings": (False,)}
GELU = {"hidden_activation": ("gelu_pytorch_tanh",)}
EVERY_BLOCK: dict[str, tuple[Any, ...]] = {"mlp_only_layers": ([], None), "decoder_sparse_step": (1,)}
SENTENCES: tuple[VocabularyKind, ...] = ("sentencepiece", "bytes")
LINEAR = ("linear", "yarn")
NO_SPACE = TokenRules(space=False)
CODE_LLAMA, SMOLLM = 32016, 49152  # tokens; the latter are also those of Granite's small models
LLAMA = Architecture(
    "llama",
    (*USUAL, VOCABULARY, SizeKey("rope.dimension_count", "uint32", head_size)),
    ("sentencepiece", "llama", "bytes"),
    only=SILU,
    scalings=(*LINEAR, "llama3"),
    by_vocabulary={CODE_LLAMA: TokenRules({"eot": 32010}), SMOLLM: TokenRules(added={"bos": False})},
    own_space=True,
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "qwen2": Architecture("qwen2", USUAL, SENTENCES, only=SILU, scalings=LINEAR),
    "qwen3": Architecture("qwen3", USUAL, SENTENCES, only=SILU, scalings=LINEAR),
    "qwen2_moe": Architecture(
        "qwen2moe", USUAL + EXPERTS, only=SILU | EVERY_BLOCK | {"norm_topk_prob": (False,)}, scalings=LINEAR
    ),
    "qwen3_moe": Architecture(
        "qwen3moe", USUAL + EXPERTS, only=SILU | EVERY_BLOCK | {"norm_topk_prob": (True,)}, scalings=LINEAR
    ),
    "smollm3": replace(
        LLAMA, name="smollm3", only=SILU | {"use_sliding_window": (False,)}, like="llama", unrotated=4
    ),
    "granite": replace(
        LLAMA,
        name="granite",
        keys=(
            *without(LLAMA.keys, "attention.key_length", "attention.value_length", "rope.dimension_count"),
            SizeKey("rope.dimension_count", "uint32", lambda settings: WIDTH(settings) // HEADS(settings)),
            *(SizeKey(name, "float32", nonzero(own)) for name, own in SCALES.items()),
        ),
        like="llama",
    ),
    "seed_oss": Architecture(
        "seed_oss", USUAL, only=SILU | {"attention_out_bias": (False,), "mlp_bias": (False,)}, scalings=LINEAR
    ),
    "gpt_neox": Architecture(
        "gptneox",
        (
            *without(BASIC, "attention.head_count_kv"),
            ROTATED,
            *LAYER_NORM,
            SizeKey("use_parallel_residual", "bool", entry("use_parallel_residual", default=True)),
        ),
        only={"hidden_act": ("gelu", "gelu_new", "gelu_fast"), "attention_bias": (True,)},
        groups=HEADS,
        base=USUAL_BASE,
        says_type=False,
    ),
    "gemma": Architecture(
        "gemma",
        (*BASIC, *GEMMA),
        ("sentencepiece",),
        only={"hidden_act": ("gelu_pytorch_tanh",)},
        rules=TokenRules({"prefix": 67, "suffix": 69, "middle": 68, "fsep": 70, "eot": 107}, space=False),
        like="gemma2",
        base=USUAL_BASE,
    ),
    "gemma2": Architecture(
        "gemma2",
        (
            *BASIC,
            *GEMMA,
            WINDOW,
            BASE,
            SizeKey("attn_logit_softcapping", "float32", entry("attn_logit_softcapping")),
            SizeKey("final_logit_softcapping", "float32", entry("final_logit_softcapping")),
        ),
        ("sentencepiece",),
        only=GELU,
        window=2,
        rules=NO_SPACE,
    ),
    "gemma3_text": Architecture(
        "gemma3",
        besides(
            USUAL, WINDOW, SizeKey("final_logit_softcapping", "float32", entry("final_logit_softcapping"))
        ),
        SENTENCES,
        only=GELU,
        scalings=LINEAR,
        window=6,
        rules=NO_SPACE,
    ),
    "phi3": Architecture(
        "phi3",
        (
            *BASIC,
            ROTATED,
            WINDOW,
            *usual("attention.layer_norm_rms_epsilon", "rope.freq_base"),
            SizeKey("rope.scaling.original_context_length", "uint32", original_length),
            SizeKey("rope.scaling.attn_factor", "float32", long_attention),
        ),
        ("sentencepiece", "bytes"),
        only=SILU,
        scalings=("longrope",),
        plain_added=True,
    ),
    "falcon": Architecture(
        "falcon",
        (
            *besides(BASIC, FOURFOLD, SizeKey("context_length", "uint32", lambda settings: 2048)),
            *LAYER_NORM,
            BASE,
            SizeKey("attention.head_count_kv", "uint32", _kv_heads_of_falcon),
            SizeKey("tensor_data_layout", "string", lambda settings: "jploski"),
        ),
        only={"alibi": (False,), "parallel_attn": (True,), "bias": (False,), "activation": ("gelu",)},
        groups=_kv_heads_of_falcon,
    ),
    "bloom": Architecture(
        "bloom",
        besides(
            (*BASIC, *LAYER_NORM),
            FOURFOLD,
            SizeKey("context_length", "uint32", times_width(1, "seq_length")),
            SizeKey("attention.head_count_kv", "uint32", HEADS),
        ),
        only={"apply_residual_connection_post_layernorm": (False,)},
    ),
    "gpt2": Architecture(
        "gpt2",
        besides((*BASIC, *LAYER_NORM), FOURFOLD),
        only={
            "activation_function": ("gelu_new",),
            "scale_attn_by_inverse_layer_idx": (False,),
            "scale_attn_weights": (True,),
        },
    ),
    "starcoder2": Architecture(
        "starcoder2", USUAL, only={"hidden_act": ("gelu_pytorch_tanh",)}, scalings=LINEAR
    ),
    "stablelm": Architecture(
        "stablelm",
        (
            *BASIC,
            ROTATED,
            *LAYER_NORM,
            BASE,
            SizeKey("use_parallel_residual", "bool", entry("use_parallel_residual", default=True)),
        ),
        only=SILU | UNTIED | {"qk_layernorm": (False,)},
    ),
    "nemotron": Architecture(
        "nemotron",
        besides(
            (*USUAL, VOCABULARY, ROTATED),
            SizeKey("attention.layer_norm_epsilon", "float32", entry("norm_eps")),
            SizeKey("rope.scaling.type", "string", lambda settings: scaling(settings) or "none"),
        ),
        ("sentencepiece",),
        only={"hidden_act": ("relu2",)} | UNTIED,
        scalings=("linear",),
        rules=TokenRules({"pad": 0, "unk": 1}),
    ),
}
"""The families, by transformers' name of their models."""


def architecture_of(kind: str, settings: ModelSettings) -> Architecture:
    """The line of a family, for a model with this config. Raises `FormatError` for a model that llama.cpp does not run."""
    if kind not in ARCHITECTURES:
        raise FormatError(
            f"format gguf does not know models of type {kind}; it knows {', '.join(ARCHITECTURES)}. Export float, and convert "
            "that folder with convert_hf_to_gguf.py of llama.cpp"
        )
    found = ARCHITECTURES[kind]
    faults = [
        fault
        for check in (_values, _scaling, _windows, _heads, _base, _unrotated)
        for fault in check(found, settings)
    ]
    if faults:
        raise FormatError(
            f"llama.cpp runs models of type {kind} in another way: {'; '.join(faults)}. Export float or another format"
        )
    return found


Faults: TypeAlias = list[str]


def _values(architecture: Architecture, settings: ModelSettings) -> Faults:
    return [
        f"{name} is {settings[name]!r}, and llama.cpp has {' or '.join(map(repr, allowed))}"
        for name, allowed in architecture.only.items()
        if name in settings and settings[name] not in allowed
    ]


def _scaling(architecture: Architecture, settings: ModelSettings) -> Faults:
    kind = scaling(settings)
    known = ", ".join(("default", *architecture.scalings))
    return (
        [f"positions are scaled by {kind}, and llama.cpp has {known}"]
        if kind not in ("", *architecture.scalings)
        else []
    )


def _windows(architecture: Architecture, settings: ModelSettings) -> Faults:
    """Gemma's layers must alternate as llama.cpp fixes it."""
    kinds = settings.get("layer_types")
    if not architecture.window or kinds is None:
        return []
    wanted = [
        "sliding_attention" if (i + 1) % architecture.window else "full_attention" for i in range(len(kinds))
    ]
    return (
        [] if kinds == wanted else [f"not every {architecture.window}. layer, and no other, sees everything"]
    )


def _base(architecture: Architecture, settings: ModelSettings) -> Faults:
    """A base that the file does not name is the usual one."""
    own = positions(settings).get("rope_theta", architecture.base)
    return (
        [f"the base of its positions is {own}, and llama.cpp has {architecture.base}"]
        if architecture.base and own != architecture.base
        else []
    )


def _unrotated(architecture: Architecture, settings: ModelSettings) -> Faults:
    """Layers without positions are those that llama.cpp fixes."""
    rotated, every = settings.get("no_rope_layers"), architecture.unrotated
    if not every or rotated is None:
        return []
    wanted = [int((i + 1) % every > 0) for i in range(len(rotated))]
    return [] if list(rotated) == wanted else [f"not every {every}. layer, and no other, has no positions"]


def _heads(architecture: Architecture, settings: ModelSettings) -> Faults:
    """Gemma divides q by the root of a number of its own, which llama.cpp takes from the size of a head."""
    own = settings.get("query_pre_attn_scalar")
    known = (head_size(settings), WIDTH(settings) // HEADS(settings))
    return (
        [] if own is None or own in known else [f"query_pre_attn_scalar is {own}, and no head has that size"]
    )
