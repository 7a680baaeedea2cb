"""`StoreCache`: a KV cache in one piece of memory with room to grow; plain transformers takes it as `past_key_values`.

transformers' dynamic cache copies itself for every token. Here new tokens are written into memory set aside for them, and the
native decode step (step.py) reads all layers from one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from fracbit.errors import KernelError
from fracbit.kernels import NOTHING, Older

LEAST_ROOM = 64  # tokens


class StoreLayer(DynamicLayer):
    """One layer's part of the cache. What is assigned to `keys` or `values` replaces what was held."""

    def __init__(self, store: StoreCache, index: int) -> None:
        self.store, self.index, self.held = store, index, 0
        super().__init__()  # type: ignore[no-untyped-call]

    @property
    def keys(self) -> Tensor | None:
        """[batch, heads, held, head], a view."""
        return self.store.view(self.index, 0, self.held)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._take(0, value)

    @property
    def values(self) -> Tensor | None:
        """[batch, heads, held, head], a view."""
        return self.store.view(self.index, 1, self.held)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._take(1, value)

    def _take(self, which: int, value: Tensor | None) -> None:
        if value is None or value.dim() < 4:  # an empty one, before there is a shape
            return
        self.held = value.shape[-2]
        self.store.make_room(value, self.held)
        self.store.part(self.index, which)[:, :, : self.held] = value  # [batch, heads, held, head]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add new tokens; returns keys and values [batch, heads, all tokens, head], views of the store."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, end = self.held, self.held + key_states.shape[-2]
        self.store.make_room(key_states, end)
        for which, states in enumerate((key_states, value_states)):
            self.store.part(self.index, which)[:, :, begin:end] = states  # [batch, heads, new, head]
        self.held = end
        return self.store.part(self.index, 0)[:, :, :end], self.store.part(self.index, 1)[:, :, :end]

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.held

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens (a number below 0)."""
        self.held = max(self.held + tokens_to_remove, 0)

    def reset(self) -> None:
        """Forget everything."""
        self.held = 0


class StoreCache(Cache):
    """A KV cache for `model(past_key_values=...)` and `generate`, for models with full attention in all layers.

    `room`: tokens that fit before it has to grow. Sequences cannot be added to or taken from a batch once it holds some.
    """

    def __init__(self, config: PreTrainedConfig, room: int = LEAST_ROOM) -> None:
        self.data: Tensor | None = None  # [layers, 2, batch, heads, room, head]
        self.room, self.count = max(room, LEAST_ROOM), config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[StoreLayer(self, index) for index in range(self.count)])

    @property
    def held(self) -> int:
        """Tokens held."""
        return int(self.get_seq_length())

    @property
    def older(self) -> Older:
        """Tokens before those of `data`."""
        return NOTHING

    def make_room(self, like: Tensor, tokens: int) -> None:
        """Make room for `tokens` tokens of states like `like` [batch, heads, tokens, head]; what is held stays."""
        old = self.data
        if old is not None and tokens <= old.shape[-2]:
            return
        while self.room < tokens:
            self.room *= 2
        batch, heads, _, head = like.shape
        shape = (self.count, 2, batch, heads, self.room, head)
        try:
            self.data = like.new_zeros(shape)
        except RuntimeError:  # out of memory, or more bytes than 64 bits count
            size = math.prod(shape) * like.element_size() / 1e9
            raise KernelError(
                f"a KV cache for {self.room} tokens takes {size:.4g} GB, which is more memory than there is; "
                "ask for fewer tokens, or begin a new conversation"
            ) from None
        if old is not None:
            self.data[..., : old.shape[-2], :] = old  # [layers, 2, batch, heads, old room, head]

    def part(self, layer: int, which: int) -> Tensor:
        """Keys (0) or values (1) of a layer with all their room."""
        assert self.data is not None
        return self.data[layer, which]  # [batch, heads, room, head]

    def view(self, layer: int, which: int, held: int) -> Tensor | None:
        """Keys (0) or values (1) of a layer, None before there are any."""
        return (
            None if self.data is None else self.data[layer, which][:, :, :held]
        )  # [batch, heads, held, head]

    def added(self, tokens: int) -> None:
        """Count so many new tokens that were written into every layer of `data`."""
        for layer in self.layers:
            assert isinstance(layer, StoreLayer)
            layer.held += tokens

    def release(self) -> Tensor | None:
        """Give the memory up, and return it; the cache is of no use afterwards.

        Cache and layers refer to each other: without this, the memory would wait for Python's collector of cycles.
        """
        data, self.data = self.data, None
        return data

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch for beam search."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch."""
        if self.data is not None:
            self.data = self.data.repeat_interleave(repeats, 2)  # [layers, 2, batch * repeats, ...]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences of the batch."""
        self._select(indices)

    def _select(self, sequences: Tensor) -> None:
        if self.data is not None:
            self.data = self.data.index_select(2, sequences.to(self.data.device))


def stacked(config: PreTrainedConfig, sequences: Sequence[Tensor]) -> StoreCache:
    """A cache of several sequences, each [layers, 2, 1, heads, its tokens, head], shorter ones after zeros."""
    longest = max(each.shape[-2] for each in sequences)
    cache = StoreCache(config, longest + LEAST_ROOM)
    first = sequences[0]
    layers, two, _, heads, _, head = first.shape
    cache.data = first.new_zeros((layers, two, len(sequences), heads, cache.room, head))
    for row, each in enumerate(sequences):
        cache.data[:, :, row : row + 1, :, longest - each.shape[-2] : longest] = each
    cache.added(longest)
    return cache


def store_bytes(cache: StoreCache) -> int:
    """Bytes of the keys and values held; the room beyond them is not counted."""
    if cache.data is None:
        return 0
    return cache.data[..., : cache.held, :].numel() * cache.data.element_size()
