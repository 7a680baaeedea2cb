"""What a quantizer is: a function from a weight, a scheme and statistics to a packed tensor and what every row of it cost.

Nothing outside a quantizer's own class asks which one it is. What it reads, what linears with one input share and which
columns stay in 16 bits are all part of the protocol, so that a new quantizer needs no line anywhere but in the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fracbit.numerics.linalg import Coupling
from fracbit.numerics.packed import PackedTensor
from fracbit.numerics.stats import Stats
from fracbit.records.scheme import Scheme


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantized weight: `costs` [out] is the quantizer's own objective, row by row, `powers` [out] that of zero weights."""

    packed: PackedTensor
    costs: Tensor
    powers: Tensor
    notes: tuple[str, ...] = ()

    @property
    def loss(self) -> float:
        """The objective of the whole relative to that of zero weights: 0 is perfect; 0 as well where zeros cost nothing."""
        total = float(self.powers.sum())
        return float(self.costs.sum()) / total if total > 0 else 0.0


class Quantizer(Protocol):
    """A way to choose codes: a `Checked` record whose fields are `search` and the options of its word.

    - `needs`: the statistics that a call cannot do without, any of "gram", "energy", "absmax"; empty for data-free quantizers.
    - `reads`: those that a call looks at where it is given statistics; holds all of `needs`.
    - `search`: the range of every block is searched for the least error.
    """

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that must be observed before the call."""
        ...

    @property
    def reads(self) -> frozenset[str]:
        """Statistics that change what a call gives."""
        ...

    @property
    def search(self) -> bool:
        """Whether block ranges of least error are searched."""
        ...

    def couple(self, stats: Stats | None) -> Coupling | None:
        """What all linears that read these inputs share, computed once; None where they share nothing.

        A quantizer that returns something may be given several weights stacked, where their scheme lets rows stand alone.
        """
        ...

    def __call__(
        self,
        weight: Tensor,
        scheme: Scheme,
        stats: Stats | None = None,
        *,
        columns: Tensor | None = None,
        coupling: Coupling | None = None,
    ) -> Quantized:
        """Quantize `weight` [out, in]; nothing that was passed in is written to.

        The input `columns` int [p] stay in 16 bits. `coupling` is `couple(stats)` where the caller has it already.
        Raises `WeightError` when statistics that it `needs` are missing or do not fit.
        """
        ...
