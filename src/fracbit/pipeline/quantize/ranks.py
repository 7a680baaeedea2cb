"""One run over many processes, `torchrun --nproc-per-node N -m fracbit quantize ...`: the same bytes as in one.

    samples   are cut into pieces; each rank embeds, observes and walks those of its own pieces, and keeps their states
    linears   are shared out, group by group, to be quantized; what was made goes to every rank
    shards    are written by one rank each; rank 0 holds the lock of the output, and writes the manifest

Statistics are summed in the order of a tree over the pieces (`TreeSum`), whose number does not depend on that of the ranks. One
that fails says why in the store that torchrun keeps; the others find it there when their exchange breaks off.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fracbit.errors import FracbitError, RankError
from fracbit.numerics.stats import Stats, TreeSum
from fracbit.pipeline.quantize.sample_pieces import Pieces, pieces_of

T = TypeVar("T")
PATIENCE = "FRACBIT_RANK_PATIENCE"
"""Names the variable with the seconds that a rank waits for the others at an exchange: for their longest work between two."""
PATIENT = 1800.0
LAST_WORDS = 10.0
"""Seconds that a rank that failed waits until rank 0 has heard why: torchrun ends all ranks once one has ended."""
STOPPED, HEARD, DONE, LEFT = "fracbit/stopped", "fracbit/heard", "fracbit/done", "fracbit/left"
COLUMN_ROWS = (
    512  # rows whose work a column of a matrix costs besides its own: the loop of GPTQ goes column by column
)


@dataclass(frozen=True)
class Ranks:
    """The processes of a run: the `number` of this one, and their `count`. Every exchange raises `RankError` where it fails."""

    number: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which opens the output and speaks."""
        return self.number == 0

    def writes(self, number: int) -> bool:
        """Whether this rank writes the shard of this number."""
        return number % self.count == self.number

    def pieces(self, samples: int, batch: int) -> Pieces:
        """The pieces of so many samples that are this rank's, in batches of `batch`."""
        whole = pieces_of(samples, batch)
        if whole.of < self.count:
            raise RankError(
                f"{self.count} ranks cannot share {samples} samples in batches of {batch}, which make {whole.of} pieces; start "
                f"{whole.of} ranks or fewer, or take more samples"
            )
        return whole.part(self.number, self.count)

    def agree(self, facts: Mapping[str, str]) -> None:
        """Refuse ranks that do not say the same of everything that decides the output."""
        everywhere = self.gather(dict(facts))
        for name, value in facts.items():
            for number, other in enumerate(everywhere):
                if other.get(name) != value:
                    raise RankError(
                        f"ranks {self.number} and {number} disagree on {name}: {value} and {other.get(name)}; start all of "
                        "them with the same version, recipe and source"
                    )

    def gather(self, value: T) -> list[T]:
        """What every rank says, in the order of their numbers."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        _exchange(lambda: dist.all_gather_object(found, value))
        return found

    def tell(self, value: T) -> T:
        """What rank 0 says."""
        return self.gather(value)[0]

    def unite(self, mine: Mapping[str, T], names: Iterable[str]) -> dict[str, T]:
        """What all ranks made together, in the order of `names`."""
        found = {name: made for part in self.gather(dict(mine)) for name, made in part.items()}
        return {name: found[name] for name in names if name in found}

    def owners(self, costs: Mapping[str, int]) -> dict[str, int]:
        """Which rank does what: the most costly first, each to the rank that has the least to do."""
        load, found = [0] * self.count, dict[str, int]()
        for name, cost in sorted(costs.items(), key=lambda item: -item[1]):
            found[name] = load.index(min(load))
            load[found[name]] += cost
        return found

    def total(
        self,
        mine: TreeSum,
        owners: Mapping[str, int],
        needed: Callable[[Mapping[str, int]], bool],
        device: torch.device,
    ) -> dict[str, Stats]:
        """The statistics of all pieces. Gram matrices go to the rank that quantizes by them, and to all where they are
        `needed`, which is told how many tokens each linear saw; elsewhere they are None.
        """
        if self.count == 1:
            return mine.whole()
        nodes = self.gather(
            {at: {n: _light(s) for n, s in found.items()} for at, found in mine.nodes.items()}
        )
        everyone = needed(_tokens(nodes))
        result = TreeSum(mine.pieces)
        for rank, held in enumerate(nodes):
            for (level, place), found in held.items():
                own = mine.nodes.get((level, place), {}) if rank == self.number else {}
                for name, (stats, size) in found.items():
                    to = None if everyone else owners.get(name, 0)
                    gram = None if size is None else self._matrix(own.get(name), size, source=rank, to=to)
                    found[name] = replace(stats, gram=None if gram is None else gram.to(device)), size
                result.add(place, {name: stats for name, (stats, _) in found.items()}, level)
        return result.whole()

    def _matrix(self, held: Stats | None, size: int, *, source: int, to: int | None) -> Tensor | None:
        """The matrix [size, size] that the rank `source` has, where this is the rank `to`, or for all ranks (None)."""
        own = None if held is None else held.gram
        if to == source or (to is not None and self.number not in (source, to)):
            return own
        matrix = torch.empty(size, size) if own is None else own.cpu()  # [size, size]
        if to is None:
            _exchange(lambda: dist.broadcast(matrix, source))
        elif self.number == source:
            _exchange(lambda: dist.send(matrix, to))
        else:
            _exchange(lambda: dist.recv(matrix, source))
        return None if self.number == source and to is not None else matrix


ALONE = Ranks()


def cost(weights: Sequence[Tensor]) -> int:
    """What quantizing `weights` [out, in] of linears with one input costs, in units of a row of a column."""
    return weights[0].shape[1] * (sum(len(weight) for weight in weights) + COLUMN_ROWS)


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that torchrun started, this process among them; alone where it did not.

    A `FracbitError` of one rank ends all of them. Raises `RankError` where the others cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        yield ALONE
        return
    if dist.is_initialized():  # by a caller that does several things with them
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=_patience()))
    except (RuntimeError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise RankError(
            f"the ranks do not find each other: {said}; look at MASTER_ADDR and MASTER_PORT"
        ) from error
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    try:
        yield ranks
        _part(ranks)
    except RankError:
        if ranks.leads:
            _leave_word(HEARD, "1")
        raise
    except FracbitError as error:
        _leave_word(STOPPED, f"rank {ranks.number} stopped: {error}")
        dist.destroy_process_group()  # which breaks off what the others wait for
        if not ranks.leads and _word(HEARD, LAST_WORDS):
            time.sleep(0.5)
        raise
    finally:
        with suppress(RuntimeError, ValueError):
            dist.destroy_process_group()


def _patience() -> float:
    """Seconds to wait for other ranks. Raises `RankError` for a variable that is no such number."""
    given = os.environ.get(PATIENCE, str(PATIENT))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise RankError(
            f"{PATIENCE} is {given!r}; it should be the seconds that a rank waits for the others, such as 1800"
        )
    return seconds


def _part(ranks: Ranks) -> None:
    """Leave together: what one rank closes early would break the last exchange of the others."""
    _leave_word(f"{DONE}/{ranks.number}", "1")
    for number in range(ranks.count):
        _word(f"{DONE}/{number}", _patience())
    # Rank 0 may hold the store.
    _leave_word(f"{LEFT}/{ranks.number}", "1")
    for number in range(ranks.count if ranks.leads else 0):
        _word(f"{LEFT}/{number}", LAST_WORDS)


def _light(stats: Stats) -> tuple[Stats, int | None]:
    """Statistics without their matrix, and its size."""
    return replace(stats, gram=None), None if stats.gram is None else len(stats.gram)


def _tokens(
    nodes: Sequence[Mapping[tuple[int, int], Mapping[str, tuple[Stats, int | None]]]],
) -> dict[str, int]:
    found: dict[str, int] = {}
    for held in nodes:
        for each in held.values():
            for name, (stats, _) in each.items():
                found[name] = found.get(name, 0) + stats.tokens
    return found


def _exchange(run: Callable[[], object]) -> None:
    """Run an exchange between ranks. Raises `RankError` with the reason of the rank that failed."""
    try:
        run()
    except (RuntimeError, ValueError) as error:  # gloo's; of a connection that broke, or of waiting in vain
        raise RankError(_reason(str(error))) from error


def _reason(said: str) -> str:
    """Why an exchange broke off, from the store if a rank left word there."""
    why = _word(STOPPED, 3.0)
    return (
        why
        or f"another rank ended or did not answer in time ({said.splitlines()[0]}); see what torchrun says of it"
    )


def _leave_word(name: str, word: str) -> None:
    """Put a word into the store, if that is still there."""
    store: Any = dist.distributed_c10d._get_default_store()
    with suppress(RuntimeError, ValueError):
        store.set(name, word)


def _word(name: str, patience: float) -> str:
    """The word of that name, once a rank left it; "" where none does in so many seconds, or the store is gone."""
    store: Any = dist.distributed_c10d._get_default_store()
    until = time.monotonic() + patience
    with suppress(RuntimeError, ValueError):
        while time.monotonic() < until:
            if store.check([name]):
                return str(store.get(name).decode())
            time.sleep(0.05)
    return ""
