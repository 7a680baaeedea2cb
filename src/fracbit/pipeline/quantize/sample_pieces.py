"""Pieces of the calibration samples: what sums are made of, and what ranks share out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from fracbit.models.walk import Hidden

PIECES = 8
"""Of the samples, where there are as many batches: the most ranks that can share a run. A rank alone holds at most four Gram
matrices of a linear for them, one for each level of the tree in which they are added."""


@dataclass(frozen=True)
class Pieces:
    """Consecutive pieces of the samples: `of` all, the numbers from `first` on. `batches`: for each, how many batches it has.

    `start`, `stop`: their samples.
    """

    of: int
    first: int
    batches: tuple[int, ...]
    start: int
    stop: int
    batch: int

    def part(self, number: int, count: int) -> Pieces:
        """The pieces of rank `number` of `count`."""
        begin, end = self.of * number // count, self.of * (number + 1) // count
        before, own = sum(self.batches[:begin]), self.batches[begin:end]
        start = before * self.batch
        stop = min(start + sum(own) * self.batch, self.stop)
        return replace(self, first=begin, batches=own, start=start, stop=stop)

    def cut(self, hidden: Hidden) -> Iterator[tuple[int, Hidden]]:
        """The number of each piece, and its batches of the states of all these pieces."""
        begin = 0
        for number, count in enumerate(self.batches, self.first):
            yield number, replace(hidden, batches=hidden.batches[begin : begin + count])
            begin += count


def pieces_of(samples: int, batch: int) -> Pieces:
    """All pieces of so many samples in batches of `batch`: whole batches, as equal as can be."""
    batches = -(-samples // batch)
    count = min(PIECES, batches)
    cuts = [batches * number // count for number in range(count + 1)]
    sizes = tuple(end - begin for begin, end in pairwise(cuts))
    return Pieces(count, 0, sizes, start=0, stop=samples, batch=batch)


def pieces_in(hidden: Hidden) -> Pieces:
    """All pieces of the samples whose states these are."""
    first = hidden.batches[0]
    return pieces_of(len(hidden.states), first.stop - first.start)
