"""Reads the tensors of a source with their hashes, the next tensor while the current one is used.

A sweep keeps the tensors that it has read (`Reader.cache`); other runs free each tensor after use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from fracbit.checkpoint.source import Source, read_tensor, tensor_hash
from fracbit.errors import WeightError
from fracbit.models.skeleton import Origin
from fracbit.pipeline.quantize.schedule import FloatItem, Item

PIECE = 1 << 22  # weights that are checked at a time


@dataclass(frozen=True, eq=False)
class Reader:
    """Tensors of a source. `cache`: tensors and hashes by name, filled as they are read; None keeps nothing."""

    source: Source
    cache: dict[str, tuple[Tensor, str]] | None = None

    def read(self, item: Item) -> tuple[Tensor, str]:
        """The tensor of an item and the SHA-256 of the tensor on disk that holds it."""
        return self.read_origin(item.origin)

    def read_origin(self, origin: Origin) -> tuple[Tensor, str]:
        """The tensor at `origin` and the SHA-256 of the tensor on disk that holds it."""
        name = origin.name
        if self.cache is not None and name in self.cache:
            whole, digest = self.cache[name]
        else:
            whole = read_tensor(self.source, name)
            digest = tensor_hash(whole)
        if self.cache is not None:
            self.cache[name] = whole, digest
        return origin.read(whole), digest

    def ahead(self, items: Iterable[Item]) -> Iterator[tuple[Item, Tensor, str]]:
        """Items in order, each with its tensor and hash; a thread reads the next one while this one is used."""
        with ThreadPoolExecutor(1) as pool:
            waiting: tuple[Item, Future[tuple[Tensor, str]]] | None = None
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
        tensors[item.name], hashes[item.origin.name] = reader.read(item)
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
