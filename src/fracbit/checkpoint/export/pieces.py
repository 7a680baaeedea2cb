"""Weight files of an export: pieces that are made one by one, in shards that a run can resume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from fracbit.checkpoint.export.exporter import StoredModel
from fracbit.checkpoint.output import Output
from fracbit.checkpoint.shards import cut_shards, write_index
from fracbit.checkpoint.source import TensorInfo
from fracbit.records.progress import Progress
from fracbit.records.run import LayerRecord, ShardRecord

SHARD_BYTES = 2 << 30
Tensors: TypeAlias = tuple[dict[str, Tensor], LayerRecord | None]
"""Tensors by name, and a record of the layer if it was rounded again."""


@dataclass(frozen=True)
class Piece:
    """Tensors that are made together: a layer's, or one that stayed float.

    `name`: what progress calls it; `bytes`: about how many it takes; `make` makes them.
    """

    name: str
    bytes: int
    make: Callable[[], Tensors]


def copied_piece(stored: StoredModel, name: str, renamed: str | None = None) -> Piece:
    """A tensor that stayed float, as it is stored, perhaps under another name."""
    return Piece(
        name, stored.source.tensors[name].bytes, lambda: ({renamed or name: stored.tensor(name)}, None)
    )


def write_pieces(pieces: Sequence[Piece], target: Output, show: Progress) -> tuple[str, ...]:
    """Write shards and their index, except shards that `target` has a record of; one is in memory at a time.

    Returns the names of the files.
    """
    shards = cut_shards(pieces, lambda piece: piece.bytes, SHARD_BYTES)
    total, done = sum(piece.bytes for piece in pieces), 0
    places: dict[str, str] = {}
    stored = 0
    for shard, content in shards.items():
        record = target.record(shard)
        if record is None:
            tensors: dict[str, Tensor] = {}
            layers: dict[str, LayerRecord] = {}
            for piece in content:
                made, layer = piece.make()
                tensors |= made
                layers |= {} if layer is None else {piece.name: layer}
                done += piece.bytes
                show(piece.name, done, total)
            target.write_shard(shard, tensors, ShardRecord(layers=layers))
            record = target.record(shard)
            assert record is not None
        else:
            done += sum(piece.bytes for piece in content)
            show(shard, done, total)
        places |= dict.fromkeys(record.stored, shard)
        stored += sum(TensorInfo(shard, one.dtype, one.shape).bytes for one in record.stored.values())
    write_index(target.folder, places, stored)
    return tuple(shards)
