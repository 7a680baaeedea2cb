"""How fast a model generates: tokens per second of greedy decoding with a KV cache, batch 1."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel


@dataclass(frozen=True)
class Speed:
    """Tokens per second: `prefill` of the prompt, `decode` of new tokens (the median step)."""

    prefill: float
    decode: float


@torch.inference_mode()
def generation_speed(
    model: PreTrainedModel,
    prompt: Tensor,
    new_tokens: int = 32,
    cache: Cache | None = None,
    step: Callable[[Tensor], Tensor] | None = None,
) -> Speed:
    """Time one prompt [tokens] and `new_tokens` greedy steps, in `cache` if given; the first step is not counted.

    `step` makes logits [1, vocabulary] of a token [1] in place of the model, in the same cache.
    """
    started = time.perf_counter()
    state = model(prompt[None], past_key_values=cache, use_cache=True)
    prefill = len(prompt) / (time.perf_counter() - started)
    held = state.past_key_values

    def by_model(token: Tensor) -> Tensor:
        logits: Tensor = model(token[:, None], past_key_values=held, use_cache=True).logits[:, -1]
        return logits

    logits, advance, steps = state.logits[:, -1], step or by_model, []
    for _ in range(new_tokens):
        following = logits.argmax(-1)
        started = time.perf_counter()
        logits = advance(following)
        steps.append(time.perf_counter() - started)
    return Speed(prefill, 1 / statistics.median(steps[1:] or steps))
