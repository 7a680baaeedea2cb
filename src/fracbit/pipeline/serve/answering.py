"""Sequences that are decoded together, and may join and leave between two tokens.

With a native step they are one batch over one cache: sequences of different lengths end at one place, and what lies before
them is masked. Without one, each has its own cache and they take turns, whatever the model's cache is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fracbit.models.step import Decoder
from fracbit.models.store_cache import StoreCache, stacked
from fracbit.pipeline.serve.generation import new_cache, read_prompt, step_of
from fracbit.records.generating import PREFILL_CHUNK


class Answering(Protocol):
    """The sequences at work. Use one from one thread, in inference mode. `name`: how a token is made."""

    name: str

    def read(self, ids: Sequence[int]) -> tuple[Any, Tensor]:
        """Read a prompt; what a row needs to join, and the logits [vocabulary] fp32 of the next token."""
        ...

    def arrange(self, stay: Sequence[int], join: Sequence[Any]) -> None:
        """Keep the rows of these numbers, in order, and put others after them."""
        ...

    def advance(self, tokens: Sequence[int]) -> Tensor:
        """Give every row its next token; logits [rows, vocabulary] fp32."""
        ...


def answering_of(model: PreTrainedModel, kv_bits: int = 16) -> Answering:
    """The fastest kind that the model and a KV cache of `kv_bits` allow. Choose activations first."""
    step = step_of(model)
    if step.decoder is None:
        return SingleAnswering(model, kv_bits, step.name)
    if kv_bits != 16:
        return SingleAnswering(
            model, kv_bits, f"layer by layer: requests do not share a KV cache of {kv_bits} bits"
        )
    return TogetherAnswering(model, step.decoder, step.name)


class TogetherAnswering:
    """One batch of the native step. State: the cache, and how many positions are masked before each row."""

    def __init__(self, model: PreTrainedModel, decoder: Decoder, name: str) -> None:
        self.model, self.decoder, self.name = model, decoder, name
        self.cache: StoreCache | None = None
        self.pads: list[int] = []

    def read(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See `Answering`; the row is its keys and values, [layers, 2, 1, heads, tokens, head]."""
        cache = StoreCache(self.model.config, len(ids))
        row = torch.tensor([list(ids)])  # [1, tokens]
        logits = read_prompt(self.model, row, mask=torch.ones_like(row), cache=cache, chunk=PREFILL_CHUNK)[0]
        data = cache.release()
        assert data is not None
        return data[..., : len(ids), :], logits

    def arrange(self, stay: Sequence[int], join: Sequence[Tensor]) -> None:
        """See `Answering`. The cache is copied once, however many come and go."""
        sequences = [self._sequence(row) for row in stay] + list(join)
        lengths = [each.shape[-2] for each in sequences]
        old, self.cache = self.cache, stacked(self.model.config, sequences) if sequences else None
        if old is not None:
            old.release()
        self.pads = [max(lengths) - length for length in lengths]

    def _sequence(self, row: int) -> Tensor:
        assert self.cache is not None
        assert self.cache.data is not None
        return self.cache.data[:, :, row : row + 1, :, self.pads[row] : self.cache.held]

    def advance(self, tokens: Sequence[int]) -> Tensor:
        """See `Answering`."""
        assert self.cache is not None
        return self.decoder.advance(torch.tensor(list(tokens)), torch.tensor(self.pads), self.cache)


class SingleAnswering:
    """Sequences that take turns, layer by layer, each with its ids and its cache."""

    def __init__(self, model: PreTrainedModel, kv_bits: int, name: str) -> None:
        self.model, self.kv_bits, self.name = model, kv_bits, name
        self.held: list[tuple[list[int], Any]] = []

    def read(self, ids: Sequence[int]) -> tuple[tuple[list[int], Any], Tensor]:
        """See `Answering`."""
        row = (list(ids), new_cache(self.model, self.kv_bits))
        return row, self._next(row)

    def arrange(self, stay: Sequence[int], join: Sequence[tuple[list[int], Any]]) -> None:
        """See `Answering`."""
        self.held = [self.held[row] for row in stay] + list(join)

    def advance(self, tokens: Sequence[int]) -> Tensor:
        """See `Answering`."""
        for (ids, _), token in zip(self.held, tokens, strict=True):
            ids.append(token)
        return torch.stack([self._next(row) for row in self.held])

    def _next(self, row: tuple[list[int], Any]) -> Tensor:
        ids, cache = row
        whole = torch.tensor([ids], device=self.model.device)  # [1, tokens]
        return read_prompt(self.model, whole, mask=torch.ones_like(whole), cache=cache, chunk=PREFILL_CHUNK)[
            0
        ].cpu()
