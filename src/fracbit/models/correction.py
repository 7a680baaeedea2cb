"""What a correction is: after a block is quantized, its norms are moved so that it gives what the float block gave.

To add one, write its file and a line in records/tables.py. Norm tweaking is in models/tweak.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fracbit.models.family import Family
from fracbit.models.walk import Hidden, forward
from fracbit.numerics.stats import Stats
from fracbit.records import tables
from fracbit.records.tables import Table


@dataclass(frozen=True)
class Tweaked:
    """What a correction bought: relative squared error of the block's output on held-out samples before and after.

    `kept` says which variant stayed, `none` where no one helped.
    """

    before: float
    after: float
    kept: str

    def to_json(self) -> dict[str, object]:
        """As the record of a shard holds it."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a block is corrected with.

    - `entrance` and `exits` [samples, tokens, width]: the states before the block, and those after it while it was float.
    - `train` and `judge` number the batches to fit and to judge by.
    - `weights`: the float weights [out, in] of its linears by name; `stats`: the statistics of their inputs, gram matrix
      included, by the first linear that reads them.
    """

    entrance: Hidden
    exits: Tensor
    train: Sequence[int]
    judge: Sequence[int]
    weights: Mapping[str, Tensor]
    stats: Mapping[str, Stats]


Correction: TypeAlias = Callable[[nn.Module, Family, Evidence, float], Tweaked]
"""(quantized block, its family, evidence, depth: 0 for the first block, towards 1 for the last); moves the norms, in place."""

CORRECTIONS: Table[Correction] = tables.CORRECTIONS


def error(block: nn.Module, evidence: Evidence) -> float:
    """Squared error of the block's output on the held-out batches, relative to what the float block adds to its input."""
    wrong = added = 0.0
    for number in evidence.judge:
        batch = evidence.entrance.batches[number]
        entrance, wanted = (
            x[batch.start : batch.stop].float() for x in (evidence.entrance.states, evidence.exits)
        )
        with torch.no_grad():
            found = run_batch(block, evidence, number).float().to(wanted.device)
        wrong += float((found - wanted).square().sum())
        added += float((wanted - entrance).square().sum())
    return wrong / added if added > 0 else 0.0


def run_batch(block: nn.Module, evidence: Evidence, number: int) -> Tensor:
    """What the block gives for a batch: [samples, tokens, width]."""
    hidden = evidence.entrance
    batch = hidden.batches[number]
    return forward(block, hidden.states[batch.start : batch.stop], batch.calls[hidden.index])
