"""Which rows of large weights the data-free scores look at: what makes `fracbit plan` of a 7B model take seconds.

A share of z-scores or a relative error over 16 million weights is known to a fraction of a percent from a quarter of a million
of them. The rows are drawn one (or one group) from each of equal parts of a weight, so that no part of it is missed and no
stride meets the heads'; all linears of a unit give the same share of their rows, so that pooling weighs them as before. The
sample is scored in two halves: their mean is the score, and how far they are apart says how well it is known.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fracbit.records.scheme import Scheme, flat_block

Rows = tuple[slice, ...]


@dataclass(frozen=True)
class Sampled:
    """How much was looked at: weights read of all that there are, and by how much scores may be off for it.

    `errors`: for each unit half the distance of the two halves' scores over their mean, an estimate of one standard error.
    """

    weights: int
    of: int
    errors: tuple[float, ...]

    def to_json(self) -> dict[str, float]:
        """For a score's protocol."""
        middle = sorted(self.errors)[len(self.errors) // 2]
        return {
            "weights": self.weights,
            "of": self.of,
            "median_error": middle,
            "largest_error": max(self.errors),
        }


def sampling_notes(protocol: Mapping[str, Any]) -> tuple[str, ...]:
    """What a user should know of scores with this protocol."""
    found = protocol.get("sampled")
    if not found:
        return ()
    share, middle, largest = found["weights"] / found["of"], found["median_error"], found["largest_error"]
    return (
        f"scores are from {100 * share:.1f} % of the weights, known to {100 * middle:.2g} % (the worst to "
        f"{100 * largest:.2g} %); `fracbit plan` and `score` read all with --whole",
    )


def group_of(schemes: Sequence[Scheme | None]) -> int | None:
    """Rows that must stay together for the errors of these schemes to be theirs; None: only the whole weight will do.

    Quantized scales share blocks over rows, in a sample with other rows than in the whole.
    """
    group = 1
    for scheme in schemes:
        if scheme is None:
            continue
        if scheme.block == "tensor" or flat_block(scheme.block):
            return None
        if scheme.axis == "out":
            if not isinstance(scheme.block, int):
                return None
            group = math.lcm(group, scheme.block)
    return group


def sample_rows(
    shapes: Mapping[str, tuple[int, int]], group: int, weights: int
) -> dict[str, tuple[Rows, Rows]] | None:
    """Two disjoint halves of a sample of the rows of a unit's linears; None where reading all is hardly more.

    `shapes`: linear -> (out, in); `group`: rows that stay together; `weights`: how many of a linear are looked at. The draw
    depends on the linear's name alone.
    """
    total = sum(out * width for out, width in shapes.values())
    share = max(len(shapes) * weights / total, 2 * group / min(out for out, _ in shapes.values()))
    if share > 0.25:
        return None
    return {name: _rows(name, out, group, share) for name, (out, _) in shapes.items()}


def _rows(name: str, out: int, group: int, share: float) -> tuple[Rows, Rows]:
    count = 2 * max(1, round(out * share / group / 2))
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()
    edges = [index * (out // group) // count for index in range(count + 1)]
    starts = [
        math.floor(a + part * (b - a)) * group for a, b, part in zip(edges, edges[1:], drawn, strict=False)
    ]
    rows = [slice(start, start + group) for start in starts]
    return tuple(rows[::2]), tuple(rows[1::2])


def relative_error(values: Sequence[float]) -> float:
    """Half of the distance of two values over their mean magnitude; 0 when they agree."""
    apart = (max(values) - min(values)) / 2
    return apart / (sum(map(abs, values)) / len(values)) if apart else 0.0
