"""What a quantizer is: a function from a weight, a scheme and statistics to a packed tensor, its loss and notes."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fracbit.numerics.packed import PackedTensor
from fracbit.numerics.stats import Stats
from fracbit.records.scheme import Scheme


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantized weight. `loss` is the quantizer's own objective, relative to that of the zero matrix (0 is perfect)."""

    packed: PackedTensor
    loss: float
    notes: tuple[str, ...] = ()


class Quantizer(Protocol):
    """`needs` names the statistics that `__call__` reads: any of "gram", "energy", "absmax"; empty for data-free ones."""

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that must be observed before the call."""
        ...

    def __call__(self, weight: Tensor, scheme: Scheme, stats: Stats | None) -> Quantized:
        """Quantize `weight` [out, in]; nothing that was passed in is written to."""
        ...
