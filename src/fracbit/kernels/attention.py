"""Causal attention of whole sequences in fp32 on a CPU, as an evaluation over text needs it.

torch's kernel is made for long sequences and wide heads; over windows of some hundred ids and heads of 8 to 64 numbers it takes
longer than the linears. The native kernel holds 32 queries and their scores in the cache; torch's is the definition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fracbit.kernels.cpu import NATIVE

HEAD_STEP = 8
CACHE_BYTES = 1 << 18
"""The most that a head's keys and values may take: those of 512 tokens of 64 numbers."""


def attends(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the native kernel takes these: fp32 on a CPU, whole sequences, without gradients, small enough for the cache."""
    tensors = (queries, keys, values)
    return (
        NATIVE is not None
        and NATIVE.has_causal()
        and all(type(x) is Tensor and x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)
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
    """softmax(scale x queries keys^T) values over a token and those before it, fp32 [sequences, tokens, heads, head].

    queries: fp32 [sequences, heads, tokens, head]; keys, values: as many heads or a divisor of them. `attends` must hold.
    """
    assert NATIVE is not None
    sequences, heads, tokens, head = queries.shape
    result = queries.new_empty(sequences, tokens, heads, head)  # [sequences, tokens, heads, head]
    by_head = result.transpose(1, 2)  # [sequences, heads, tokens, head]
    NATIVE.attend_causal(
        queries=queries, keys=keys, values=values, out=by_head, scale=scale, threads=torch.get_num_threads()
    )
    return result
