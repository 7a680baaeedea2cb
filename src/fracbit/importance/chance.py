"""A random order: the baseline of arXiv:2406.17415, to be averaged over at least five seeds."""

import hashlib

from fracbit.importance.methods import ScoreMethod
from fracbit.importance.view import LayerView


def chance(view: LayerView) -> float:
    """A number in [0, 1) drawn from the seed and the unit's name: the same on every machine, whatever is scored beside it."""
    digest = hashlib.sha256(f"{view.seed} {view.name}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


RANDOM = ScoreMethod("drawn from the seed", chance)
