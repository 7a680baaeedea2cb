"""Causal attention of whole sequences on a CPU, for calibrating a model and judging it over text.

torch's kernel is made for long sequences and wide heads: over windows of some hundred tokens it takes longer than the products
of the layers. The native kernel works on 32 queries at a time and keeps their scores in the cache. It computes in fp32, also
for 16-bit states, and needs AVX-512; torch's kernel runs everywhere else and is the definition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fracbit.kernels.cpu import NATIVE

HEAD_STEP = 8
"""A head must be a multiple of it: kHeadStep of native/attention.h."""
CACHE_BYTES = 1 << 19
"""The most that a head's keys and values may take in fp32: those of 512 tokens of 128 numbers."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def attends(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the native kernel can run these: floats on a CPU, whole sequences, no gradients, small enough for the cache."""
    tensors = (queries, keys, values)
    return (
        NATIVE is not None
        and NATIVE.has_causal()
        and all(type(x) is Tensor and x.device.type == "cpu" and x.dtype in FLOATS for x in tensors)
        and all(x.stride(-1) == 1 for x in tensors)
        and not any(x.requires_grad for x in tensors)
        and keys.shape == values.shape
        and queries.shape[0] == keys.shape[0]
        and queries.shape[1] % keys.shape[1] == 0
        and queries.shape[2:] == keys.shape[2:]
        and queries.shape[3] % HEAD_STEP == 0
        and 8 * keys.shape[2] * keys.shape[3] <= CACHE_BYTES
    )


def attend_causal(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """softmax(scale * queries keys^T) values over a token and those before it: [sequences, tokens, heads, head].

    `queries` is [sequences, heads, tokens, head]; `keys` and `values` have as many heads or a divisor of them. The result has
    the type of the queries and is computed in fp32. `attends` must hold for the three.
    """
    assert NATIVE is not None
    sequences, heads, tokens, head = queries.shape
    result = queries.new_empty(sequences, tokens, heads, head, dtype=torch.float32)
    by_head = result.transpose(1, 2)  # [sequences, heads, tokens, head]
    NATIVE.attend_causal(
        queries=queries.float(),
        keys=keys.float(),
        values=values.float(),
        out=by_head,
        scale=scale,
        threads=torch.get_num_threads(),
    )
    return result.to(queries.dtype)
