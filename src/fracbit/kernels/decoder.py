"""`NativeDecoder`: one token through all blocks of a decoder of Llama's shape, in one call.

At batch 1 a decode step of a small model spends more time between its products than in them. Here no part of it is Python:
linears that read one input share its rounding and are given to the threads together, and attention reads the cache where it
lies. Sums are fp32 throughout, so logits are at least as exact as those of a model in 16 bits. The native code is
`native/step.cpp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fracbit.errors import KernelError
from fracbit.kernels import cpu
from fracbit.kernels.kernel import Activations
from fracbit.kernels.linear import PackedLinear

Weight = PackedLinear | Tensor
"""Packed, or floats [rows, columns]."""


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder: `hidden` numbers a token, `heads` of `head` numbers that share `kv_heads`; `epsilon` of the norms."""

    hidden: int
    heads: int
    kv_heads: int
    head: int
    epsilon: float


@dataclass(frozen=True, eq=False)
class DecoderBlock:
    """`layers`: query, key, value, out, gate, up, down, each with its bias [out] or None. `gains`: of the norms before
    attention and before the MLP [hidden], then of those inside query and key heads [head], or None.
    """

    layers: Sequence[tuple[Weight, Tensor | None]]
    gains: Sequence[Tensor | None]


class NativeDecoder:
    """Blocks that are run one token at a time. Weights are shared with the caller, who must not write to them afterwards.

    `embedding`, `logits`: the tables [vocabulary, hidden]; `gain` [hidden]: of the last norm.
    Raises `KernelError` when a part does not fit or the native module is not there.
    """

    def __init__(
        self,
        shape: DecoderShape,
        *,
        embedding: Weight,
        logits: Weight,
        gain: Tensor,
        blocks: Sequence[DecoderBlock],
        activations: Activations,
    ) -> None:
        if cpu.NATIVE is None:
            raise KernelError(cpu.NOTE)
        self.vocabulary = _rows(logits)
        try:
            self._native = cpu.NATIVE.Decoder(
                hidden=shape.hidden,
                heads=shape.heads,
                kv_heads=shape.kv_heads,
                head=shape.head,
                epsilon=shape.epsilon,
                scale=shape.head**-0.5,
                int8=activations == "int8",
                embedding=(_native(embedding), None),
                logits=(_native(logits), None),
                gain=_float(gain),
            )
            for block in blocks:
                layers = [
                    (_native(weight), None if bias is None else _float(bias)) for weight, bias in block.layers
                ]
                self._native.add_block(
                    layers, [None if gain is None else _float(gain) for gain in block.gains]
                )
        except (ValueError, TypeError) as error:
            raise KernelError(f"these layers do not make a decoder: {error}") from None

    def advance(
        self, store: Tensor, held: int, tokens: Tensor, *, pads: Tensor, cosines: Tensor, sines: Tensor
    ) -> Tensor:
        """Read `tokens` [batch] after the `held` ones of `store`; fp32 logits [batch, vocabulary].

        `store` [blocks, 2, batch, kv_heads, room, head] takes the new keys and values; the first `pads[n]` positions of
        sequence n are padding; `cosines` and `sines` [room, head] are those of the rotation.
        Raises `KernelError` when something does not fit.
        """
        logits = torch.empty(len(tokens), self.vocabulary)  # [batch, vocabulary]
        threads = torch.get_num_threads()
        try:
            self._native.advance(
                store, held, tokens, pads, cosines=cosines, sines=sines, logits=logits, threads=threads
            )
        except (ValueError, TypeError) as error:
            raise KernelError(f"a decode step cannot run: {error}") from None
        return logits


def _native(weight: Weight) -> Any:
    if isinstance(weight, Tensor):
        return weight.detach().contiguous()
    if not isinstance(weight.prepared, cpu.CpuWeight):
        raise KernelError(
            f"a weight runs on the kernel {weight.kernel.name}; a native decoder needs weights of the kernel cpu"
        )
    return weight.prepared.weight


def _rows(weight: Weight) -> int:
    return int(weight.shape[0]) if isinstance(weight, Tensor) else weight.packed.shape[0]


def _float(part: Tensor) -> Tensor:
    return part.detach().float().contiguous()
