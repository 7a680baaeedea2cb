"""What a transform is: an equal-function rewrite of a float model, described by where it acts. Tensors only.

The float model's output stays the same; its weights, or what they meet, become easier to round. models/fold.py folds what a
transform gives into a model, the pipeline decides when.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from fracbit.numerics.stats import Stats
from fracbit.records.scheme import Scheme

Factors: TypeAlias = Callable[[Sequence[Tensor], Sequence[Scheme], Stats], Tensor]
"""(weights [out, in] of the linears that read one input, their schemes, that input's statistics) -> factors [in] > 0."""


@dataclass(frozen=True)
class Transform:
    """One line of the table; it acts in at least one place.

    - `factors`, block by block, once its inputs were observed, gram matrix included: what produces an input is divided by them,
      the columns that read it are multiplied.
    - `stream_signs` (width, seed) -> [width], +1 or -1, before anything is observed: the residual stream is multiplied by these
      signs and the Hadamard matrix, all of it folded into the weights. A head that is tied to its table becomes a matrix of
      its own.
    - `turns_inner`, block by block, before it is observed: the inputs of the quantized linears that read what the MLP makes
      inside are multiplied by the Hadamard matrix while the model runs, its inverse is in the weight.
    """

    factors: Factors | None = None
    stream_signs: Callable[[int, int], Tensor] | None = None
    turns_inner: bool = False

    @property
    def rotates(self) -> bool:
        """Whether weights are turned: they are then no longer numbers of the source's type."""
        return self.stream_signs is not None or self.turns_inner
