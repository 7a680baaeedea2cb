"""Corrections that a grid may name: what is done to the quantized model before it is judged.

To add one, write a function of a `FloatModel` and a line in `CORRECTIONS`.

Norm tweaking (arXiv:2309.02784; models/tweak.py) comes in three. `tweak-closed` needs no forward pass: its factors follow from
the statistics that all runs share. `tweak-adam` and `tweak-auto` walk the blocks, each reading what the quantized ones before
it give, as the paper does; that costs about eight passes over the calibration text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fracbit.models.blocks import blocks, linears, weight_of
from fracbit.models.family import Family
from fracbit.models.install import set_weight
from fracbit.models.tweak import Evidence, How, closed_form, tweak_block
from fracbit.models.walk import Hidden, advance, embed
from fracbit.numerics.stats import Stats

T = TypeVar("T")
BATCH = 2  # samples a step of Adam
HELD_OUT = 8  # one batch in so many judges


@dataclass(frozen=True, eq=False)
class FloatModel:
    """A quantized model and what a correction may look at.

    `floats`: the float weights [out, in] of what was quantized, by full name; `ids` int64 [samples, tokens] of the calibration
    text; `stats` of the float model's inputs, with gram matrices, by full name.
    """

    model: PreTrainedModel
    family: Family
    floats: Mapping[str, Tensor]
    ids: Tensor
    stats: Mapping[str, Stats]


Correction = Callable[[FloatModel], tuple[str, ...]]
"""Changes the norms of the model, nothing else, and returns notes."""


def closed(subject: FloatModel) -> tuple[str, ...]:
    """Every norm times its least-squares factor, from shared statistics."""
    nothing = Hidden(torch.empty(0), 0, ())
    for prefix, block in blocks(subject.model, subject.family):
        closed_form(block, subject.family, _evidence(subject, prefix, nothing, nothing.states))
    return ()


def walked(subject: FloatModel, how: How) -> tuple[str, ...]:
    """Tweak block after block; a note says which of both variants each block kept, and what it bought."""
    hidden = embed(subject.model, subject.family, subject.ids, BATCH)
    stack = list(blocks(subject.model, subject.family))
    notes = []
    for number, (prefix, block) in enumerate(stack):
        exits = _float_exits(subject, prefix, block, hidden)
        evidence = _evidence(subject, prefix, hidden, exits)
        done = tweak_block(block, subject.family, evidence, how, number / len(stack))
        notes.append(f"{prefix}: {done.kept}, error {done.before:.4g} to {done.after:.4g}")
        hidden = advance(block, hidden, hidden.states)
    return tuple(notes)


def _float_exits(subject: FloatModel, prefix: str, block: torch.nn.Module, hidden: Hidden) -> Tensor:
    """What the float block makes of the quantized chain's states [samples, tokens, width]."""
    inside = linears(block, subject.family)
    swapped = {name: module for name, module in inside.items() if f"{prefix}.{name}" in subject.floats}
    now = {name: weight_of(module).clone() for name, module in swapped.items()}
    for name, module in swapped.items():
        set_weight(module, subject.floats[f"{prefix}.{name}"])
    exits = advance(block, hidden).states
    for name, module in swapped.items():
        set_weight(module, now[name])
    return exits


def _evidence(subject: FloatModel, prefix: str, hidden: Hidden, exits: Tensor) -> Evidence:
    count = len(hidden.batches)
    judge = list(range(HELD_OUT - 1, count, HELD_OUT)) or list(range(count))
    train = [number for number in range(count) if number not in judge] or judge
    floats, stats = _inside(prefix, subject.floats), _inside(prefix, subject.stats)
    return Evidence(hidden, exits, train, judge, floats, stats)


def _inside(prefix: str, values: Mapping[str, T]) -> dict[str, T]:
    """What belongs to a block, by the names inside it."""
    start = prefix + "."
    return {name.removeprefix(start): value for name, value in values.items() if name.startswith(start)}


CORRECTIONS: dict[str, Correction | None] = {
    "none": None,
    "tweak-closed": closed,
    "tweak-adam": partial(walked, how="adam"),
    "tweak-auto": partial(walked, how="auto"),
}
