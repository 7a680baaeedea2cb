"""How text is generated, and what a measurement of it runs. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fracbit.errors import DataError, SchemeError

KV_BITS = (8, 4)
"""Widths of a packed KV cache."""
PREFILL_CHUNK = 512


def check_kv_bits(kv_bits: int) -> None:
    """Raises `SchemeError` for anything but the model's own type (16) and the widths of a packed cache."""
    if kv_bits not in (16, *KV_BITS):
        raise SchemeError(f"a KV cache has 16 bits (the model's own type), 8 or 4, got {kv_bits}")


@dataclass(frozen=True)
class Settings:
    """How to generate. `kv_bits` 16 keeps the cache in the model's own type; `prefill_chunk` is in tokens."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    kv_bits: int = 16
    prefill_chunk: int = PREFILL_CHUNK

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not 0 <= self.temperature < math.inf or self.prefill_chunk < 1:
            raise DataError(
                "max_new_tokens and prefill_chunk must be at least 1 and temperature at least 0, got "
                f"{self.max_new_tokens}, {self.prefill_chunk}, {self.temperature}"
            )
        check_kv_bits(self.kv_bits)


@dataclass(frozen=True)
class Load:
    """What is run: a prompt of random tokens, greedy steps after it, and the bits of the KV cache."""

    prompt_tokens: int = 128
    new_tokens: int = 32
    kv_bits: int = 16

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.new_tokens < 1:
            raise DataError(
                f"prompt_tokens and new_tokens must be at least 1, got {self.prompt_tokens} and {self.new_tokens}"
            )
        check_kv_bits(self.kv_bits)
