"""What a GGUF file says of the sizes of a model, as data: the name of every fact, its type, and where the config has it.

A key stands below the architecture's name: `context_length` is `llama.context_length`. One without a value is left out.

Ref: convert_hf_to_gguf.py of llama.cpp, build 11434.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

ModelSettings: TypeAlias = Mapping[str, Any]
"""The config of a model as a dictionary."""
Value: TypeAlias = Callable[[ModelSettings], Any]
"""Finds a fact in a config; None where it has none."""


@dataclass(frozen=True)
class SizeKey:
    """A fact: its `name` below the architecture's, the type that it is stored in, and its value."""

    name: str
    kind: Literal["uint32", "float32", "bool", "string"]
    value: Value


def entry(*names: str, default: Any = None) -> Value:
    """The value of the first of `names` that the config has."""
    return lambda settings: next((settings[name] for name in names if name in settings), default)


def nonzero(name: str) -> Value:
    """The value of an entry of the config; None for 0."""
    return lambda settings: settings.get(name) or None


WIDTH, HEADS = entry("hidden_size", "n_embd"), entry("num_attention_heads", "n_head")


def times_width(factor: int, *names: str) -> Value:
    """The first of `names` that the config has a value for, else a multiple of the width."""
    return lambda settings: next(
        (settings[name] for name in names if settings.get(name) is not None), factor * WIDTH(settings)
    )


def positions(settings: ModelSettings) -> Mapping[str, Any]:
    """How positions are rotated, in layers that see everything."""
    found: Mapping[str, Any] = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    own: Mapping[str, Any] = found.get("full_attention", found)
    return {"rope_theta": settings["rope_theta"], **own} if "rope_theta" in settings else own


def other_base(settings: ModelSettings) -> Any:
    """The base of the positions, where it is not 10000."""
    base = positions(settings).get("rope_theta")
    return None if base == USUAL_BASE else base


def scaling(settings: ModelSettings) -> str:
    """The name of the way in which positions are scaled; "" for none."""
    kind = str(positions(settings).get("rope_type", positions(settings).get("type", "default")))
    return "" if kind == "default" else kind


def original_length(settings: ModelSettings) -> int | None:
    """The number of positions that a model was trained on, before they were scaled."""
    name = "original_max_position_embeddings"
    found = positions(settings).get(name, settings.get(name))
    return None if found is None else int(found)


def long_attention(settings: ModelSettings) -> float | None:
    """By how much attention grows where positions are scaled by one factor for every frequency (LongRoPE)."""
    before = original_length(settings)
    if not positions(settings).get("long_factor") or before is None:
        return None
    factor = settings["max_position_embeddings"] / before
    return math.sqrt(1 + math.log(factor) / math.log(before)) if factor > 1 else 1.0


def _scaled(*names: str, kinds: tuple[str, ...] = ("yarn",)) -> Value:
    """The first of `names` that stands beside a scaling of these kinds."""
    return lambda settings: entry(*names)(positions(settings)) if scaling(settings) in kinds else None


def _window_theta(settings: ModelSettings) -> Any:
    """The base of the positions in layers that see a window."""
    return (settings.get("rope_parameters") or {}).get("sliding_attention", {}).get("rope_theta")


def head_size(settings: ModelSettings) -> int:
    """Numbers of a head."""
    return int(settings.get("head_dim") or WIDTH(settings) // HEADS(settings))


def rotated_size(settings: ModelSettings) -> int:
    """How many numbers of a head are rotated, where that is a share of them."""
    name = "partial_rotary_factor"
    return int(positions(settings).get(name, settings.get(name, 1.0)) * WIDTH(settings)) // int(
        HEADS(settings)
    )


ROPE = "rope.scaling"
USUAL_BASE = 10000
USUAL = (
    SizeKey("block_count", "uint32", entry("num_hidden_layers", "n_layer")),
    SizeKey("context_length", "uint32", entry("max_position_embeddings", "n_ctx", "n_positions")),
    SizeKey("embedding_length", "uint32", WIDTH),
    SizeKey("feed_forward_length", "uint32", entry("intermediate_size")),
    SizeKey("attention.head_count", "uint32", HEADS),
    SizeKey("attention.head_count_kv", "uint32", entry("num_key_value_heads")),
    SizeKey(f"{ROPE}.type", "string", lambda c: scaling(c) if scaling(c) in ("linear", "yarn") else None),
    SizeKey(f"{ROPE}.factor", "float32", _scaled("factor", kinds=("linear", "yarn"))),
    SizeKey(
        f"{ROPE}.original_context_length",
        "uint32",
        lambda c: original_length(c) if scaling(c) == "yarn" else None,
    ),
    SizeKey(f"{ROPE}.yarn_ext_factor", "float32", _scaled("extrapolation_factor")),
    SizeKey(f"{ROPE}.yarn_attn_factor", "float32", _scaled("attention_factor", "attn_factor")),
    SizeKey(f"{ROPE}.yarn_beta_fast", "float32", _scaled("beta_fast")),
    SizeKey(f"{ROPE}.yarn_beta_slow", "float32", _scaled("beta_slow")),
    SizeKey("rope.freq_base", "float32", lambda settings: positions(settings).get("rope_theta")),
    SizeKey("rope.freq_base_swa", "float32", _window_theta),
    SizeKey("attention.layer_norm_rms_epsilon", "float32", entry("rms_norm_eps", "norm_eps")),
    SizeKey(
        "attention.layer_norm_epsilon",
        "float32",
        entry("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    ),
    SizeKey("expert_count", "uint32", entry("num_local_experts", "num_experts")),
    SizeKey("expert_used_count", "uint32", entry("num_experts_per_tok")),
    SizeKey("attention.key_length", "uint32", entry("head_dim")),
    SizeKey("attention.value_length", "uint32", entry("head_dim")),
)
"""What most families say."""
BASIC = USUAL[:6]
"""Their sizes alone."""


def besides(keys: tuple[SizeKey, ...], *own: SizeKey) -> tuple[SizeKey, ...]:
    """The `keys`, but for those in whose place `own` has one of the same name, and `own`."""
    names = {key.name for key in own}
    return (*(key for key in keys if key.name not in names), *own)


def without(keys: tuple[SizeKey, ...], *names: str) -> tuple[SizeKey, ...]:
    """The `keys` but for those with these names."""
    return tuple(key for key in keys if key.name not in names)


def usual(*names: str) -> tuple[SizeKey, ...]:
    """Those of the usual keys with these names."""
    return tuple(key for key in USUAL if key.name in names)
