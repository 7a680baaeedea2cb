"""`Budget`: what a user may spend, in bits of the quantized layers, whatever the unit it was asked in.

Three ways to ask: stored bits per quantized weight (scales, offsets, tables and padding count), bytes of the whole file,
bytes of a device that must also hold the KV cache and the activations of a context.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fracbit.errors import BudgetError

Question: TypeAlias = Literal["average bits", "file size", "device memory"]
_SIZES = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)


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
        """`bits` of the quantized layers in the unit of the question, such as `3.502 bits per weight` or `1.203 GB`."""
        if self.question == "average bits":
            return f"{self.per_weight(bits):.4f} bits per weight"
        return print_size(self.other_bytes + -(-bits // 8))


def average_bits(bits: float, weights: int, fixed_bits: int = 0, fixed_weights: int = 0) -> Budget:
    """At most `bits` stored bits per quantized weight, any fraction, the fixed ones among them.

    Raises `BudgetError` for NaN, 0 and below.
    """
    if not (math.isfinite(bits) and bits > 0):
        raise BudgetError(
            f"an average of {bits} bits per weight is no budget; ask for a number above 0, such as 3.5"
        )
    room = math.floor(bits * (weights + fixed_weights)) - fixed_bits
    return Budget(room, weights, "average bits", fixed_bits=fixed_bits, fixed_weights=fixed_weights)


def file_size(size: int, weights: int, other_bytes: int) -> Budget:
    """At most `size` bytes of weight files, of which `other_bytes` are float tensors and headers."""
    return _sized(
        size, weights, other_bytes, "file size", "embeddings, norms and headers, which stay as they are,"
    )


def device_memory(size: int, weights: int, other_bytes: int) -> Budget:
    """At most `size` bytes on a device; `other_bytes` are float tensors, KV cache and activations."""
    return _sized(size, weights, other_bytes, "device memory", "float tensors, KV cache and activations")


def read_size(text: str) -> int:
    """Bytes from `1.2GB` (10^9), `800MiB` (2^20) or a plain number. Raises `BudgetError` for anything else."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise BudgetError(f"{text!r} is no size; write a number and a unit, such as 1.2GB, 800MB or 6GiB")
    size = math.floor(float(match[1]) * _SIZES[(match[2] or "").lower()])
    if size < 1:
        raise BudgetError(f"{text!r} is less than a byte; write a number and a unit, such as 1.2GB")
    return size


def print_size(size: int) -> str:
    """Bytes with a decimal unit, such as `1.203 GB`."""
    for name, unit in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= unit:
            return f"{size / unit:.4g} {name}"
    return f"{size} bytes"


def _sized(size: int, weights: int, other_bytes: int, question: Question, what: str) -> Budget:
    if size <= other_bytes:
        raise BudgetError(
            f"{print_size(size)} hold nothing: {what} take {print_size(other_bytes)} already; "
            "ask for more, for a shorter context, or quantize embeddings and head too"
        )
    return Budget(8 * (size - other_bytes), weights, question, other_bytes)
