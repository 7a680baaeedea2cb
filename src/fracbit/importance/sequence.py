"""Orders that look at nothing but a layer's place: the first layers first, or the last.

The control that arXiv:2406.17415 must beat: at 2 and 4 bits, protecting the layers near the embedding alone has brought most
of the gain of searched allocations (AutoRound's published tables).
"""

from fracbit.importance.methods import ScoreMethod
from fracbit.importance.view import LayerView


def first(view: LayerView) -> float:
    """Earlier is more important: count - index."""
    return float(view.count - view.index)


def last(view: LayerView) -> float:
    """Later is more important: index + 1."""
    return float(view.index + 1)


FIRST = ScoreMethod("earlier is more important", first)
LAST = ScoreMethod("later is more important", last)
