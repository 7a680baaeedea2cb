"""Round-to-nearest: every weight goes to the nearest value of its block's grid. Data-free; the baseline of all papers.

With `search`, each block's range is shrunk to the least squared error, weighted by the inputs' energy when statistics are
given (as AWQ and llama.cpp's importance matrix do), plain otherwise.
"""

from dataclasses import dataclass

from torch import Tensor

from fracbit.numerics.grid import quantize_tensor
from fracbit.numerics.packed import decode
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
        return Quantized(packed, relative_error(weight, decode(packed), importance))


def relative_error(weight: Tensor, decoded: Tensor, importance: Tensor | None = None) -> float:
    """Sum h (w - q)^2 / sum h w^2, the weighted relative squared error; 0 for a weight of zeros."""
    error, power = (decoded - weight).square(), weight.float().square()
    if importance is not None:
        error, power = error * importance, power * importance
    total = float(power.sum())
    return float(error.sum()) / total if total > 0 else 0.0
