"""Conversions between a quantizer's result, the stored layer and the record of a layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal

from fracbit.checkpoint.format import StoredLayer, stored_layer
from fracbit.checkpoint.output import Shards
from fracbit.pipeline.quantize.schedule import LayerItem, Schedule
from fracbit.quantizers import Quantized
from fracbit.records.inputs import Inputs
from fracbit.records.run import LayerRecord, ShardRecord


def layer_record(
    found: Quantized,
    kind: Literal["linear", "embedding"],
    inputs: Inputs | None = None,
    rotated: bool = False,
) -> LayerRecord:
    """The record of a quantized layer."""
    stored = stored_layer(found.packed, kind)
    return LayerRecord(
        stored.scheme,
        found.loss,
        stored.bits_per_weight,
        notes=found.notes,
        outliers=stored.outliers,
        outlier_dtype=stored.outlier_dtype,
        inputs=inputs,
        rotated=rotated,
    )


def stored_as(item: LayerItem, record: LayerRecord) -> StoredLayer:
    """How a scheduled layer is really stored, according to its record."""
    return replace(
        item.stored,
        scheme=record.scheme,
        outliers=record.outliers,
        outlier_dtype=record.outlier_dtype,
        inputs=record.inputs,
        rotated=record.rotated,
    )


def records_of(schedule: Schedule, target: Shards) -> dict[str, ShardRecord]:
    """The records of all shards of a finished run."""
    found: dict[str, ShardRecord] = {}
    for shard in schedule.shards:
        record = target.record(shard)
        assert record is not None, f"{shard} was not finished"
        found[shard] = record
    return found


def layer_records(records: Iterable[ShardRecord]) -> dict[str, LayerRecord]:
    """The record of every quantized layer, by name."""
    return {name: layer for record in records for name, layer in record.layers.items()}


def stored_layers(schedule: Schedule, records: Mapping[str, ShardRecord]) -> dict[str, StoredLayer]:
    """How every quantized layer is stored, by the name of its module, as config.json lists them."""
    return {
        item.name.removesuffix(".weight"): stored_as(item, records[shard].layers[item.layer.name])
        for shard, items in schedule.shards.items()
        for item in items
        if isinstance(item, LayerItem)
    }
