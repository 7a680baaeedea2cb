"""Statistics of the inputs of a block's linears: one `Stats` per group of linears that read the same input.

In a mixture of experts, each expert sees the tokens routed to it. An expert with fewer than `FEW_TOKENS` tokens uses
the sum over all experts of the block. If that is empty too, it is quantized without data, and so is a linear that no text
reaches (attention to images). Each case gives a note.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor, nn

from fracbit.errors import WeightError
from fracbit.kernels.gram import add_gram_
from fracbit.models.walk import Hidden, observe, peek
from fracbit.numerics.stats import Stats, TreeSum, empty, merge
from fracbit.numerics.stats import add_inputs as add
from fracbit.pipeline.quantize.sample_pieces import Pieces

UNREACHED = "no calibration token reached it: rounded to nearest"
FEW_TOKENS = 128  # a Gram matrix of fewer tokens is mostly noise
_EXPERT = re.compile(r"\.\d+\.")


def is_expert(name: str) -> bool:
    """Whether the linear `name` inside a block is an expert's, which sees the tokens that are routed to it."""
    return _EXPERT.search(name) is not None


@dataclass
class Observer:
    """Sums up the inputs of linears during a walk; lives as long as its block.

    `weights` [samples * tokens] by linear: how much each token counts there; alike where a linear has none. `first`: the number
    of the first sample that it sees.
    """

    label: str
    gram: bool
    length: int
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    first: int = 0
    stats: dict[str, Stats] = field(default_factory=dict)

    def __call__(self, name: str, x: Tensor) -> None:
        """Add the inputs `x` [tokens, in] of the linear `name`. Raises `WeightError` naming layer and place."""
        held = self.stats.get(name) or empty(x.shape[1], self.gram, x.device)
        try:
            weights = self.weights.get(name)
            before = self.first * self.length + held.tokens
            part = None if weights is None else weights[before : before + len(x)]  # [tokens]
            self.stats[name] = add(held, x, add_gram_, part)
        except WeightError as error:
            raise WeightError(
                f"inputs of {self.label}.{name}{self._place(name, held, x)}: {error}"
            ) from error

    def _place(self, name: str, held: Stats, x: Tensor) -> str:
        """The number of the bad sample; "" for experts, which see tokens of all samples."""
        if is_expert(name):
            return ""
        first = int(
            torch.nan_to_num(x.abs().float(), nan=torch.inf).amax(1).argmax()
        )  # the first of the largest
        return f", sample {self.first + (held.tokens + first) // self.length}"


def observe_all(
    block: nn.Module,
    hidden: Hidden,
    groups: Sequence[tuple[str, ...]],
    *,
    pieces: Pieces,
    observer: Callable[[int], Observer],
    out: Tensor | None,
) -> tuple[TreeSum, Hidden]:
    """Statistics by the first name of each group, summed over the `pieces`, and the block's output states.

    `observer` makes one for the samples from a number on.
    """
    total, exits = TreeSum(pieces.of), list[Hidden]()
    for number, part in pieces.cut(hidden):
        seeing = observer(pieces.start + part.batches[0].start)
        exits.append(observe(block, part, names=[group[0] for group in groups], visit=seeing, out=out))
        total.add(number, seeing.stats)
    return total, replace(exits[0], batches=tuple(batch for part in exits for batch in part.batches))


def observe_some(
    block: nn.Module,
    hidden: Hidden,
    groups: Sequence[tuple[str, ...]],
    *,
    pieces: Pieces,
    observer: Callable[[int], Observer],
) -> TreeSum:
    """Statistics of some groups only; each batch stops once they are reached."""
    total = TreeSum(pieces.of)
    for number, part in pieces.cut(hidden):
        seeing = observer(pieces.start + part.batches[0].start)
        peek(block, part, [group[0] for group in groups], seeing)
        total.add(number, seeing.stats)
    return total


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
            if own is None:
                notes[name] = UNREACHED
            continue
        shape = _EXPERT.sub(".*.", name)
        alike = [other for key, other in stats.items() if _EXPERT.sub(".*.", key) == shape]
        result[name] = reduce(merge, alike) if alike else None
        where = f"{sum(other.tokens for other in alike)} tokens of all experts" if alike else "no data"
        notes[name] = f"expert saw {seen} tokens, fewer than {FEW_TOKENS}: quantized with {where}"
    return result, notes
