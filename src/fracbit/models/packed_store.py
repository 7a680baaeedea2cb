"""`PackedStore`: a KV cache of 8 or 4 bits that the native decode step reads; transformers takes it as `past_key_values`.

Tokens become codes as in `PackedCache` (cache.py), with the same window and groups. What is not yet codes lies in the one piece
of memory of a `StoreCache`, and the codes of all layers lie in one tensor each, so that a step is given eight tensors, however
many layers there are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from fracbit.kernels import Older
from fracbit.models.cache import RoundedStates, RoundedWindow, check_rounding
from fracbit.models.store_cache import StoreCache, StoreLayer


class PackedStoreLayer(RoundedWindow, StoreLayer):
    """One layer's part: the window lies in the store, older tokens are codes."""

    is_croppable = False

    def __init__(self, store: StoreCache, index: int, bits: int, window: int, group: int) -> None:
        self.begin_rounding(bits, window, group)
        super().__init__(store, index)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add new tokens; returns keys and values [batch, heads, all tokens, head]."""
        keys, values = self.with_older(*super().update(key_states, value_states))
        if self.full:
            keys, values = keys.clone(), values.clone()  # the window moves
        self.round_oldest()
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.older + self.held

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens (a number below 0). Raises `SchemeError` beyond the window: codes cannot be cut."""
        self.check_crop(-tokens_to_remove)
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.rounded = None


class PackedStore(StoreCache):
    """A KV cache for a model with a native step. Raises `SchemeError` as `PackedCache` does."""

    def __init__(self, config: PreTrainedConfig, bits: int, window: int = 64, group: int = 64) -> None:
        check_rounding(config, bits, window, group)
        super().__init__(config, window + group)
        self.bits = bits
        self.parts = [
            PackedStoreLayer(self, index, bits, window=window, group=group) for index in range(self.count)
        ]
        self.layers = [*self.parts]
        self._joined: tuple[list[tuple[RoundedStates, RoundedStates]], Older] | None = None

    @property
    def held(self) -> int:
        """Tokens of the window: those that `data` holds."""
        return self.parts[0].held

    def added(self, tokens: int) -> None:
        """Count so many new tokens that were written into every layer of `data`."""
        super().added(tokens)
        for layer in self.parts:
            layer.round_oldest()

    @property
    def older(self) -> Older:
        """The codes of all layers, in one tensor each; layers then hold views of these."""
        held = [layer.rounded for layer in self.parts if layer.rounded is not None]
        if not held:
            return Older(self.bits)
        if self._joined is None or any(
            one is not other for one, other in zip(self._joined[0], held, strict=True)
        ):
            # [layers, batch, heads, groups, ...] each
            both = [
                [torch.stack([*parts]) for parts in zip(*map(_tensors, some), strict=True)]
                for some in zip(*held, strict=True)
            ]
            for index, layer in enumerate(self.parts):
                keys, values = (RoundedStates(*(part[index] for part in parts)) for parts in both)
                layer.rounded = keys, values
            held = [layer.rounded for layer in self.parts if layer.rounded is not None]
            self._joined = held, Older(self.bits, [*both[0], *both[1]])
        return self._joined[1]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch."""
        super().batch_repeat_interleave(repeats)
        for layer in self.parts:
            layer.change_older(lambda part: part.repeat_interleave(repeats, 0))

    def _select(self, sequences: Tensor) -> None:
        super()._select(sequences)
        for layer in self.parts:
            layer.change_older(lambda part: part.index_select(0, sequences.to(part.device)))


def _tensors(states: RoundedStates) -> tuple[Tensor, Tensor, Tensor]:
    return states.codes, states.low, states.step
