"""The end of a run: index, tokenizer files, manifest, model card, and config.json last.

No file holds a time or date, so the same recipe gives the same folder, byte for byte.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers

from fracbit.checkpoint.card import Facts, model_card
from fracbit.checkpoint.folder import MANIFEST
from fracbit.checkpoint.format import StoredLayer, quantization_config
from fracbit.checkpoint.output import Output, code_in, copy_rest
from fracbit.checkpoint.shards import write_index
from fracbit.checkpoint.source import Source, combined_hash
from fracbit.models.experts import SplitExperts
from fracbit.pipeline.quantize.calibrated import rewrite_notes
from fracbit.pipeline.quantize.record import layer_records, records_of, stored_layers
from fracbit.pipeline.quantize.schedule import FloatItem
from fracbit.pipeline.quantize.work import Work
from fracbit.records.grouped import grouped
from fracbit.records.recipe import key
from fracbit.records.run import LayerRecord, ShardRecord, Totals
from fracbit.records.version import __version__


def finish(work: Work, target: Output) -> tuple[Totals, tuple[str, ...]]:
    """Write everything except the shards; returns the totals of the checkpoint, and notes."""
    source = work.opened.source
    records = records_of(work.schedule, target)
    layers, made = stored_layers(work.schedule, records), layer_records(records.values())
    totals, notes = totals_of(work, layers, target), run_notes(work, made)
    places = {name: shard for shard, record in records.items() for name in record.stored}
    write_index(target.folder, places, stored_bytes(work, layers))
    trusted = work.recipe.trust_remote_code
    copy_rest(source.folder, target.folder, code=trusted)
    losses = {name: record.loss for name, record in made.items()}
    card = Facts(
        _card_name(source),
        type(work.opened.model).__name__,
        totals=totals.to_json(),
        layers=layers,
        losses=losses,
    )
    config = {**source.config, **({"tie_word_embeddings": False} if work.opened.untied else {})}
    if not trusted:
        config.pop("auto_map", None)  # it names code that was not run, and is not here
    # Experts are stored one by one, even if none is quantized, and plain transformers does not read that.
    ours = bool(layers) or any(isinstance(module, SplitExperts) for module in work.opened.model.modules())
    final = {**config, "quantization_config": quantization_config(layers)} if ours else config
    target.finish(final, _manifest(work, records, made=made, totals=totals, notes=notes), model_card(card))
    return totals, notes


def totals_of(work: Work, layers: Mapping[str, StoredLayer], target: Output) -> Totals:
    """Bits and bytes of the finished shards, counted from the stored tensors."""
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers.values())
    floats = sum(torch.Size(item.shape).numel() for item in _floats(work))
    packed = sum(layer.bytes for layer in layers.values())
    return Totals(
        bits_per_weight=8 * packed / weights if weights else None,
        bits_per_parameter=8 * stored_bytes(work, layers) / (weights + floats),
        bytes=sum((target.folder / shard).stat().st_size for shard in work.schedule.shards),
        source_bytes=work.opened.source.bytes,
    )


def stored_bytes(work: Work, layers: Mapping[str, StoredLayer]) -> int:
    """Bytes of all tensors that are stored."""
    return sum(layer.bytes for layer in layers.values()) + sum(item.bytes for item in _floats(work))


def _floats(work: Work) -> list[FloatItem]:
    items = [item for items in work.schedule.shards.values() for item in items]
    return [item for item in items if isinstance(item, FloatItem)]


def run_notes(work: Work, made: Mapping[str, LayerRecord]) -> tuple[str, ...]:
    """What the user should know of a run: of the source, the schedule, the samples, rewrites, and single layers."""
    rewrites = rewrite_notes(work) if work.recipe.calibration is not None else ()
    read = () if work.samples is None else work.samples.notes
    said = ((layer, note) for layer, record in made.items() for note in record.notes)
    # The manifest has each note beside its layer.
    return (*work.opened.source.notes, *work.schedule.notes, *read, *rewrites, *grouped(said, MANIFEST))


def _card_name(source: Source) -> str:
    """The hub id, or the name of the folder or file: a card shows no local path."""
    path = Path(source.name).expanduser()
    return path.resolve().name if path.exists() else source.name


def _manifest(
    work: Work,
    records: Mapping[str, ShardRecord],
    made: Mapping[str, LayerRecord],
    totals: Totals,
    notes: Sequence[str],
) -> dict[str, Any]:
    source = work.opened.source
    hashes = {name: digest for record in records.values() for name, digest in record.hashes.items()}
    manifest: dict[str, Any] = {
        "fracbit": __version__,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
        },
        "recipe": work.recipe.to_json(),
        "recipe_key": key(work.recipe),
        "run": work.schedule.key,
        "source": {
            "name": source.name,
            "sha256": combined_hash(hashes),
            "tensors": len(source.tensors),
            **({"decoded": source.decoded} if source.decoded else {}),
            **({"code": code} if work.recipe.trust_remote_code and (code := code_in(source.folder)) else {}),
        },
        "texts": [] if work.samples is None else [work.samples.to_json()],
        "seed": work.recipe.seed,
        "totals": totals.to_json(),
        "notes": list(notes),
        "layers": {
            name: {
                "scheme": decision.scheme.to_json() if decision.scheme else None,
                "reason": decision.reason,
                **(made[name].to_json() if name in made else {}),
            }
            for name, decision in work.schedule.decisions.items()
        },
    }
    tweaks = [asdict(record.tweak) for record in records.values() if record.tweak is not None]
    manifest |= {"tweaks": tweaks} if tweaks else {}
    distilled = [asdict(record.distilled) for record in records.values() if record.distilled is not None]
    return manifest | ({"distilled": distilled[0]} if distilled else {})
