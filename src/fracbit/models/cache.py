"""`PackedCache`: a KV cache with 8 or 4 bits a number; plain transformers takes it as `past_key_values`.

Keys have channels that are large for every token, values do not (KIVI: Liu et al. 2024, arXiv:2402.02750, section 3).
So keys share a range per channel over `group` tokens, values share one per token over the head; the newest tokens, at
least `window` of them, stay in full precision:

    x ~ low + step * code,  step = (max - low) / (2^bits - 1),  code = round((x - low) / step),  low and step in 16 bits

A token is rounded once, when it leaves the window, and never again. Attention reads floats: each layer's codes are decoded
when that layer runs and the floats are dropped after it, so that only codes are held over the whole context.
Layers that do not grow with the context (sliding windows, recurrent states) stay as transformers has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from fracbit.errors import SchemeError
from fracbit.models.store_cache import StoreCache, store_bytes
from fracbit.records.generating import KV_BITS

CHANNEL, TOKEN = -2, -1  # the dimension of [batch, heads, groups, group, head] that shares a range


@dataclass(frozen=True)
class RoundedStates:
    """Keys or values as codes, uint8 [batch, heads, groups, group, head * bits / 8], and the ranges they share."""

    codes: Tensor
    low: Tensor
    step: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> RoundedStates:
        """The same with every part changed."""
        return RoundedStates(change(self.codes), change(self.low), change(self.step))

    @property
    def bytes(self) -> int:
        """Bytes held."""
        return sum(part.numel() * part.element_size() for part in (self.codes, self.low, self.step))


def round_states(x: Tensor, bits: int, shared: int) -> RoundedStates:
    """`x` [batch, heads, groups, group, head] as codes of `bits` that share a range along dimension `shared`."""
    exact, sixteen = x.float(), torch.float16 if x.dtype == torch.float32 else x.dtype
    low = exact.amin(shared, keepdim=True).to(sixteen)  # [batch, heads, groups, 1, head] or [..., group, 1]
    step = ((exact.amax(shared, keepdim=True) - low) / (2**bits - 1)).to(sixteen)  # as low
    codes = (exact - low) / step.float().masked_fill(step == 0, 1)  # [batch, heads, groups, group, head]
    whole = codes.round_().clamp_(0, 2**bits - 1).to(torch.uint8)  # [batch, heads, groups, group, head]
    return RoundedStates(whole if bits == 8 else whole[..., ::2] | (whole[..., 1::2] << 4), low, step)


def restore_states(rounded: RoundedStates, bits: int, dtype: torch.dtype) -> Tensor:
    """Inverse of `round_states`, tokens in a row again: [batch, heads, tokens, head] in `dtype`."""
    codes = rounded.codes  # [batch, heads, groups, group, head * bits / 8]
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)  # [batch, heads, groups, group, head]
    exact = torch.addcmul(rounded.low.float(), codes.float(), rounded.step.float())
    return exact.to(dtype).flatten(2, 3)  # [batch, heads, groups * group, head]


def check_rounding(config: PreTrainedConfig, bits: int, window: int, group: int) -> None:
    """Raises `SchemeError` for other bits, sizes below 1, or an odd head size at 4 bits."""
    text = config.get_text_config(decoder=True)
    if bits not in KV_BITS or window < 0 or group < 1:
        raise SchemeError(
            f"a packed cache has 8 or 4 bits, window >= 0 and group >= 1, got {bits}, {window}, {group}"
        )
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if bits == 4 and head % 2:
        raise SchemeError(f"a 4-bit cache needs an even head size, this model has {head}; use 8 bits")


class RoundedWindow:
    """What layers with a window in full precision, `keys` and `values`, have in common: older tokens are codes."""

    keys: Any
    values: Any

    def begin_rounding(self, bits: int, window: int, group: int) -> None:
        """Begin with nothing."""
        self.bits, self.window, self.group = bits, window, group
        self.rounded: tuple[RoundedStates, RoundedStates] | None = None

    @property
    def older(self) -> int:
        """Tokens held as codes."""
        return 0 if self.rounded is None else self.rounded[0].codes.shape[2] * self.group

    @property
    def full(self) -> bool:
        """Whether a group of tokens is to leave the window."""
        return bool(self.keys.shape[-2] - self.window >= self.group)

    @property
    def older_bytes(self) -> int:
        """Bytes of the codes and their ranges."""
        return sum(part.bytes for part in self.rounded or ())

    def with_older(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Older tokens as floats before `keys` and `values` [batch, heads, window, head]."""
        if self.rounded is None:
            return keys, values
        old = [restore_states(part, self.bits, keys.dtype) for part in self.rounded]
        return torch.cat([old[0], keys], -2), torch.cat([old[1], values], -2)  # [batch, heads, tokens, head]

    def round_oldest(self) -> None:
        """Turn what has left the window into codes, in whole groups of tokens."""
        groups = (self.keys.shape[-2] - self.window) // self.group
        if groups < 1:
            return
        count = groups * self.group
        # each [batch, heads, groups, group, head]
        old = [part[..., :count, :].unflatten(2, (groups, self.group)) for part in (self.keys, self.values)]
        fresh = round_states(old[0], self.bits, CHANNEL), round_states(old[1], self.bits, TOKEN)
        held = self.rounded
        self.rounded = fresh if held is None else (_joined(held[0], fresh[0]), _joined(held[1], fresh[1]))
        # Clones: a view would keep the floats of the whole prompt alive.
        rest = self.keys[..., count:, :].clone(), self.values[..., count:, :].clone()
        self.keys, self.values = rest

    def change_older(self, change: Callable[[Tensor], Tensor]) -> None:
        """Every part of the codes changed."""
        if self.rounded is not None:
            self.rounded = self.rounded[0].each(change), self.rounded[1].each(change)

    def check_crop(self, count: int) -> None:
        """Raises `SchemeError` when `count` tokens are more than the window."""
        held = 0 if getattr(self, "keys", None) is None else self.keys.shape[-2]
        if count > held:
            raise SchemeError(
                f"{count} tokens cannot be removed from a packed cache that holds {held} in full precision; make it with a "
                "larger window"
            )


class PackedLayer(RoundedWindow, DynamicLayer):
    """One layer's cache: `keys` and `values` are the window in full precision, older tokens are codes."""

    is_croppable = False
    keys: Tensor  # set by lazy_initialization, before anything reads them
    values: Tensor

    def __init__(self, bits: int, window: int, group: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.begin_rounding(bits, window, group)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add new tokens; returns keys and values [batch, heads, all tokens, head] for attention."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], -2)  # [batch, heads, window, head]
        self.values = torch.cat([self.values, value_states], -2)  # [batch, heads, window, head]
        keys, values = self.with_older(self.keys, self.values)
        self.round_oldest()
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.older + int(super().get_seq_length())

    @property
    def bytes(self) -> int:
        """Bytes held, codes and window."""
        exact = (self.keys, self.values) if self.is_initialized else ()
        window = sum(part.numel() * part.element_size() for part in exact)
        return window + self.older_bytes

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
        self.change_older(change)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch for beam search."""
        self._change(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch."""
        self._change(lambda part: part.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences of the batch."""
        self._change(lambda part: part[indices])

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.rounded = None

    def offload(self) -> None:
        """Move to the CPU."""
        self._change(lambda part: part.cpu())

    def prefetch(self) -> None:
        """Move back to the device."""
        self._change(lambda part: part.to(self.device))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens (a number below 0). Raises `SchemeError` beyond the window: codes cannot be cut."""
        self.check_crop(-tokens_to_remove)
        super().crop(tokens_to_remove)


class PackedCache(Cache):
    """A KV cache for `model(past_key_values=...)` and `generate`, for the model of this config.

    `bits` 8 or 4; `window` newest tokens stay in full precision; `group` tokens share a key channel's range.
    Raises `SchemeError` for other bits, sizes below 1, or an odd head size at 4 bits.
    """

    def __init__(self, config: PreTrainedConfig, bits: int = 8, window: int = 64, group: int = 64) -> None:
        check_rounding(config, bits, window, group)
        text = config.get_text_config(decoder=True)
        plain = DynamicCache(config=config).layers or [DynamicLayer() for _ in range(text.num_hidden_layers)]
        grown = [
            PackedLayer(bits, window, group) if type(layer) is DynamicLayer else layer for layer in plain
        ]
        super().__init__(layers=grown)


def cache_bytes(cache: Cache) -> int:
    """Bytes of keys and values that `cache` holds now."""
    if isinstance(cache, StoreCache):
        return store_bytes(cache) + sum(getattr(layer, "older_bytes", 0) for layer in cache.layers)
    return sum(_layer_bytes(layer) for layer in cache.layers)


def _layer_bytes(layer: Any) -> int:
    if isinstance(layer, PackedLayer):
        return layer.bytes
    parts = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return sum(part.numel() * part.element_size() for part in parts if part is not None)


def _joined(held: RoundedStates, fresh: RoundedStates) -> RoundedStates:
    parts = zip((held.codes, held.low, held.step), (fresh.codes, fresh.low, fresh.step), strict=True)
    return RoundedStates(*(torch.cat(pair, 2) for pair in parts))  # [batch, heads, groups, ...] each
