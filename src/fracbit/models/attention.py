"""The attention that a model's own code calls, replaced for the time of a call.

transformers looks an attention function up by name in every layer; fracbit registers one that takes the native kernel where
that fits (on a CPU, causal, no mask, no dropout, no gradients) and is `sdpa`, torch's, everywhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fracbit.kernels.attention import attend_causal, attends

NAME = "fracbit"
PLAIN = frozenset({"use_cache", "position_ids", "cache_position", "sliding_window"})
"""Further arguments that change nothing where there is no mask; with any other argument, torch's attention is called."""


def forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **further: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: [sequences, heads, tokens, head] to [sequences, tokens, heads, head]."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = all(name in PLAIN or given is None for name, given in further.items())
    if causal and plain and attention_mask is None and not dropout and attends(query, key, value):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attend_causal(query, key, value, scale), None
    result: tuple[Tensor, None] = sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **further,
    )
    return result


AttentionInterface.register(NAME, forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def native_attention(model: PreTrainedModel) -> Iterator[None]:
    """Give a model that asks for torch's attention the native one where that fits; its config is put back afterwards.

    Models that choose their attention and mask themselves (Falcon) are left alone: another name would give them another mask.
    """
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa" or not model._supports_attention_backend:
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
