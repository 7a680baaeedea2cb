"""The loop of data-free runs: read a tensor, quantize it, write its shard. The whole model is never in memory.

    for each shard: for each item: read, quantize -> write

One thread reads and hashes the next tensor while the current one is quantized with torch's threads. Memory holds one
output shard, the tensor that is being quantized and the one that is being read.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from fracbit.checkpoint.format import tensor_names
from fracbit.checkpoint.output import Shards
from fracbit.pipeline.quantize.layer import Method, plain_nearest, quantize_layers
from fracbit.pipeline.quantize.reader import check_finite
from fracbit.pipeline.quantize.record import layer_record
from fracbit.pipeline.quantize.schedule import Item, LayerItem
from fracbit.pipeline.quantize.work import Work
from fracbit.quantizers import Quantized
from fracbit.records.progress import QUANTIZING, phase
from fracbit.records.run import LayerRecord, ShardRecord


def stream_shards(work: Work, target: Shards) -> None:
    """Fill every shard that `target` lacks. Raises `WeightError` (layer named), `OutputError`."""
    total, done = work.opened.source.bytes, 0
    for number, (shard, items) in enumerate(work.schedule.shards.items()):
        if work.ranks.writes(number) and target.record(shard) is None:
            write_shard(work, target, shard=shard, items=items, done=done)
        done += sum(source_bytes(work, item) for item in items)
        phase(work.show, QUANTIZING)(shard, done, total)


def write_shard(work: Work, target: Shards, shard: str, items: Iterable[Item], done: int) -> None:
    """Quantize the items of a shard and write it; `done` bytes of the source came before."""
    tensors: dict[str, Tensor] = {}
    hashes: dict[str, str] = {}
    layers: dict[str, LayerRecord] = {}
    for item, tensor, read in work.reader.ahead(items):
        hashes |= read
        if isinstance(item, LayerItem):
            found = quantize_item(work.method, item, tensor)
            layers[item.layer.name] = layer_record(found, item.stored.kind)
            tensors |= tensor_names(item.layer.name, found.packed)
        else:
            check_finite(item, tensor)
            tensors[item.name] = tensor
        done += source_bytes(work, item)
        phase(work.show, QUANTIZING)(item.name, done, work.opened.source.bytes)
    target.write_shard(shard, tensors, ShardRecord(hashes, layers))


def quantize_item(method: Method, item: LayerItem, tensor: Tensor) -> Quantized:
    """Quantize a layer from its tensor in the source. Only linears of the blocks have 16-bit columns."""
    name = item.layer.name
    method = method if item.layer.kind == "linear" else plain_nearest(method.fill.search)
    weight = tensor.T if item.layer.transposed else tensor  # [out, in]
    return quantize_layers(method, {name: weight}, {name: item.stored.scheme})[name]


def source_bytes(work: Work, item: Item) -> int:
    """Bytes of the source that an item reads."""
    return sum(work.opened.source.tensors[name].bytes for name in item.origin.names)
