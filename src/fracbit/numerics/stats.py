"""`Stats`: statistics of the inputs of a linear layer, and `TreeSum`: their sum, to the same bits whoever makes which part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fracbit.errors import WeightError
from fracbit.numerics.linalg import add_gram


@dataclass(frozen=True, eq=False)
class Stats:
    """Sums over the tokens a layer saw. `gram` [in, in] is sum x x^T; `absmax` [in] max |x|; `energy` [in] sum x^2; fp32."""

    tokens: int
    gram: Tensor | None
    absmax: Tensor
    energy: Tensor


def empty(inputs: int, gram: bool = True, device: torch.device | str = "cpu") -> Stats:
    """The neutral element for a layer of `inputs` inputs; without `gram` only the diagonal statistics are kept."""
    zeros = torch.zeros(inputs, device=device)  # [in]
    return Stats(0, torch.zeros(inputs, inputs, device=device) if gram else None, zeros, zeros.clone())


def add_inputs(
    stats: Stats,
    x: Tensor,
    add: Callable[[Tensor, Tensor], Tensor] = add_gram,
    weights: Tensor | None = None,
) -> Stats:
    """Add the inputs `x` [tokens, in]. Raises `WeightError` on NaN or Inf.

    `add(gram, x)` gives the gram matrix with theirs; if it writes into the old one, the old `stats` must not be used again.
    `weights` [tokens]: how much each token counts in `gram` and `energy`; alike where None.
    """
    if not len(x):
        return stats
    # aminmax takes eight times as long in bfloat16
    absmax = torch.maximum(stats.absmax, x.abs().amax(0).float())  # [in]
    if weights is not None:
        x = (x * weights.to(x.device).sqrt()[:, None]).to(x.dtype)  # [tokens, in]
    gram = None if stats.gram is None else add(stats.gram, x)  # [in, in]
    energy = stats.energy + x.float().square().sum(0) if gram is None else gram.diagonal().clone()  # [in]
    if not bool(torch.isfinite(energy).all()):
        bad = int((~torch.isfinite(x)).any(1).sum())
        what = f"{bad} of {len(x)} input rows hold NaN or Inf"
        raise WeightError(
            what if bad else f"squares of inputs of up to {float(absmax.max()):.3g} pass the range of fp32"
        )
    return Stats(stats.tokens + len(x), gram, absmax, energy)


def merge(a: Stats, b: Stats) -> Stats:
    """The statistics of both sets of tokens."""
    gram = None if a.gram is None or b.gram is None else a.gram + b.gram  # [in, in]
    return Stats(a.tokens + b.tokens, gram, torch.maximum(a.absmax, b.absmax), a.energy + b.energy)


@dataclass(eq=False)
class TreeSum:
    """The sum of statistics over `pieces` numbered sets of tokens, by the name of a linear.

    Floats are added in the order of a binary tree over the numbers of the pieces: the sum has the same bits whoever adds up
    which pieces, and in which order they come. `nodes`: sums that wait for their neighbour, by level (0: one piece) and place.
    """

    pieces: int
    nodes: dict[tuple[int, int], dict[str, Stats]] = field(default_factory=dict)

    def add(self, place: int, found: dict[str, Stats], level: int = 0) -> None:
        """Add what was `found` in a piece, or below another node of the tree. It must not be used again."""
        while (width := -(-self.pieces >> level)) > 1:
            beside = place ^ 1
            if beside < width:
                if (level, beside) not in self.nodes:
                    break
                other = self.nodes.pop((level, beside))
                found = _both(found, other) if place < beside else _both(other, found)
            level, place = level + 1, place // 2
        self.nodes[level, place] = found

    def whole(self) -> dict[str, Stats]:
        """The sum, once every piece was added."""
        ((_, found),) = self.nodes.items()
        return found


def _both(a: dict[str, Stats], b: dict[str, Stats]) -> dict[str, Stats]:
    """The sums of two nodes; the matrices of `a` are written over."""
    return {**a, **{name: _merge_(a[name], other) if name in a else other for name, other in b.items()}}


def _merge_(a: Stats, b: Stats) -> Stats:
    """`merge`, into the matrix of `a`: a new one for every sum would cost its memory again."""
    gram = None if a.gram is None or b.gram is None else a.gram.add_(b.gram)  # [in, in]
    return Stats(a.tokens + b.tokens, gram, torch.maximum(a.absmax, b.absmax), a.energy + b.energy)
