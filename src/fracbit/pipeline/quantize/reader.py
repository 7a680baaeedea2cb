"""Reads the tensors of a source with their hashes, the next tensor while the current one is used.

A sweep keeps the tensors that it has read (`Reader.cache`); other runs free each tensor after use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from fracbit.checkpoint.source import Source, read_tensor, tensor_hash
from fracbit.errors import WeightError
from fracbit.models.origin import Origin
from fracbit.pipeline.quantize.schedule import FloatItem, Item

Hashes: TypeAlias = dict[str, str]
"""SHA-256 by the names of tensors on disk."""
PIECE = 1 << 22  # weights that are checked at a time


@dataclass(frozen=True, eq=False)
class Reader:
    """Tensors of a source. `cache`: tensors and hashes by name, filled as they are read; None keeps nothing.

    `last`: the stack of experts that was read last. The next item is likely another part of it.
    """

    source: Source
    cache: dict[str, tuple[Tensor, str]] | None = None
    last: dict[tuple[str | None, ...], tuple[Tensor, Hashes]] = field(default_factory=dict)

    def read(self, item: Item) -> tuple[Tensor, Hashes]:
        """The tensor of an item and the SHA-256 of the tensors on disk that hold it."""
        return self.read_origin(item.origin)

    def read_origin(self, origin: Origin) -> tuple[Tensor, Hashes]:
        """The tensor at `origin` and the SHA-256 of the tensors on disk that hold it."""
        target = None if origin.conversion is None else origin.conversion.target
        asked = (*origin.names, target)
        if asked not in self.last:
            self.last.clear()
            whole = {name: self._whole(name) for name in origin.names}
            joined = origin.joined([tensor for tensor, _ in whole.values()])
            found = joined, {name: digest for name, (_, digest) in whole.items()}
            if origin.cut is None:
                return found
            self.last[asked] = found  # the next expert's part is of it too
        stack, hashes = self.last[asked]
        return origin.part_of(stack), hashes

    def _whole(self, name: str) -> tuple[Tensor, str]:
        """A tensor on disk with its SHA-256."""
        if self.cache is not None and name in self.cache:
            return self.cache[name]
        whole = read_tensor(self.source, name)
        found = whole, tensor_hash(whole)
        if self.cache is not None:
            self.cache[name] = found
        return found

    def ahead(self, items: Iterable[Item]) -> Iterator[tuple[Item, Tensor, Hashes]]:
        """Items in order, each with its tensor and hashes; a thread reads the next one while this one is used."""
        with ThreadPoolExecutor(1) as pool:
            waiting: tuple[Item, Future[tuple[Tensor, Hashes]]] | None = None
            for item in items:
                following = (item, pool.submit(self.read, item))
                if waiting is not None:
                    yield waiting[0], *waiting[1].result()
                waiting = following
            if waiting is not None:
                yield waiting[0], *waiting[1].result()


def read_items(reader: Reader, items: Iterable[Item]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of some items, by name, and the hashes of what was read.

    Raises `WeightError` where one holds NaN or Inf.
    """
    tensors: dict[str, Tensor] = {}
    hashes: dict[str, str] = {}
    for item in items:
        tensors[item.name], read = reader.read(item)
        hashes |= read
        check_finite(item, tensors[item.name])
    return tensors, hashes


def check_finite(item: Item, tensor: Tensor) -> None:
    """Raise `WeightError` when a tensor of the model holds NaN or Inf. It may be large, so it is checked in pieces."""
    unused = isinstance(item, FloatItem) and item.unused
    if unused or not tensor.is_floating_point():
        return
    bad = sum(int((~torch.isfinite(part.float())).sum()) for part in tensor.reshape(-1).split(PIECE))
    if bad:
        raise WeightError(
            f"tensor {item.name}: {bad} of {tensor.numel()} weights are NaN or Inf; fix the source first"
        )
