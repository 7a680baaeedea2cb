"""The walk through a quantized checkpoint beside its float model: one block of each in memory.

    embed -> for each block: the step (norm_step.py, code_step.py) -> its new tensors into the copy -> advance with them

The states are those of the checkpoint as it is improved, so that each block is fitted to what it will be given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fracbit.checkpoint.patched import PatchedCopy
from fracbit.checkpoint.source import Source
from fracbit.data import Samples
from fracbit.models.blocks import blocks, gain_of, norms, pairs, source_rows, weight_of
from fracbit.models.family import Family
from fracbit.models.fold import fold_norm, fold_pair, tie
from fracbit.models.install import materialize, release
from fracbit.models.spill import storage
from fracbit.models.walk import Hidden, advance, embed
from fracbit.pipeline.improve.twins import Twins, block_tensors, outer_tensors
from fracbit.pipeline.quantize.calibrated import SPILL_BYTES
from fracbit.records.progress import Progress, phase
from fracbit.records.run import ShardRecord

SAME = 0.02  # relative: gains that differ by less were only stored in another type
EXPLAINED = 0.5  # of the squared error: a scaling of rows that explains so much was there


@dataclass(frozen=True, eq=False)
class Place:
    """A block on its way: its number, path and module (whose tensors are not in memory), and the states that enter it."""

    number: int
    path: str
    module: nn.Module
    hidden: Hidden


@dataclass(frozen=True, eq=False)
class Walk:
    """What a walk needs: both models, samples, how many of them go together, where blocks are computed, whom to tell."""

    twins: Twins
    samples: Samples
    batch: int
    device: torch.device
    show: Progress

    @property
    def family(self) -> Family:
        """That of both models."""
        return self.twins.coded.family

    def load_coded(self, place: Place, source: Source | None = None) -> None:
        """Bring the quantized block into memory, decoded; `source`: where it is read, in a copy perhaps."""
        materialize(
            place.module, block_tensors(self.twins.coded, place.path, source), torch.float32, self.device
        )

    def load_float(self, place: Place) -> None:
        """Bring the float block into memory, scaled as the quantized one was before it was rounded."""
        coded, floats = self.twins.coded, self.twins.floats
        assert floats is not None
        materialize(place.module, block_tensors(floats, place.path), torch.float32, self.device)
        rescale(place.module, self.family, coded.model.config, block_tensors(coded, place.path))


BlockStep: TypeAlias = Callable[[Walk, Place], tuple[dict[str, Tensor], ShardRecord]]
"""(walk, block) -> new values of tensors on the disk, and what is noted. It leaves the block out of memory."""


def walk_alongside(walk: Walk, step: BlockStep, copy: PatchedCopy) -> list[ShardRecord]:
    """Do the step for every block that the `copy` lacks; all records, in order."""
    opened = walk.twins.coded
    stack = blocks(opened.model, opened.family)
    materialize(opened.model, outer_tensors(opened), torch.float32, partial=True)

    def room(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        spills = torch.Size(shape).numel() * dtype.itemsize > SPILL_BYTES
        return storage(shape, dtype, copy.target.journal if spills else None)

    hidden = embed(opened.model, opened.family, walk.samples.ids, walk.batch, room=room)
    records = []
    for number, (path, module) in enumerate(stack):
        place, name = Place(number, path, module, hidden), f"block-{number:05}"
        record = copy.record(name)
        if record is None:
            changed, record = step(_within(walk, number, len(stack)), place)
            copy.write(name, changed, record)
        records.append(record)
        if number + 1 < len(stack):
            walk.load_coded(place, copy.now)
            hidden = advance(module, hidden, hidden.states)
            release(module)
        walk.show(f"block {number + 1} of {len(stack)}: done", number + 1, len(stack))
    return records


def _within(walk: Walk, number: int, count: int) -> Walk:
    """The walk inside of block `number` of `count`, which shows what is done there, and the blocks that are done."""
    said = phase(walk.show, f"block {number + 1} of {count}")
    return replace(walk, show=lambda what, done, total: said(what, number, count))


def rescale(block: nn.Module, family: Family, config: object, coded: Mapping[str, Tensor]) -> None:
    """Give a float block the scaling that its quantized twin had before it was rounded (AWQ, SmoothQuant).

    It computes the same. `coded`: the tensors of the twin. Gains show what was folded into norms; where rows of one linear feed
    columns of another, the factors are those that explain the rows best, if they explain much.
    """
    for norm in norms(block, family):
        gain = gain_of(block, norm.name)
        if not norm.exclusive or not norm.readers or gain is None:
            continue
        now = coded[f"{norm.name}.weight"].to(gain.device).float() + family.gain_offset  # [width]
        factors = (gain.detach().float() + family.gain_offset) / now  # [width]
        factors = torch.where(torch.isfinite(factors) & (factors > 0), factors, 1.0)
        if float((factors - 1).abs().max()) > SAME:
            fold_norm(block, family, norm, factors)
    for pair in pairs(block, family, config):
        weight = weight_of(block.get_submodule(pair.source)).float()  # [out, in]
        held = coded[f"{pair.source}.weight"].to(weight.device).float()
        held = held if held.shape == weight.shape else held.T  # [out, in]
        power, common = weight.square().sum(1), (weight * held).sum(1)  # [out] each
        by_row = torch.where((common > 0) & (power > 0), power / common, 1.0)  # [out]
        plain, scaled = (
            (held - weight / by).square().sum() for by in (torch.ones_like(by_row)[:, None], by_row[:, None])
        )
        if float(scaled) < EXPLAINED * float(plain):
            factors = by_row[source_rows(block, pair, config).to(by_row.device)]  # [in of the readers]
            fold_pair(block, pair, tie(block, pair, factors, config), config)
