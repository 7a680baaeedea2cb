"""Memory that a running model needs besides its weights: KV cache and activations, computed from the config.

    cache        sum over blocks of 2 (keys, values) x kv heads x head size x min(context, window of that block) x bytes
    activations  context x (residual, normed copy, the widest of attention's and the MLP's intermediates) x bytes + last logits

Attention is counted as in transformers' sdpa, without a matrix of context x context. The result is an estimate, rounded
up where it must guess. It does not include the process itself (Python, torch, a GPU context).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fracbit.errors import BudgetError

INNER = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")


@dataclass(frozen=True)
class RunningMemory:
    """Bytes that a running model takes besides its weights."""

    cache: int
    activations: int

    @property
    def bytes(self) -> int:
        """Both together."""
        return self.cache + self.activations


def running_memory(config: Any, context: int, batch: int = 1, bytes_each: int = 2) -> RunningMemory:
    """Cache and activations of `batch` sequences of `context` tokens, numbers of `bytes_each` bytes.

    `config` is a transformers config. Raises `BudgetError` for a context below 1 or beyond the model's positions.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if context < 1 or batch < 1:
        raise BudgetError(f"context and batch must be at least 1, got {context} tokens and {batch} sequences")
    if limit and context > limit:
        raise BudgetError(
            f"a context of {context} is longer than the model's {limit} positions; ask for at most {limit}"
        )
    heads = int(text.num_attention_heads)
    kv_heads = int(
        getattr(text, "num_key_value_heads", None) or (1 if getattr(text, "multi_query", False) else heads)
    )
    head = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    tokens = sum(min(context, window or context) for window in _windows(text))
    cache = 2 * tokens * kv_heads * head * batch * bytes_each
    width = int(text.hidden_size)
    inner = next((int(size) for name in INNER if (size := getattr(text, name, None))), 4 * width)
    experts = int(getattr(text, "num_experts_per_tok", None) or 1)
    widest = max(2 * inner * experts, (2 * heads + 2 * kv_heads) * head)
    activations = batch * (context * (3 * width + widest) * bytes_each + 4 * int(text.vocab_size))
    return RunningMemory(cache, activations)


def _windows(text: Any) -> Sequence[int | None]:
    """The sliding window of every block, None where it attends to everything."""
    blocks = int(text.num_hidden_layers)
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if kinds:
        return [window if kind == "sliding_attention" else None for kind in kinds]
    slides = getattr(text, "use_sliding_window", True)
    return [window if slides else None] * blocks
