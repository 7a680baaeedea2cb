"""One new entry for every table, as somebody would write it who adds a file and a line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fracbit.checkpoint.export.coded import IntegerForms
from fracbit.checkpoint.export.exporter import Nearest, StoredModel, Written
from fracbit.checkpoint.format import StoredLayer
from fracbit.checkpoint.output import Output
from fracbit.engines.engine import ServingEngine
from fracbit.importance.methods import ScoreMethod
from fracbit.importance.view import LayerView
from fracbit.models.correction import Corrected, Evidence, error
from fracbit.models.family import Family
from fracbit.numerics.datatypes import DataType, DataTypeMaker, nearest_type
from fracbit.numerics.linalg import Coupling
from fracbit.numerics.stats import Stats
from fracbit.perturbation.noise import Perturbation
from fracbit.quantizers.columns import LinearView, Rule
from fracbit.quantizers.quantizer import Quantized
from fracbit.quantizers.rtn import RoundToNearest
from fracbit.records.checked import Checked
from fracbit.records.progress import Progress
from fracbit.records.run import ShardRecord
from fracbit.records.scheme import Scheme
from fracbit.sweeps.trackers import Track
from fracbit.transforms.transform import Transform

NOTE = "made by an extension"


class Noted(Checked):
    """A quantizer: round-to-nearest that says who did it, and wants to know how large inputs were."""

    called: ClassVar[str] = "quantizer noted"
    needs: ClassVar[frozenset[str]] = frozenset({"absmax"})
    reads: ClassVar[frozenset[str]] = frozenset({"absmax"})

    search: bool = False

    def couple(self, stats: Stats | None) -> Coupling | None:
        """Nothing."""
        return None

    def __call__(
        self,
        weight: Tensor,
        scheme: Scheme,
        stats: Stats | None = None,
        *,
        columns: Tensor | None = None,
        coupling: Coupling | None = None,
    ) -> Quantized:
        """Round, and leave a note."""
        found = RoundToNearest(search=self.search)(weight, scheme, columns=columns)
        return replace(found, notes=(*found.notes, NOTE))


def leftmost(view: LinearView) -> Tensor:
    """A column rule: the first inputs stay in 16 bits."""
    return -torch.arange(view.weight.shape[1], dtype=torch.float32)


def zebra(weights: Sequence[Tensor], schemes: Sequence[Scheme], stats: Stats) -> Tensor:
    """A transform: inputs are halved and doubled in turn, their weights doubled and halved."""
    return torch.tensor([2.0, 0.5]).repeat(weights[0].shape[1])[: weights[0].shape[1]]


class Untouched(Checked):
    """A correction that looks and leaves the block alone."""

    called: ClassVar[str] = "correction untouched"
    follows: ClassVar[str] = "block"
    tokens: ClassVar[int | None] = None

    def __call__(self, block: nn.Module, family: Family, evidence: Evidence, show: Progress) -> Corrected:
        """Look."""
        found = error(block, evidence)
        return Corrected(found, found, "untouched")


def breadth(view: LayerView) -> float:
    """A score: how many outputs a unit has."""
    return float(sum(weight.shape[0] for weight in view.weights.values()))


def alternating(rows: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """A perturbation: plus and minus one in turn."""
    return 1.0 - 2.0 * (torch.arange(rows.shape[1]) % 2).expand(rows.shape)


def squares(bits: int, parameter: str, full: bool) -> DataType:
    """A data type: signed squares of an even grid."""
    even = torch.linspace(-1, 1, 2**bits - 1, dtype=torch.float64)
    return nearest_type(even.sign() * even.square())


@dataclass(frozen=True)
class Halves:
    """An export format: the stored tensors as they are, floats in 16 bits."""

    parameter: str

    def check(self, model: PreTrainedModel, folder: Path) -> None:
        """Every model can have it."""

    def nearest(self, layer: StoredLayer) -> Nearest:
        """It holds everything."""
        return Nearest(layer.scheme)

    def size(self, stored: StoredModel) -> int:
        """At most what is stored."""
        return sum(info.bytes for info in stored.source.tensors.values())

    def write(self, stored: StoredModel, target: Output, show: Progress) -> Written:
        """Write what belongs to no quantized layer."""
        target.write_shard(
            "halves.safetensors", {n: stored.tensor(n).half() for n in stored.rest}, ShardRecord()
        )
        return Written(("halves.safetensors",), {"format": "halves"})


LEDGER: list[tuple[str, str]] = []
"""What the tracker of the same file was given: experiments and keys of rows."""


@contextmanager
def ledger(experiment: str) -> Iterator[Track]:
    """A tracker: a list."""
    yield lambda row: LEDGER.append((experiment, row.key))


MIRROR = ServingEngine(
    "an engine that reads halves",
    ("halves",),
    (("nothing",),),
    "run_mlx.py",
    serves=IntegerForms((2,), ("none",), ("row",)),
)
LEFTMOST = Rule(leftmost)
ZEBRA = Transform(zebra)
BREADTH = ScoreMethod("more outputs, more important", plain=breadth, needs=frozenset({"weights"}))
ALTERNATING = Perturbation(alternating, "plus and minus one in turn")
SQUARES = DataTypeMaker(2, make=squares)
