"""Round-to-nearest: every weight goes to the nearest value of its block's grid. Data-free; the baseline of all papers.

With `search`, each block's range is shrunk to the least squared error, weighted by the inputs' energy when statistics are
given (as AWQ and llama.cpp's importance matrix do), plain otherwise.
"""

from dataclasses import dataclass

from torch import Tensor

from fracbit.numerics.grid import quantize_tensor
from fracbit.numerics.packed import PackedTensor, decoded_parts, quantized_columns
from fracbit.numerics.stats import Stats
from fracbit.quantizers.quantizer import Quantized
from fracbit.records.scheme import Scheme


@dataclass(frozen=True)
class RoundToNearest:
    """Round-to-nearest; `search` looks for the block range of least error, `columns` are kept in 16 bits."""

    search: bool = False
    needs: frozenset[str] = frozenset()

    def __call__(
        self, weight: Tensor, scheme: Scheme, stats: Stats | None = None, columns: Tensor | None = None
    ) -> Quantized:
        """Quantize `weight` [out, in]; the loss is the relative squared error, weighted by input energy when known."""
        importance = None if stats is None else stats.energy / max(stats.tokens, 1)
        packed = quantize_tensor(weight, scheme, importance, self.search, columns)
        return Quantized(packed, relative_error(weight, packed, importance))


def relative_error(weight: Tensor, packed: PackedTensor, importance: Tensor | None = None) -> float:
    """Sum h (w - q)^2 / sum h w^2 with the input channels' importance h [in]; 0 for a weight of zeros.

    Columns that `packed` keeps in 16 bits count as exact. Decodes a run of rows at a time.
    """
    kept = None if packed.columns is None else quantized_columns(packed.columns, packed.shape[1])
    error = power = 0.0
    for first, part in decoded_parts(packed):
        rows = weight[first : first + len(part)].float()
        power += _weighted_squares(rows, importance)
        rows = rows if kept is None else rows[:, kept]
        error += _weighted_squares(
            part.sub_(rows), importance if kept is None or importance is None else importance[kept]
        )
    return error / power if power > 0 else 0.0


def _weighted_squares(x: Tensor, importance: Tensor | None) -> float:
    squares = x.square() if importance is None else x.square().mul_(importance)
    return float(squares.sum())
