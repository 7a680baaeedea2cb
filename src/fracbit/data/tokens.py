"""Token ids with their origin, and samples drawn from them.

`Tokens` holds one source: all documents one after another in a flat array, and the hash of the bytes they came
from. So a million short documents cost no more than one long one. `Samples` is what a method sees: a matrix of
samples drawn from one or several sources with a seed, and the hash of exactly that matrix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fracbit.errors import DataError

Opening = Literal["stored", "window", "none"]


@dataclass(frozen=True, eq=False)
class Tokens:
    """The documents of one source.

    ids: int32 [count], all documents one after another. starts: int64 [documents + 1], where each begins,
    then count. source: as it was written. sha256: hash of the raw bytes that were read. bos: the id that
    opens every document, or None when they do not all open with the tokenizer's BOS. weight: share of the
    samples in a mixture. endless: where samples ask for more ids than there are, the documents follow once more in
    another order.
    """

    ids: Tensor
    starts: Tensor
    source: str
    sha256: str
    bos: int | None = None
    weight: float = 1.0
    notes: tuple[str, ...] = ()
    endless: bool = False

    @property
    def count(self) -> int:
        """Ids in all documents."""
        return len(self.ids)

    @property
    def documents(self) -> tuple[Tensor, ...]:
        """Each document as int64 [ids]."""
        return tuple(part.long() for part in torch.split(self.ids, self.starts.diff().tolist()))

    @property
    def stream(self) -> Tensor:
        """All documents one after another as int64 [count]."""
        return self.ids.long()

    def to_json(self) -> dict[str, object]:
        """What a manifest says about the source."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "tokens": self.count,
            "documents": len(self.starts) - 1,
            "bos": self.bos,
            "weight": self.weight,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples for the methods that read data.

    ids: int64 [samples, length]. sha256: hash_ids(ids). seed: of the draw. sources: what each sample came
    from, as JSON values. bos: how samples open (see sample).
    """

    ids: Tensor
    sha256: str
    seed: int
    bos: Opening
    sources: tuple[dict[str, object], ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """What a manifest says about the samples."""
        samples, length = self.ids.shape
        return {
            "samples": samples,
            "length": length,
            "sha256": self.sha256,
            "seed": self.seed,
            "bos": self.bos,
            "sources": list(self.sources),
            "notes": list(self.notes),
        }


def join_documents(documents: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """The flat ids int32 [count] and the starts int64 [documents + 1]."""
    starts = np.zeros(len(documents) + 1, dtype=np.int64)
    np.cumsum([len(document) for document in documents], out=starts[1:])
    ids = np.concatenate(documents).astype(np.int32)
    return torch.from_numpy(ids), torch.from_numpy(starts)


def hash_ids(ids: Tensor) -> str:
    """SHA-256 of ids: their shape and their values as little-endian int64, the same on every machine."""
    digest = hashlib.sha256(repr(tuple(ids.shape)).encode())
    digest.update(ids.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def sample(
    parts: Tokens | Sequence[Tokens], *, samples: int, length: int, seed: int, bos: Opening = "stored"
) -> Samples:
    """Draw `samples` pieces of `length` ids, from several sources in the ratio of their weights.

    The documents of a source are shuffled and joined; the row is cut into pieces that do not overlap, and
    pieces are drawn from it: no id is used twice (but of endless sources), and documents of exactly `length` ids stay whole.

    bos: "stored" keeps the ids as they were read; with "window" every sample opens with the BOS (a piece
    that does not begin a document gets it in front and loses its last id); "none" removes the BOS of the
    documents.

    Raises: DataError when a source holds fewer ids than its share, or has no BOS to work with.
    """
    parts = (parts,) if isinstance(parts, Tokens) else tuple(parts)
    _check_request(parts, samples, length)
    generator = torch.Generator().manual_seed(seed)
    shares = split_samples(samples, [part.weight for part in parts])
    drawn = [
        _draw(part, share, length, bos=bos, generator=generator)
        for part, share in zip(parts, shares, strict=True)
    ]  # each [share, length]
    ids = torch.cat(drawn)  # [samples, length]
    ids = ids[torch.randperm(samples, generator=generator)] if len(parts) > 1 else ids
    sources = tuple({**part.to_json(), "samples": share} for part, share in zip(parts, shares, strict=True))
    notes = tuple(note for part in parts for note in part.notes)
    return Samples(ids, hash_ids(ids), seed, bos=bos, sources=sources, notes=notes)


def split_samples(samples: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in the ratio of `weights` that sum to `samples` (largest remainder)."""
    exact = [samples * weight / sum(weights) for weight in weights]
    shares = [int(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda index: shares[index] - exact[index])
    for index in order[: samples - sum(shares)]:
        shares[index] += 1
    return shares


def shared_documents(first: Tokens, second: Tokens, *, run: int = 64) -> int:
    """How many documents of `first` are also in `second`, whole or in part.

    A document counts when it has a run of `run` ids in common with any document of `second`, at any place;
    one shorter than `run` counts when `second` holds the same document. The BOS is left out of the comparison.
    """
    ours, theirs = _bare_documents(first), _bare_documents(second)
    runs = [_runs(ids, run) for ids in ours]  # [runs of a document] each
    owners = np.repeat(np.arange(len(ours)), [len(hashes) for hashes in runs])  # [runs]
    # Runs in common, by their hashes.
    met = np.isin(np.concatenate(runs), np.concatenate([_runs(ids, run) for ids in theirs]))
    # Documents shorter than a run, as wholes.
    short = {ids.tobytes() for ids in theirs if len(ids) < run}
    same = sum(len(ids) < run and ids.tobytes() in short for ids in ours)
    return len(np.unique(owners[met])) + same


def _bare_documents(tokens: Tokens) -> list[np.ndarray]:
    skip = 0 if tokens.bos is None else 1
    return [document[skip:].numpy() for document in torch.split(tokens.ids, tokens.starts.diff().tolist())]


def _runs(ids: np.ndarray, run: int) -> np.ndarray:
    """A 64-bit hash of every run of `run` ids: a polynomial with an odd base, modulo 2^64."""
    count = len(ids) - run + 1
    if count < 1:
        return np.empty(0, dtype=np.uint64)
    values = ids.astype(np.uint64) + np.uint64(1)  # [ids]
    hashes = np.zeros(count, dtype=np.uint64)  # [runs]
    for offset in range(run):
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes += values[offset : offset + count]
    return hashes


def _draw(part: Tokens, share: int, length: int, *, bos: Opening, generator: torch.Generator) -> Tensor:
    """Pieces [share, length] of one source."""
    row = _shuffled(part, bos, generator)  # [ids]
    while part.endless and len(row) < share * length:
        row = torch.cat([row, _shuffled(part, bos, generator)])  # [ids]
    pieces = len(row) // length
    if share > pieces:
        raise DataError(
            f"{part.source} holds {len(row)} ids, and {share} samples x {length} ids = {share * length} are "
            f"needed: ask for at most {pieces} samples of this length (calibration.samples for calibration, "
            "spending.samples for a budget, --samples elsewhere), shorten them, or add text."
        )
    phase = int(torch.randint(len(row) - pieces * length + 1, (), generator=generator))
    matrix = row[phase : phase + pieces * length].view(pieces, length)  # [pieces, length]
    drawn = matrix[torch.randperm(pieces, generator=generator)[:share]].long()  # [share, length]
    return _open_windows(drawn, part.bos) if bos == "window" else drawn


def _shuffled(part: Tokens, bos: Opening, generator: torch.Generator) -> Tensor:
    documents = torch.split(part.ids, part.starts.diff().tolist())
    skip = 1 if bos == "none" and part.bos is not None else 0
    order = torch.randperm(len(documents), generator=generator).tolist()
    return torch.cat([documents[index][skip:] for index in order])  # [ids]


def _open_windows(drawn: Tensor, bos: int | None) -> Tensor:
    if bos is None:
        raise DataError(
            "samples cannot open with the BOS, since the source's documents do not. Read it with ?bos=always, "
            'or use bos="stored".'
        )
    moved = torch.cat([torch.full_like(drawn[:, :1], bos), drawn[:, :-1]], dim=1)  # [share, length]
    return torch.where(drawn[:, :1] == bos, drawn, moved)  # [share, length]


def _check_request(parts: Sequence[Tokens], samples: int, length: int) -> None:
    if not parts:
        raise DataError("no source to draw samples from: name at least one.")
    if samples < 1 or length < 1:
        raise DataError(f"got {samples} samples of {length} ids: both numbers must be at least 1.")
