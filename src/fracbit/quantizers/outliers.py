"""Columns kept in 16 bits: the inputs whose rounding would cost most stay exact, and GPTQ repairs the others with them.

The cost of an input column j is what rounding it alone adds to the error of the output, h_j sum_o (w_oj - q_oj)^2 with h_j the
energy of that input: the diagonal of the objective that GPTQ minimises. A share p of columns costs p (16 - k) bits per weight
and 4 bytes a column for its number, all of it in `stored_bits`.

Sparse single weights (SpQR, Dettmers et al. 2023, arXiv:2306.03078) are not offered: each costs 16 bits and its place, and
every kernel would need a second, irregular product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fracbit.numerics.grid import quantize_tensor
from fracbit.numerics.packed import decode, outlier_count
from fracbit.numerics.stats import Stats
from fracbit.quantizers.gptq import Gptq
from fracbit.quantizers.quantizer import Quantized
from fracbit.quantizers.rtn import RoundToNearest
from fracbit.records.scheme import Scheme


@dataclass(frozen=True)
class KeepColumns:
    """`fill`, with a `share` (0 to 1) of every weight's input columns kept in 16 bits."""

    fill: Gptq | RoundToNearest
    share: float

    @property
    def needs(self) -> frozenset[str]:
        """What `fill` reads, and the energy that the columns are chosen by."""
        return self.fill.needs | {"energy"}

    @property
    def search(self) -> bool:
        """Whether `fill` looks for block ranges of least error."""
        return self.fill.search

    def __call__(self, weight: Tensor, scheme: Scheme, stats: Stats | None) -> Quantized:
        """Quantize `weight` [out, in]; without statistics every input counts the same."""
        columns = costliest_columns(weight, scheme, None if stats is None else stats.energy, self.share)
        if not len(columns):
            return self.fill(weight, scheme, stats)
        return self.fill(weight, scheme, stats, columns=columns)

    def nearest(self, search: bool) -> KeepColumns:
        """The same columns kept, the others rounded to nearest."""
        return replace(self, fill=RoundToNearest(search))


def costliest_columns(weight: Tensor, scheme: Scheme, energy: Tensor | None, share: float) -> Tensor:
    """The `share` of columns of `weight` [out, in] whose rounding costs most at `energy` [in]: int32 [p], ascending."""
    weight = weight.float()
    cost = (weight - decode(quantize_tensor(weight, scheme))).square().sum(0)
    cost = cost if energy is None else cost * energy
    count = outlier_count(weight.shape[1], share)
    return cost.argsort(descending=True, stable=True)[:count].sort().values.to(torch.int32)
