"""The rows of large weights that data-free scores read. With this sample, `fracbit plan` of a 7B model takes seconds.

For 16 million weights, a sample of a quarter of a million gives a share of z-scores or a relative error to a fraction
of a percent. A weight is divided into equal parts, and one row (or one group) is drawn at random from each. So no part
is missed, and rows do not repeat with the period of the attention heads. All linears of a unit give the same share of
their rows, so that pooling weights them as before. The sample is scored in two halves: their mean is the score, and
their difference estimates its error.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fracbit.records.scheme import Scheme, flat_block, patch_block

Rows = tuple[slice, ...]


@dataclass(frozen=True)
class Sampled:
    """How many weights were read, out of how many, and the sampling errors of the scores.

    `errors`: for each number of a unit, half the difference of the two halves divided by their mean, an estimate of one
    standard error.
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
    """What a user should know about scores with this protocol."""
    found = protocol.get("sampled")
    if not found:
        return ()
    share, middle, largest = found["weights"] / found["of"], found["median_error"], found["largest_error"]
    return (
        f"scores are from {100 * share:.1f} % of the weights; their median error is {100 * middle:.2g} %, the largest "
        f"{100 * largest:.2g} %; `fracbit plan` and `score` read all weights with --whole",
    )


def group_of(schemes: Sequence[Scheme | None]) -> int | None:
    """Rows that must stay together so that a sample has the errors of these schemes; None: only the whole weight does.

    Quantized scales share blocks over rows; in a sample, these are other rows than in the whole weight.
    """
    group = 1
    for scheme in schemes:
        if scheme is None:
            continue
        if scheme.block == "tensor" or flat_block(scheme.block):
            return None
        if (patch := patch_block(scheme.block)) is not None:
            group = math.lcm(group, patch[0])
        if scheme.axis == "out":
            if not isinstance(scheme.block, int):
                return None
            group = math.lcm(group, scheme.block)
    return group


def sample_rows(
    shapes: Mapping[str, tuple[int, int]], group: int, weights: int
) -> dict[str, tuple[Rows, Rows]] | None:
    """Two disjoint halves of a sample of the rows of a unit's linears; None if it would be more than a quarter of them.

    `shapes`: linear -> (out, in); `group`: rows that stay together; `weights`: how many weights of a linear are read.
    The draw is seeded with the linear's name.
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
    """Half the difference of two values divided by their mean magnitude; 0 when they are equal."""
    apart = (max(values) - min(values)) / 2
    return apart / (sum(map(abs, values)) / len(values)) if apart else 0.0
