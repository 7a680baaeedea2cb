"""How fast a model generates: tokens per second of greedy decoding with a KV cache, batch 1."""

from __future__ import annotations

import statistics
import time
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
    model: PreTrainedModel, prompt: Tensor, new_tokens: int = 32, cache: Cache | None = None
) -> Speed:
    """Time one prompt [tokens] and `new_tokens` greedy steps, in `cache` if given; the first step is not counted."""
    started = time.perf_counter()
    state = model(prompt[None], past_key_values=cache, use_cache=True)
    prefill = len(prompt) / (time.perf_counter() - started)
    steps = []
    for _ in range(new_tokens):
        following = state.logits[:, -1:].argmax(-1)
        started = time.perf_counter()
        state = model(following, past_key_values=state.past_key_values, use_cache=True)
        steps.append(time.perf_counter() - started)
    return Speed(prefill, 1 / statistics.median(steps[1:] or steps))
