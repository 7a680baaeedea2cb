"""What a run will write: every tensor of the model, its scheme, and the shard that it goes to, before anything is read.

The schedule depends only on the source's headers and the recipe. So shards hold the same tensors each time a run is
started, and a resumed result is bit-identical to an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

import torch
from transformers import PreTrainedModel

from fracbit.checkpoint.format import StoredLayer
from fracbit.checkpoint.opened import Opened
from fracbit.checkpoint.output import SHARD_BYTES
from fracbit.checkpoint.shards import cut_shards
from fracbit.checkpoint.source import Source, fingerprint, read_tensor
from fracbit.errors import RecipeError, SourceError, near_matches
from fracbit.models.blocks import blocks
from fracbit.models.family import Family
from fracbit.models.origin import Origin, Origins
from fracbit.models.skeleton import Layer
from fracbit.numerics.datatypes import check_datatype
from fracbit.records.recipe import Recipe, key
from fracbit.records.run import OVERRIDE
from fracbit.records.scheme import Scheme
from fracbit.records.version import __version__


@dataclass(frozen=True)
class Decision:
    """The scheme of a layer and why it has it; None keeps it float."""

    scheme: Scheme | None
    reason: str


@dataclass(frozen=True)
class FloatItem:
    """A tensor that is written as it is: its name in the model, where it lies in the source, its shape and its bytes.

    `unused` tensors belong to no module (GPT-2's causal masks) and are copied.
    """

    name: str
    origin: Origin
    shape: tuple[int, ...]
    bytes: int
    unused: bool = False


@dataclass(frozen=True)
class LayerItem:
    """The weight of a layer that is quantized: its name in the model, its place in the source, how it is to be stored."""

    name: str
    origin: Origin
    layer: Layer
    stored: StoredLayer

    @property
    def bytes(self) -> int:
        """Bytes that it takes when it is stored as scheduled."""
        return self.stored.bytes


Item: TypeAlias = FloatItem | LayerItem


@dataclass(frozen=True)
class Schedule:
    """All shards of a run. `key` names recipe, source and program version; `decisions` has every quantizable layer."""

    key: str
    shards: dict[str, tuple[Item, ...]]
    decisions: dict[str, Decision]
    notes: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors that will be written."""
        return sum(item.bytes for items in self.shards.values() for item in items)


def make_schedule(recipe: Recipe, opened: Opened, shard_bytes: int = SHARD_BYTES) -> Schedule:
    """Schedule `recipe` over the tensors of an `opened` checkpoint.

    Raises `SourceError` when tensors are missing, `RecipeError` when an override matches nothing.
    """
    source, model, layers = opened.source, opened.model, opened.layers
    if recipe.towers is not None:
        layers = {**layers, **_towers(opened)}
    decisions, notes = decide(recipe, layers)
    places = with_both(opened.origins, opened.family) if opened.untied else opened.origins
    if places.missing:
        raise SourceError(
            f"{source.name} holds a {' or '.join(source.config.get('architectures') or ['model of no name'])}, which lacks "
            f"{len(places.missing)} tensors of a {type(model).__name__}, such as {places.missing[0]}"
        )
    state = model.state_dict()
    items: list[Item] = [
        _item(name, place, state[name].shape, source=source, layers=layers, decisions=decisions)
        for name, place in _owned(places.tensors, model).items()
    ]
    items += [
        FloatItem(name, Origin((name,)), source.tensors[name].shape, source.tensors[name].bytes, unused=True)
        for name in places.unused
    ]
    items = _without_tied(items, source, model)
    towers = sum(isinstance(item, LayerItem) and item.layer.kind == "tower" for item in items)
    if towers:
        notes = (
            *notes,
            f"{towers} linears of towers for images and sound were rounded to nearest: texts do not pass through them, so "
            "neither calibration nor a budget reached them",
        )
    notes = (*notes, *([opened.family.note] if opened.family.note else []))
    if places.unused:
        notes = (
            *notes,
            f"{len(places.unused)} tensors belong to no module and were copied: {places.unused[0]}, ...",
        )
    return Schedule(_key(recipe, source, shard_bytes), _cut(items, shard_bytes), decisions, notes)


def by_block(schedule: Schedule, opened: Opened, seen: str) -> Schedule:
    """The same tensors in other shards: first the tensors outside the blocks, then one shard for each block.

    `seen`: everything else that decides the bytes of a calibrated run (samples, device); it becomes part of the key.
    """
    prefixes = [f"{path}." for path, _ in blocks(opened.model, opened.family)]
    parts: list[list[Item]] = [[] for _ in range(len(prefixes) + 1)]
    for items in schedule.shards.values():
        for item in items:
            place = next((n for n, prefix in enumerate(prefixes, 1) if item.name.startswith(prefix)), 0)
            parts[place].append(item)
    names = [f"model-{n:05}-of-{len(parts):05}.safetensors" for n in range(1, len(parts) + 1)]
    key = hashlib.sha256(f"{schedule.key} {seen}".encode()).hexdigest()[:16]
    shards = {name: tuple(part) for name, part in zip(names, parts, strict=True)}
    return replace(schedule, key=key, shards=shards)


def with_both(places: Origins, family: Family) -> Origins:
    """The places of a model with an untied head: if the source holds one tensor for head and table, both read it."""
    head, table = f"{family.head}.weight", f"{family.embeddings[0]}.weight"
    found = dict(places.tensors)
    for name, other in ((head, table), (table, head)):
        if name not in found and other in found:
            found[name] = found[other]
    return Origins(found, places.unused, tuple(name for name in places.missing if name not in found))


def decide(recipe: Recipe, layers: Mapping[str, Layer]) -> tuple[dict[str, Decision], tuple[str, ...]]:
    """The scheme of every quantizable layer, and notes. Later overrides win."""
    matched = {override.layers: False for override in recipe.overrides}
    decisions: dict[str, Decision] = {}
    notes: list[str] = []
    for name, layer in layers.items():
        decision = _by_kind(recipe, layer)
        for override in recipe.overrides:
            if fnmatchcase(name, override.layers):
                matched[override.layers] = True
                scheme = None if override.keep else override.scheme or recipe.scheme
                decision = Decision(scheme, f"{OVERRIDE} {override.layers!r}")
        if decision.scheme is not None:
            check_datatype(decision.scheme)
        decisions[name] = decision
    for pattern, used in matched.items():
        if not used:
            raise RecipeError(f"override {pattern!r} matches no layer; {near_matches(pattern, layers)}")
    return _tie(decisions, layers, notes), tuple(notes)


def _by_kind(recipe: Recipe, layer: Layer) -> Decision:
    if layer.kind == "linear":
        return Decision(recipe.scheme, "scheme of the recipe")
    scheme = {"embedding": recipe.embeddings, "head": recipe.head, "tower": recipe.towers}[layer.kind]
    return Decision(scheme, f"{layer.kind} {'of the recipe' if scheme else 'stays float unless asked for'}")


def _towers(opened: Opened) -> dict[str, Layer]:
    """The linears of towers. Raises `RecipeError` for a model without any."""
    if not opened.towers:
        raise RecipeError(
            f"{opened.source.name} is a {type(opened.model).__name__}, which has no tower for images or sound with repeated "
            "blocks of linears; leave towers out"
        )
    return opened.towers


def _tie(
    decisions: dict[str, Decision], layers: Mapping[str, Layer], notes: list[str]
) -> dict[str, Decision]:
    """A head that is tied to its embedding table has the same scheme."""
    for name, layer in layers.items():
        if layer.tied is None:
            continue
        table, head = decisions[layer.tied].scheme, decisions[name].scheme
        if table is not None and head is not None and table != head:
            raise RecipeError(
                f"{name} and {layer.tied} are one tensor: give both the same scheme, or a scheme to only one"
            )
        both = Decision(table or head, f"tied: {name} and {layer.tied} are one tensor")
        if both.scheme is not None:
            notes.append(both.reason)
            decisions |= {name: both, layer.tied: both}
    return decisions


def _item(
    name: str,
    place: Origin,
    shape: torch.Size,
    *,
    source: Source,
    layers: Mapping[str, Layer],
    decisions: Mapping[str, Decision],
) -> Item:
    layer = layers.get(name.removesuffix(".weight"))
    decision = decisions.get(layer.name) if layer and name.endswith(".weight") else None
    if layer is None or decision is None or decision.scheme is None:
        info = source.tensors[place.names[0]]
        each = info.bytes // max(1, torch.Size(info.shape).numel())  # bytes
        return FloatItem(name, place, tuple(shape), each * shape.numel())
    kind: Literal["embedding", "linear"] = (
        "embedding" if layer.kind == "embedding" or layer.tied else "linear"
    )
    return LayerItem(name, place, layer, StoredLayer(decision.scheme, (layer.out, layer.width), kind=kind))


def _owned(tensors: Mapping[str, Origin], model: PreTrainedModel) -> dict[str, Origin]:
    """A tied tensor that the source holds only under its second name (a head without a table) gets its owner's name."""
    owners = {name: owner for name, owner in model.all_tied_weights_keys.items() if owner not in tensors}
    return {owners.get(name, name): place for name, place in tensors.items()}


def _without_tied(items: list[Item], source: Source, model: PreTrainedModel) -> list[Item]:
    """Drop the second copy of a tied tensor: it is written once, under its owner's name.

    Raises `SourceError` when the copies differ: transformers would then not tie them, and one scheme cannot serve both.
    """
    by_name = {item.name: item for item in items}
    pairs = [
        (head, table)
        for head, table in model.all_tied_weights_keys.items()
        if {head, table} <= by_name.keys()
    ]
    for head, table in pairs:
        first, second = (
            item.origin.read([read_tensor(source, name) for name in item.origin.names])
            for item in (by_name[head], by_name[table])
        )
        if not torch.equal(first, second):
            raise SourceError(
                f"config.json ties {head} to {table}, but {source.name} holds different tensors for them; "
                "set tie_word_embeddings to false there"
            )
    return [item for item in items if item.name not in dict(pairs)]


def _cut(items: Iterable[Item], limit: int) -> dict[str, tuple[Item, ...]]:
    return {name: tuple(part) for name, part in cut_shards(items, lambda item: item.bytes, limit).items()}


def _key(recipe: Recipe, source: Source, shard_bytes: int) -> str:
    parts = [key(recipe), *fingerprint(source), shard_bytes, __version__]
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
