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


@dataclass(frozen=True)
class Speed:
    """Tokens per second: `prefill` of the prompt, `decode` of new tokens."""

    prefill: float
    decode: float


@dataclass(frozen=True)
class Sampling:
    """How one request is continued: at most `new_tokens`, up to the first of the texts in `stop`, which is left out.

    `temperature` 0 takes the most likely token. `top_p`: draw from the least set of tokens with this probability together.
    `seed`: that of the request's own generator; None draws one.
    """

    new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.new_tokens < 1 or not 0 <= self.temperature <= 100 or not 0 < self.top_p <= 1:
            raise DataError(
                "max_tokens must be at least 1, temperature 0 to 100 and top_p above 0 and at most 1; got "
                f"{self.new_tokens}, {self.temperature}, {self.top_p}"
            )
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise DataError(f"seed must fit into 64 bits, got {self.seed}")
        if not all(self.stop):
            raise DataError("a stop text must have at least one character")


@dataclass(frozen=True)
class Limits:
    """What a server takes on.

    - `batch`: sequences that are decoded together; `queue`: requests that wait beside them, further ones are refused.
    - `length`: tokens of a prompt and its continuation; 0: the model's positions, at most `LONG`.
    - `seconds`: that a request may take, waiting included.
    """

    batch: int = 16
    queue: int = 64
    length: int = 0
    seconds: float = 300.0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.queue < 0 or self.length < 0 or not 0 < self.seconds < math.inf:
            raise DataError(
                f"--batch and --timeout must be above 0, --queue and --max-length not below; got {self.batch}, "
                f"{self.seconds:g}, {self.queue}, {self.length}"
            )


LONG = 4096
"""Tokens of a request where neither the user nor the model sets a smaller bound."""
