"""Losses of many variants of one model. What variants share is computed once, so that every allocation can be tried.

Variants differ in their blocks: a block has other weights, or it is dropped. Sorted, variants are the leaves of a tree:
all variants with the same blocks before a block share the states that enter it. All 2^6 choices of two levels for six
blocks take 126 walks through a block instead of 384. Losses with one changed block at a time (the oracle) take half of
the blocks, because the blocks before the changed one are float.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from fracbit.errors import DataError
from fracbit.evaluation import longest_window
from fracbit.evaluation.logits import row_chunks
from fracbit.evaluation.loss import token_nll
from fracbit.models.attention import native_attention
from fracbit.models.blocks import blocks, weight_of
from fracbit.models.install import set_weight
from fracbit.models.walk import Hidden, advance, embed, head_batches
from fracbit.pipeline.study.float_model import FloatModel

Picks: TypeAlias = tuple[int, ...]
"""The number of each block's option."""
Option: TypeAlias = Callable[[int, int], Mapping[str, Tensor] | None]
"""From a block and an option's number to the changed weights [out, in] by layer, or None: the block is dropped."""


def losses_of(
    float_model: FloatModel, picks: Iterable[Picks], option: Option, ids: Tensor, batch: int = 16
) -> Iterator[tuple[Picks, Tensor]]:
    """The loss of every variant, in sorted order: its picks, and nats per token of each sample, fp64 [samples].

    `ids` int64 [samples, tokens]. Only the weights that an option names differ from the model's own. `option` is called
    when the walk enters its block, which then holds the model's own weights. So memory holds the weights of one option
    per block, unless the caller keeps more, and one set of states per block. Weights are restored afterwards, also
    after an exception. Raises `DataError` for samples longer than the model's positions, `WeightError` for NaN or Inf.
    """
    limit = longest_window(float_model.model)
    if limit is not None and ids.shape[1] > limit:
        raise DataError(f"samples of {ids.shape[1]} tokens are longer than the model's {limit} positions")
    walk = _Walk(float_model, option)
    before: Picks = ()
    try:
        for these in sorted(set(picks)):
            # Go back to the first block where this variant differs from the last one; states before it are shared.
            shared = next((b for b, (a, c) in enumerate(zip(before, these, strict=False)) if a != c), 0)
            walk.go_back(shared, ids, batch)
            # Walk on from there, each block with the weights of its option.
            for block in range(shared, len(walk.stack)):
                walk.install(block, these[block])
                walk.step(block)
            before = these
            yield these, _sample_losses(float_model, walk.entering[-1], ids)
    finally:
        walk.restore()


class _Walk:
    """A walk through the blocks that can go back. It keeps the states that enter each block and replaced weights."""

    def __init__(self, float_model: FloatModel, option: Option) -> None:
        self.float_model, self.option = float_model, option
        self.stack = blocks(float_model.model, float_model.family)
        self.entering: list[
            Hidden
        ] = []  # states [samples, tokens, width] at each block's entrance, and at the end
        self.own: dict[str, Tensor] = {}  # the model's own weights [out, in] of what was ever changed
        self.changed: list[set[str]] = [set() for _ in self.stack]
        self.dropped = False

    def go_back(self, block: int, ids: Tensor, batch: int) -> None:
        """Go back to the entrance of a block; the first call embeds the ids."""
        del self.entering[block + 1 :]
        if not self.entering:
            with native_attention(self.float_model.model):
                self.entering.append(embed(self.float_model.model, self.float_model.family, ids, batch))

    def install(self, block: int, number: int) -> None:
        """Put an option's weights into a block, in place of those of the previous option."""
        self._write({name: self.own[name] for name in self.changed[block]})
        weights = self.option(block, number)
        self.dropped, weights = weights is None, weights or {}
        self.changed[block] = set(weights)
        for name in self.changed[block] - set(self.own):
            self.own[name] = weight_of(self.float_model.module(name)).clone()
        self._write(weights)

    def step(self, block: int) -> None:
        """Run a block, or skip it when its option drops it."""
        hidden = self.entering[-1]
        if self.dropped:
            self.entering.append(replace(hidden, index=block + 1))
            return
        with native_attention(self.float_model.model):  # as in `evaluate`
            self.entering.append(advance(self.stack[block][1], hidden))

    def restore(self) -> None:
        """Put the model's own weights back everywhere."""
        self._write(self.own)

    def _write(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            set_weight(self.float_model.module(name), weight)


def loss_table(
    float_model: FloatModel, picks: Iterable[Picks], option: Option, ids: Tensor
) -> dict[Picks, float]:
    """`losses_of` as means over all tokens."""
    return {these: float(losses.mean()) for these, losses in losses_of(float_model, picks, option, ids)}


def _sample_losses(float_model: FloatModel, hidden: Hidden, ids: Tensor) -> Tensor:
    """Nats per token of each sample, fp64 [samples]."""
    losses = torch.zeros(len(ids), dtype=torch.float64)  # [samples]
    start = 0
    for logits in head_batches(
        float_model.model, float_model.family, hidden
    ):  # [samples of a batch, tokens, vocabulary]
        for row in logits[:, :-1]:  # [tokens - 1, vocabulary]
            following = ids[start, 1:].to(row.device)  # [tokens - 1]
            for chunk in row_chunks(*row.shape):
                losses[start] += float(token_nll(row[chunk], following[chunk]).double().sum())
            start += 1
    return losses / (ids.shape[1] - 1)
