"""The keys of config.json of before transformers 5, which other programs read: without them they take their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OWN_KEYS = ("rope_theta", "partial_rotary_factor")
"""Entries of `rope_parameters` that were keys of their own."""


def with_old_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with older keys beside its `rope_parameters`; those that it has stay as they are.

    They are `rope_theta`, `rope_scaling`, the share of a head that is rotated and, where layers differ, `rope_local_base_freq`.
    """
    found = dict(config)
    if isinstance(config.get("text_config"), Mapping):
        found["text_config"] = with_old_keys(config["text_config"])
    rope = config.get("rope_parameters") or {}
    whole = rope.get("full_attention", rope)
    local = rope.get("sliding_attention", {})
    old: dict[str, Any] = {}
    if "rope_theta" in whole:
        old["rope_theta"] = whole["rope_theta"]
    if "rope_theta" in local:
        old["rope_local_base_freq"] = local["rope_theta"]
    if "partial_rotary_factor" in whole:
        old["partial_rotary_factor"] = whole["partial_rotary_factor"]
        if config.get("model_type") == "gpt_neox":
            old["rotary_pct"] = whole["partial_rotary_factor"]
    if whole.get("rope_type", "default") != "default":
        old["rope_scaling"] = {name: value for name, value in whole.items() if name not in OWN_KEYS}
    return old | found
