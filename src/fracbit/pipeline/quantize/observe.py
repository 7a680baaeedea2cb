"""Statistics of the inputs of a block's linears: one `Stats` per group of linears that read the same input.

In a mixture of experts, each expert sees the tokens routed to it. An expert with fewer than `FEW_TOKENS` tokens uses
the sum over all experts of the block. If that is empty too, it is quantized without data. Both cases give a note.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor, nn

from fracbit.errors import WeightError
from fracbit.kernels.gram import add_gram_
from fracbit.models.walk import Hidden, observe, peek
from fracbit.numerics.stats import Stats, empty, merge
from fracbit.numerics.stats import add_inputs as add

FEW_TOKENS = 128  # a Gram matrix of fewer tokens is mostly noise
_EXPERT = re.compile(r"\.\d+\.")


def is_expert(name: str) -> bool:
    """Whether the linear `name` inside a block is an expert's, which sees the tokens that are routed to it."""
    return _EXPERT.search(name) is not None


@dataclass
class Observer:
    """Sums up the inputs of linears during a walk; lives as long as its block.

    `weights` [samples * tokens] by linear: how much each token counts there; alike where a linear has none.
    """

    label: str
    gram: bool
    length: int
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Stats] = field(default_factory=dict)

    def __call__(self, name: str, x: Tensor) -> None:
        """Add the inputs `x` [tokens, in] of the linear `name`. Raises `WeightError` naming layer and place."""
        held = self.stats.get(name) or empty(x.shape[1], self.gram, x.device)
        try:
            weights = self.weights.get(name)
            part = None if weights is None else weights[held.tokens : held.tokens + len(x)]  # [tokens]
            self.stats[name] = add(held, x, add_gram_, part)
        except WeightError as error:
            raise WeightError(
                f"inputs of {self.label}.{name}{self._place(name, held, x)}: {error}"
            ) from error

    def _place(self, name: str, held: Stats, x: Tensor) -> str:
        """The number of the bad sample; "" for experts, which see tokens of all samples."""
        if is_expert(name):
            return ""
        first = int((~torch.isfinite(x)).any(1).nonzero()[0])
        return f", sample {(held.tokens + first) // self.length}"


def observe_all(
    block: nn.Module,
    hidden: Hidden,
    observer: Observer,
    groups: Sequence[tuple[str, ...]],
    out: Tensor | None,
) -> tuple[dict[str, Stats], Hidden]:
    """Statistics by the first name of each group, and the block's output states."""
    exits = observe(block, hidden, names=[group[0] for group in groups], visit=observer, out=out)
    return observer.stats, exits


def observe_some(
    block: nn.Module, hidden: Hidden, observer: Observer, groups: Sequence[tuple[str, ...]]
) -> dict[str, Stats]:
    """Statistics of some groups only; each batch stops once they are reached."""
    peek(block, hidden, [group[0] for group in groups], observer)
    return observer.stats


def borrow(
    stats: dict[str, Stats], groups: Sequence[tuple[str, ...]]
) -> tuple[dict[str, Stats | None], dict[str, str]]:
    """Statistics for every group, and notes by group. Experts with too few tokens get the sum over all experts."""
    result: dict[str, Stats | None] = {}
    notes: dict[str, str] = {}
    for group in groups:
        name = group[0]
        own = stats.get(name)
        seen = 0 if own is None else own.tokens
        if seen >= FEW_TOKENS or not is_expert(name):
            result[name] = own
            continue
        shape = _EXPERT.sub(".*.", name)
        alike = [other for key, other in stats.items() if _EXPERT.sub(".*.", key) == shape]
        result[name] = reduce(merge, alike) if alike else None
        where = f"{sum(other.tokens for other in alike)} tokens of all experts" if alike else "no data"
        notes[name] = f"expert saw {seen} tokens, fewer than {FEW_TOKENS}: quantized with {where}"
    return result, notes
