"""`Budget`: what a user may spend, in bits of the quantized layers, however it was asked for.

Three ways to ask: stored bits per quantized weight (scales, offsets, tables and padding count), bytes of the whole file,
bytes of a device that must also hold the KV cache and the activations of a context.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fracbit.errors import BudgetError
from fracbit.records.sizes import print_size

Question: TypeAlias = Literal["average bits", "file size", "device memory"]


@dataclass(frozen=True)
class Budget:
    """Bits that the quantized layers may take in all.

    - `bits`: at most this many; `weights`: how many weights share them.
    - `other_bytes`: what else the answer counts: the float tensors and headers of a file, on a device also cache and
      activations.
    - `fixed_bits` of `fixed_weights`: quantized as the recipe says, whatever the budget; they count in an average.
    - `question`: what was asked for; only for how figures are printed and how much may be left over.
    """

    bits: int
    weights: int
    question: Question
    other_bytes: int = 0
    fixed_bits: int = 0
    fixed_weights: int = 0

    def per_weight(self, bits: int) -> float:
        """Stored bits per quantized weight when the layers that share the budget take `bits`."""
        return (bits + self.fixed_bits) / (self.weights + self.fixed_weights)

    def figure(self, bits: int) -> str:
        """`bits` of the quantized layers in the terms of the question, such as `3.502 bits per weight` or `1.203 GB`."""
        if self.question == "average bits":
            return f"{self.per_weight(bits):.4f} bits per weight"
        return print_size(self.other_bytes + -(-bits // 8))


def average_bits(bits: float, weights: int, fixed_bits: int = 0, fixed_weights: int = 0) -> Budget:
    """At most `bits` stored bits per quantized weight, any fraction, the fixed ones among them.

    Raises `BudgetError` for NaN, 0 and below.
    """
    if not (math.isfinite(bits) and bits > 0):
        raise BudgetError(
            f"an average of {bits} bits per weight is not a budget; ask for a number above 0, such as 3.5"
        )
    room = math.floor(bits * (weights + fixed_weights)) - fixed_bits
    return Budget(room, weights, "average bits", fixed_bits=fixed_bits, fixed_weights=fixed_weights)


def file_size(size: int, weights: int, other_bytes: int) -> Budget:
    """At most `size` bytes of weight files, of which `other_bytes` are float tensors and headers. Raises `BudgetError`."""
    _check_room(size, other_bytes, "embeddings, norms and headers, which stay as they are,")
    return Budget(8 * (size - other_bytes), weights, "file size", other_bytes)


def device_memory(size: int, weights: int, other_bytes: int) -> Budget:
    """At most `size` bytes on a device; `other_bytes` are float tensors, KV cache and activations. Raises `BudgetError`."""
    _check_room(size, other_bytes, "float tensors, KV cache and activations")
    return Budget(8 * (size - other_bytes), weights, "device memory", other_bytes)


def _check_room(size: int, other_bytes: int, what: str) -> None:
    if size <= other_bytes:
        raise BudgetError(
            f"{print_size(size)} is too little: {what} take {print_size(other_bytes)} already; "
            "ask for more, for a shorter context, or quantize embeddings and head too"
        )
