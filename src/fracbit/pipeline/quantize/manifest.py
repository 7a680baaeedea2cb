"""The end of a run: index, tokenizer files, manifest, model card, and config.json last. No time of day is written anywhere,
so that the same recipe gives the same folder, byte for byte.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from transformers import PreTrainedModel

from fracbit.checkpoint.card import Facts, model_card
from fracbit.checkpoint.format import StoredLayer, quantization_config
from fracbit.checkpoint.output import MANIFEST, Output, copy_file, write_json, write_text
from fracbit.checkpoint.source import INDEX, PICKLES, Source, combined_hash
from fracbit.models.experts import SplitExperts
from fracbit.pipeline.quantize.schedule import Schedule
from fracbit.records.recipe import Recipe, key
from fracbit.records.version import __version__

NOTES = 24  # lines on single layers that a result shows
NOT_COPIED = (
    "*.safetensors",
    INDEX,
    "config.json",
    "README.md",
    ".*",
    "*.index.json",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    *PICKLES,
)


def finish(
    target: Output,
    recipe: Recipe,
    source: Source,
    schedule: Schedule,
    model: PreTrainedModel,
    texts: Sequence[Mapping[str, object]] = (),
    changed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write everything but the shards; returns the totals that `Result` shows.

    `changed`: keys of config.json that the run set.
    """
    records = {shard: target.record(shard) or {} for shard in schedule.shards}
    made = {name: facts for record in records.values() for name, facts in record["layers"].items()}
    layers = stored_layers(schedule)
    totals = _totals(target, source, schedule, layers)
    totals["notes"] = (*totals["notes"], *layer_notes(made))
    if len(schedule.shards) > 1:
        write_json(target.folder / INDEX, _index(target, schedule))
    copy_rest(source, target)
    hashes = {name: digest for record in records.values() for name, digest in record["hashes"].items()}
    manifest = _manifest(recipe, source, schedule, layers, made, hashes, totals, texts)
    tweaks = [record["tweak"] for record in records.values() if "tweak" in record]
    manifest |= {"tweaks": tweaks} if tweaks else {}
    distilled = [record["distilled"] for record in records.values() if "distilled" in record]
    manifest |= {"distilled": distilled[0]} if distilled else {}
    write_json(target.folder / MANIFEST, manifest)
    facts = Facts(
        _card_name(source), type(model).__name__, totals, layers, {n: f["loss"] for n, f in made.items()}
    )
    write_text(target.folder / "README.md", model_card(facts))
    config = {**source.config, **(changed or {})}
    # Experts are stored one by one, which transformers itself does not read, even where none is quantized.
    ours = bool(layers) or any(isinstance(module, SplitExperts) for module in model.modules())
    target.finish({**config, "quantization_config": quantization_config(layers)} if ours else config)
    return totals


def layer_notes(made: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """What single layers have to say, one line for all that say the same; the manifest has every one beside its layer."""
    named: dict[str, list[str]] = {}
    for layer, facts in made.items():
        for note in facts.get("notes", ()):
            named.setdefault(note, []).append(layer)
    lines = [f"{note} ({some_of(layers)})" for note, layers in named.items()]
    rest = [f"{len(lines) - NOTES} more notes on layers: see {MANIFEST}"] if len(lines) > NOTES else []
    return (*lines[:NOTES], *rest)


def some_of(names: Sequence[str], limit: int = 4) -> str:
    """The first names of many, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _card_name(source: Source) -> str:
    """The hub id, or the folder's own name: a card does not tell where somebody's disk keeps things."""
    return source.folder.resolve().name if Path(source.name).expanduser().is_dir() else source.name


def stored_layers(schedule: Schedule) -> dict[str, StoredLayer]:
    """The quantized layers of a schedule, as config.json lists them."""
    items = [item for items in schedule.shards.values() for item in items]
    return {item.name.removesuffix(".weight"): item.stored for item in items if item.stored is not None}


def copy_rest(source: Source, target: Output) -> None:
    """Copy every file beside the weights untouched: tokenizer, chat template, generation config, license."""
    for path in sorted(source.folder.iterdir()):
        if path.is_file() and not any(path.match(pattern) for pattern in NOT_COPIED):
            copy_file(path, target.folder / path.name)


def _totals(
    target: Output, source: Source, schedule: Schedule, layers: Mapping[str, StoredLayer]
) -> dict[str, Any]:
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers.values())
    items = [item for items in schedule.shards.values() for item in items]
    parameters = weights + sum(
        torch.Size(source.tensors[item.origin.name].shape).numel() for item in items if item.stored is None
    )
    size = sum((target.folder / shard).stat().st_size for shard in schedule.shards)
    return {
        "bits_per_weight": 8 * sum(layer.bytes for layer in layers.values()) / weights if weights else None,
        "bits_per_parameter": 8 * schedule.bytes / parameters,
        "bytes": size,
        "source_bytes": source.bytes,
        "notes": schedule.notes,
    }


def _index(target: Output, schedule: Schedule) -> dict[str, Any]:
    from safetensors import safe_open

    weight_map: dict[str, str] = {}
    for shard in schedule.shards:
        with safe_open(target.folder / shard, framework="pt") as file:
            weight_map |= dict.fromkeys(file.keys(), shard)
    return {"metadata": {"total_size": schedule.bytes}, "weight_map": dict(sorted(weight_map.items()))}


def _manifest(
    recipe: Recipe,
    source: Source,
    schedule: Schedule,
    layers: Mapping[str, StoredLayer],
    made: Mapping[str, Mapping[str, Any]],
    hashes: Mapping[str, str],
    totals: Mapping[str, Any],
    texts: Sequence[Mapping[str, object]],
) -> dict[str, Any]:
    return {
        "fracbit": __version__,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
        },
        "recipe": recipe.to_json(),
        "recipe_key": key(recipe),
        "source": {"name": source.name, "sha256": combined_hash(hashes), "tensors": len(source.tensors)},
        "texts": list(texts),
        "seed": recipe.seed,
        "totals": {name: value for name, value in totals.items() if name != "notes"},
        "notes": list(totals["notes"]),
        "layers": {
            name: {
                "scheme": decision.scheme.to_json() if decision.scheme else None,
                "reason": decision.reason,
                **made.get(name, {}),
            }
            for name, decision in schedule.decisions.items()
        },
    }
