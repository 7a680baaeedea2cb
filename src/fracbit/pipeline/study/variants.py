"""Losses of many variants of one model, computed once where they agree: what makes trying every allocation affordable.

Variants differ by block: other weights in it, or the block dropped. Sorted, they are the leaves of a tree, and the states at
the entrance of a block are shared by all variants that agree before it. All 2^6 choices of two levels for six blocks take 126
walks through a block instead of 384; one-at-a-time losses (the oracle) take half of the blocks, since what comes before the
changed one is the float model.
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
"""Block and number of the option in; the weights [out, in] by layer that it changes, or None: the block is dropped."""


def losses_of(
    subject: FloatModel, picks: Iterable[Picks], option: Option, ids: Tensor, batch: int = 16
) -> Iterator[tuple[Picks, Tensor]]:
    """The loss of every variant, in sorted order: its picks, and nats per token of each sample, fp64 [samples].

    `ids` int64 [samples, tokens]. Only the weights that an option names differ from the model's own. An option is asked for
    when the walk enters its block, which then holds the model's own weights: one option's weights of a block are in memory
    at a time, unless the caller keeps them. States are kept once a block. Weights are as before on the way out, also when
    something raises. Raises `DataError` for samples that the model's positions do not reach, `WeightError` for NaN or Inf.
    """
    limit = longest_window(subject.model)
    if limit is not None and ids.shape[1] > limit:
        raise DataError(f"samples of {ids.shape[1]} tokens are longer than the model's {limit} positions")
    walk = _Walk(subject, option)
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
            yield these, _sample_losses(subject, walk.entering[-1], ids)
    finally:
        walk.restore()


class _Walk:
    """A walk through the blocks that can go back: the states at the entrance of each, and the weights that were replaced."""

    def __init__(self, subject: FloatModel, option: Option) -> None:
        self.subject, self.option = subject, option
        self.stack = blocks(subject.model, subject.family)
        self.entering: list[
            Hidden
        ] = []  # states [samples, tokens, width] at each block's entrance, and at the end
        self.own: dict[str, Tensor] = {}  # the model's own weights [out, in] of what was ever changed
        self.changed: list[set[str]] = [set() for _ in self.stack]
        self.dropped = False

    def go_back(self, block: int, ids: Tensor, batch: int) -> None:
        """To the entrance of a block; the first time of all, embed."""
        del self.entering[block + 1 :]
        if not self.entering:
            with native_attention(self.subject.model):
                self.entering.append(embed(self.subject.model, self.subject.family, ids, batch))

    def install(self, block: int, number: int) -> None:
        """Put an option's weights into a block, in place of those of the option before."""
        self._write({name: self.own[name] for name in self.changed[block]})
        weights = self.option(block, number)
        self.dropped, weights = weights is None, weights or {}
        self.changed[block] = set(weights)
        for name in self.changed[block] - set(self.own):
            self.own[name] = weight_of(self.subject.module(name)).clone()
        self._write(weights)

    def step(self, block: int) -> None:
        """Through a block, or past it when its option drops it."""
        hidden = self.entering[-1]
        if self.dropped:
            self.entering.append(replace(hidden, index=block + 1))
            return
        with native_attention(self.subject.model):  # as `evaluate` judges
            self.entering.append(advance(self.stack[block][1], hidden))

    def restore(self) -> None:
        """The model's own weights everywhere."""
        self._write(self.own)

    def _write(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            set_weight(self.subject.module(name), weight)


def loss_table(
    subject: FloatModel, picks: Iterable[Picks], option: Option, ids: Tensor
) -> dict[Picks, float]:
    """`losses_of` as means over all tokens."""
    return {these: float(losses.mean()) for these, losses in losses_of(subject, picks, option, ids)}


def _sample_losses(subject: FloatModel, hidden: Hidden, ids: Tensor) -> Tensor:
    """Nats per token of each sample, fp64 [samples]."""
    losses = torch.zeros(len(ids), dtype=torch.float64)
    start = 0
    for logits in head_batches(
        subject.model, subject.family, hidden
    ):  # [samples of a batch, tokens, vocabulary]
        for row in logits[:, :-1]:  # [tokens - 1, vocabulary]
            following = ids[start, 1:].to(row.device)  # [tokens - 1]
            for chunk in row_chunks(*row.shape):
                losses[start] += float(token_nll(row[chunk], following[chunk]).double().sum())
            start += 1
    return losses / (ids.shape[1] - 1)
