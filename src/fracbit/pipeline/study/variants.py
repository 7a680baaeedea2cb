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
from fracbit.evaluation.perplexity import token_nll
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
    stack = blocks(subject.model, subject.family)
    entering: list[Hidden] = []
    kept: dict[str, Tensor] = {}  # the model's own weights of what was changed
    changed: list[set[str]] = [set() for _ in stack]
    before: Picks = ()
    try:
        for these in sorted(set(picks)):
            shared = next((b for b, (a, c) in enumerate(zip(before, these, strict=False)) if a != c), 0)
            del entering[shared + 1 :]
            if not entering:
                with native_attention(subject.model):
                    entering.append(embed(subject.model, subject.family, ids, batch))
            for index in range(shared, len(stack)):
                for name in changed[index]:
                    set_weight(subject.module(name), kept[name])
                weights = option(index, these[index])
                changed[index] = set(weights or ())
                for name in changed[index] - set(kept):
                    kept[name] = weight_of(subject.module(name)).clone()
                for name, weight in (weights or {}).items():
                    set_weight(subject.module(name), weight)
                hidden = entering[-1]
                with native_attention(subject.model):  # as `evaluate` judges
                    entering.append(
                        replace(hidden, index=index + 1)
                        if weights is None
                        else advance(stack[index][1], hidden)
                    )
            before = these
            yield these, _sample_losses(subject, entering[-1], ids)
    finally:
        for name, weight in kept.items():
            set_weight(subject.module(name), weight)


def loss_table(
    subject: FloatModel, picks: Iterable[Picks], option: Option, ids: Tensor
) -> dict[Picks, float]:
    """`losses_of` as means over all tokens."""
    return {these: float(losses.mean()) for these, losses in losses_of(subject, picks, option, ids)}


def _sample_losses(subject: FloatModel, hidden: Hidden, ids: Tensor) -> Tensor:
    losses = torch.zeros(len(ids), dtype=torch.float64)
    start = 0
    for logits in head_batches(subject.model, subject.family, hidden):
        for row in logits[:, :-1]:
            targets = ids[start, 1:].to(row.device)
            for chunk in row_chunks(*row.shape):
                losses[start] += float(token_nll(row[chunk], targets[chunk]).double().sum())
            start += 1
    return losses / (ids.shape[1] - 1)
