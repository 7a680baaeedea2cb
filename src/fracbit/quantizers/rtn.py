"""Round-to-nearest: every weight goes to the nearest value of its block's grid. Data-free; the baseline of all papers.

With `search`, each block's range is shrunk: to the least squared error, weighted by the inputs' energy, when statistics are
given (as AWQ and llama.cpp's importance matrix do), else to the least fourth power of errors.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fracbit.numerics.linalg import Coupling
from fracbit.numerics.packed import PackedTensor, decoded_parts, quantized_columns
from fracbit.numerics.ranges import quantize_tensor
from fracbit.numerics.stats import Stats
from fracbit.quantizers.quantizer import Quantized
from fracbit.records.checked import Checked
from fracbit.records.scheme import Scheme


class RoundToNearest(Checked):
    """Round-to-nearest; `search` looks for the block range of least error. Rows and linears share nothing."""

    called: ClassVar[str] = "quantizer rtn"
    needs: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[frozenset[str]] = frozenset({"energy"})

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
        """Quantize `weight` [out, in]; costs are squared errors, weighted by input energy where statistics are given."""
        importance = None if stats is None else stats.energy / max(stats.tokens, 1)  # [in]
        packed = quantize_tensor(weight, scheme, importance, search=self.search, columns=columns)
        costs, powers = squared_errors(weight, packed, importance)  # [out] each
        return Quantized(packed, costs, powers)


def squared_errors(
    weight: Tensor, packed: PackedTensor, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum over a row of h (w - q)^2 and of h w^2, with the importance h [in] of the inputs: [out] each.

    Columns that `packed` keeps in 16 bits count as exact. Decodes a run of rows at a time.
    """
    quantized = None if packed.columns is None else quantized_columns(packed.columns, packed.shape[1])
    inner = (
        importance if quantized is None or importance is None else importance[quantized]
    )  # [quantized columns]
    costs, powers = [], []
    for first, part in decoded_parts(packed):  # [rows, quantized columns]
        rows = weight[first : first + len(part)].float()  # [rows, in]
        powers.append(_weighted_squares(rows, importance))
        rows = rows if quantized is None else rows[:, quantized]  # [rows, quantized columns]
        costs.append(_weighted_squares(part.sub_(rows), inner))
    return torch.cat(costs), torch.cat(powers)  # [out] each


def _weighted_squares(x: Tensor, importance: Tensor | None) -> Tensor:
    squares = x.square() if importance is None else x.square().mul_(importance)
    return squares.sum(1)  # [rows]
