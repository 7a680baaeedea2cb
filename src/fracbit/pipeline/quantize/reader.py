"""Reading the tensors of a source: each with its hash, the next one while this one is used.

A sweep keeps what it has read (`Reader.kept`); everything else reads a tensor when it is needed and lets it go.
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
    """Tensors of a source. `kept`: tensors and hashes by name, filled as they are read; None keeps nothing."""

    source: Source
    kept: dict[str, tuple[Tensor, str]] | None = None

    def read(self, item: Item) -> tuple[Tensor, str]:
        """The tensor of an item and the SHA-256 of the tensor on disk that holds it."""
        return self.read_origin(item.origin)

    def read_origin(self, origin: Origin) -> tuple[Tensor, str]:
        """The tensor that lies there and the SHA-256 of the tensor on disk that holds it."""
        name = origin.name
        if self.kept is not None and name in self.kept:
            whole, digest = self.kept[name]
        else:
            whole = read_tensor(self.source, name)
            digest = tensor_hash(whole)
        if self.kept is not None:
            self.kept[name] = whole, digest
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


def check_finite(item: Item, tensor: Tensor) -> None:
    """Raise `WeightError` when a tensor of the model holds NaN or Inf; looked at in pieces, as it may be large."""
    unused = isinstance(item, FloatItem) and item.unused
    if unused or not tensor.is_floating_point():
        return
    bad = sum(int((~torch.isfinite(part.float())).sum()) for part in tensor.reshape(-1).split(PIECE))
    if bad:
        raise WeightError(
            f"tensor {item.name}: {bad} of {tensor.numel()} weights are NaN or Inf; mend the source first"
        )
