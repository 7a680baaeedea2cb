"""THE LOOP for runs that look at data: block by block, each seeing what the quantized blocks before it give.

    tokens -> embed -> for each block: load, observe, quantize, install, correct, advance, write -> manifest, card, config

What is in memory: one block, its statistics, and the hidden states, which go to a file when they pass `spill_bytes`. A block is
a shard; a resumed run walks the finished blocks from their shards and goes on bit-identically at the first that is missing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from fracbit.checkpoint.format import StoredLayer, packed_layer, stored_layer, tensor_names
from fracbit.checkpoint.output import JOURNAL, Output, open_output
from fracbit.checkpoint.source import Source, open_source, read_tensor, tensor_hash
from fracbit.data import read_sources, sample
from fracbit.data.tokens import Calibration as Samples
from fracbit.errors import RecipeError, WeightError
from fracbit.models.blocks import blocks, groups, weight_of
from fracbit.models.family import Family
from fracbit.models.find import family_of
from fracbit.models.install import materialize, release, set_weight
from fracbit.models.skeleton import skeleton
from fracbit.models.spill import storage
from fracbit.models.tweak import Evidence, tweak_block
from fracbit.models.walk import Hidden, advance, embed
from fracbit.numerics.packed import decode
from fracbit.numerics.stats import Stats
from fracbit.pipeline.axis import choose_axes
from fracbit.pipeline.finish import finish
from fracbit.pipeline.observe import borrow, observe_all, observe_some
from fracbit.pipeline.run import Progress, Result, model_config, peak_rss, refuse
from fracbit.pipeline.schedule import Item, Schedule, make_schedule
from fracbit.quantizers import Quantizer, RoundToNearest, quantizer
from fracbit.quantizers.group import quantize_group
from fracbit.quantizers.quantizer import Quantized
from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import Scheme

SPILL_BYTES = 4 << 30
HELD_OUT = 8  # one sample in so many judges the corrections, which do not see it


@dataclass(frozen=True)
class Work:
    """What every block of a run needs: the same for all of them, and nothing that changes."""

    recipe: Recipe
    plan: Calibration
    source: Source
    model: PreTrainedModel
    family: Family
    fill: Quantizer
    dtype: torch.dtype
    show: Progress


def run_calibrated(
    recipe: Recipe,
    output: str | Path,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    spill_bytes: int = SPILL_BYTES,
) -> Result:
    """Quantize a model as `recipe` says into the folder `output`, with its calibration data.

    Raises a `FracbitError`, as `run`, and `DataError` when the texts do not give what was asked for.
    """
    started = time.perf_counter()
    work = prepare(recipe, Path(output), progress)
    samples = read_samples(work)
    schedule = by_block(make_schedule(recipe, work.source, work.model), work, samples)
    with open_output(Path(output), schedule.key, schedule.bytes, overwrite, resume) as target:
        shards = list(schedule.shards.items())
        write_rest(target, *shards[0], work)
        hidden = embed_all(work, shards[0][1], samples, target.folder, spill_bytes)
        for number, (shard, items) in enumerate(shards[1:]):
            path, block = blocks(work.model, work.family)[number]
            done = target.record(shard)
            hidden = (do_block if done is None else redo_block)(work, target, shard, items, path, block, hidden)
            work.show(f"block {number + 1} of {len(shards) - 1}", number + 1, len(shards) - 1)
        schedule = as_stored(schedule, target)
        totals = finish(target, recipe, work.source, schedule, work.model, (samples.to_json(),))
    seconds = time.perf_counter() - started
    return Result(str(output), **totals, seconds=seconds, peak_rss_bytes=peak_rss())


def prepare(recipe: Recipe, output: Path, progress: Progress | None) -> Work:
    """Open the source and build its skeleton. Raises `RecipeError` when the recipe has no calibration."""
    if recipe.calibration is None:
        raise RecipeError(f"quantizer {recipe.quantizer} looks at data; name texts with --calibration FILE")
    source = open_source(recipe.model, recipe.revision, recipe.trust_remote_code)
    refuse(source, output)
    config = model_config(source, recipe.trust_remote_code)
    model = skeleton(config, trust_remote_code=recipe.trust_remote_code)
    fill = quantizer(recipe.quantizer, recipe.search)
    dtype = forward_dtype(recipe.calibration.dtype, source)
    show = progress or (lambda what, done, total: None)
    return Work(recipe, recipe.calibration, source, model, family_of(model), fill, dtype, show)


def forward_dtype(asked: str, source: Source) -> torch.dtype:
    """bfloat16 when asked for, or when the machine multiplies it natively and the model is stored in it."""
    if asked != "auto":
        return torch.float32 if asked == "float32" else torch.bfloat16
    stored = {info.dtype for info in source.tensors.values()}
    native = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if stored == {"BF16"} and native else torch.float32


def read_samples(work: Work) -> Samples:
    """The calibration samples. Raises `DataError`."""
    vocabulary = work.model.config.get_text_config().vocab_size
    tokenizer = None
    if any(not text.partition("?")[0].endswith((".u16", ".u32", ".npy")) for text in work.plan.texts):
        tokenizer = AutoTokenizer.from_pretrained(work.source.folder)
    parts = read_sources(work.plan.texts, tokenizer, vocabulary)
    return sample(parts, samples=work.plan.samples, length=work.plan.length, seed=work.recipe.seed)


def by_block(schedule: Schedule, work: Work, samples: Samples) -> Schedule:
    """The same tensors in other shards: what lies outside the blocks first, then one shard per block."""
    prefixes = [f"{path}." for path, _ in blocks(work.model, work.family)]
    parts: list[list[Item]] = [[] for _ in range(len(prefixes) + 1)]
    for items in schedule.shards.values():
        for item in items:
            place = next((n for n, prefix in enumerate(prefixes, 1) if item.name.startswith(prefix)), 0)
            parts[place].append(item)
    names = [f"model-{n:05}-of-{len(parts):05}.safetensors" for n in range(1, len(parts) + 1)]
    key = hashlib.sha256(f"{schedule.key} {samples.sha256}".encode()).hexdigest()[:16]
    return replace(schedule, key=key, shards={name: tuple(part) for name, part in zip(names, parts, strict=True)})


def as_stored(schedule: Schedule, target: Output) -> Schedule:
    """The schedule with the schemes that layers really got, where the run had a choice."""
    shards, decisions = {}, dict(schedule.decisions)
    for shard, items in schedule.shards.items():
        record = target.record(shard)
        assert record is not None
        shards[shard] = tuple(_as_stored(item, record["layers"]) for item in items)
        for name, facts in record["layers"].items():
            if "scheme" in facts:
                decisions[name] = replace(decisions[name], scheme=Scheme.from_json(facts["scheme"]))
    return replace(schedule, shards=shards, decisions=decisions)


def _as_stored(item: Item, layers: Mapping[str, Any]) -> Item:
    facts = layers.get(item.layer.name, {}) if item.layer else {}
    if item.stored is None or "scheme" not in facts:
        return item
    stored = replace(item.stored, scheme=Scheme.from_json(facts["scheme"]), outliers=facts.get("outliers", 0))
    return replace(item, stored=stored, bytes=stored.bytes)


def write_rest(target: Output, shard: str, items: Sequence[Item], work: Work) -> None:
    """The shard of what lies outside the blocks: embeddings, head, final norm; round-to-nearest where they have a scheme."""
    if target.record(shard) is not None:
        return
    tensors: dict[str, Tensor] = {}
    record: dict[str, Any] = {"hashes": {}, "layers": {}}
    for item in items:
        tensor = _read(item, work.source, record)
        if item.layer is None or item.stored is None:
            tensors[item.name] = tensor
            continue
        weight = (tensor.T if item.layer.transposed else tensor).float()
        found = RoundToNearest(work.recipe.search)(weight, item.stored.scheme)
        tensors |= tensor_names(item.layer.name, found.packed)
        record["layers"][item.layer.name] = facts_of(found, item.stored.kind)
    target.write_shard(shard, tensors, record)


def embed_all(work: Work, items: Sequence[Item], samples: Samples, folder: Path, spill_bytes: int) -> Hidden:
    """The hidden states at the first block, in memory or, when they pass `spill_bytes`, in a file."""
    outside = {item.name: item.origin.read(read_tensor(work.source, item.origin.name)) for item in items}
    known = work.model.state_dict()
    outside = {name: tensor for name, tensor in outside.items() if name in known}
    materialize(work.model, outside, work.dtype, partial=True)
    count, length = samples.ids.shape
    width = work.model.config.get_text_config().hidden_size
    size = count * length * width * work.dtype.itemsize
    place = storage((count, length, width), work.dtype, folder / JOURNAL if size > spill_bytes else None)
    return embed(work.model, work.family, samples.ids, work.plan.batch, place)


def load_block(work: Work, items: Sequence[Item], path: str, block: nn.Module) -> dict[str, Any]:
    """Bring the float block into memory; returns the record to fill, with the hashes of what was read."""
    record: dict[str, Any] = {"hashes": {}, "layers": {}}
    tensors = {item.name.removeprefix(f"{path}."): _read(item, work.source, record) for item in items}
    materialize(block, tensors, work.dtype)
    return record


def do_block(
    work: Work, target: Output, shard: str, items: Sequence[Item], path: str, block: nn.Module, hidden: Hidden
) -> Hidden:
    """Observe, quantize, install, correct, advance, write."""
    record = load_block(work, items, path, block)
    stored = {i.layer.name.removeprefix(f"{path}."): i.stored for i in items if i.layer and i.stored}
    schemes = {name: layer.scheme for name, layer in stored.items()}
    made, floats = quantize_block(work, path, block, hidden, schemes, record)
    record["layers"] = {f"{path}.{name}": facts_of(found, stored[name].kind) for name, found in made.items()}
    tensors = shard_tensors(work, items, path, block, {f"{path}.{name}": found for name, found in made.items()})
    for item in items:
        if item.name.removeprefix(f"{path}.").removesuffix(".weight") not in made:
            set_tensor(block, item.name.removeprefix(f"{path}."), tensors[item.name])  # as it will be read back
    target.write_shard(shard, tensors, record)
    if work.plan.chain == "float":
        assert floats is not None
        release(block)
        return floats
    hidden = advance(block, hidden, hidden.states)
    release(block)
    return hidden


def redo_block(
    work: Work, target: Output, shard: str, items: Sequence[Item], path: str, block: nn.Module, hidden: Hidden
) -> Hidden:
    """Walk through a block that an earlier run finished: float, or as it was stored."""
    load_block(work, items, path, block)
    if work.plan.chain == "quantized":
        record, tensors = target.record(shard), load_file(target.folder / shard)
        assert record is not None
        for item in items:
            inside = item.name.removeprefix(f"{path}.")
            if item.layer is None or item.stored is None:
                set_tensor(block, inside, tensors[item.name])
                continue
            stored = _as_stored(item, record["layers"]).stored
            assert stored is not None
            packed = packed_layer(item.layer.name, stored, tensors)
            set_weight(block.get_submodule(inside.removesuffix(".weight")), decode(packed))
    hidden = advance(block, hidden, hidden.states)
    release(block)
    return hidden


def quantize_block(
    work: Work,
    path: str,
    block: nn.Module,
    hidden: Hidden,
    schemes: Mapping[str, Scheme],
    record: dict[str, Any],
) -> tuple[dict[str, Quantized], Hidden | None]:
    """Quantize, install and tweak a block; returns what was made and, where they are needed, the float block's states."""
    order = [tuple(name for name in group if name in schemes) for group in groups(block, work.family)]
    order = [group for group in order if group]
    gram = "gram" in work.fill.needs or work.plan.axis != "scheme" or work.plan.tweak != "none"
    stats, floats = observe_block(work, path, block, hidden, order, gram)
    weights = {name: weight_of(block.get_submodule(name)).clone() for group in order for name in group}
    made: dict[str, Quantized] = {}
    for number, group in enumerate(order):
        if work.plan.sequential and number:
            stats |= observe_some(block, hidden, path, [group], gram)
        own, notes = borrow(stats, [group])
        chosen = choose_axes(work.plan.axis, work.family, block, hidden, group, schemes, own[group[0]], work.fill)
        for name, found in quantize_names(work.fill, path, block, group, chosen, own[group[0]]).items():
            note = (notes[group[0]],) if group[0] in notes else ()
            made[name] = replace(found, notes=(*found.notes, *note))
            if work.plan.sequential:
                set_weight(block.get_submodule(name), decode(found.packed))
    for name, found in made.items():
        set_weight(block.get_submodule(name), decode(found.packed))
    if work.plan.tweak != "none" and floats is not None:
        evidence = Evidence(hidden, floats.states, *split_batches(hidden), weights, stats)
        depth = hidden.index / len(blocks(work.model, work.family))
        record["tweak"] = tweak_block(block, work.family, evidence, work.plan.tweak, depth).to_json()
    return made, floats


def observe_block(
    work: Work, path: str, block: nn.Module, hidden: Hidden, order: Sequence[tuple[str, ...]], gram: bool
) -> tuple[dict[str, Stats], Hidden | None]:
    """Statistics of all groups; the float block's states only where something reads them."""
    if work.plan.tweak == "none" and work.plan.chain == "quantized":
        return observe_some(block, hidden, path, order, gram), None
    return observe_all(block, hidden, path, order, gram, torch.empty_like(hidden.states))


def quantize_names(
    fill: Quantizer, path: str, block: nn.Module, group: Sequence[str], schemes: Mapping[str, Scheme], stats: Stats | None
) -> dict[str, Quantized]:
    """The linears of one group, quantized. Raises `WeightError` naming the group."""
    weights = [weight_of(block.get_submodule(name)) for name in group]
    method = RoundToNearest(search=True) if stats is None else fill
    try:
        found = quantize_group(method, weights, [schemes[name] for name in group], stats)
    except WeightError as error:
        raise WeightError(f"layers {', '.join(f'{path}.{name}' for name in group)}: {error}") from error
    return dict(zip(group, found, strict=True))


def shard_tensors(
    work: Work, items: Sequence[Item], path: str, block: nn.Module, made: Mapping[str, Quantized]
) -> dict[str, Tensor]:
    """What a block's shard holds: packed linears, and everything else as it stands in the block, in the source's type."""
    tensors: dict[str, Tensor] = {}
    for item in items:
        if item.layer is not None and item.layer.name in made:
            tensors |= tensor_names(item.layer.name, made[item.layer.name].packed)
        else:
            tensors[item.name] = stored_float(item, work, block, item.name.removeprefix(f"{path}."))
    return tensors


def stored_float(item: Item, work: Work, block: nn.Module, inside: str) -> Tensor:
    """A float tensor to write: the source's own bytes, unless a correction changed it."""
    original = item.origin.read(read_tensor(work.source, item.origin.name))
    held = block.state_dict()[inside]
    if torch.equal(held, original.to(held.dtype)):
        return original
    return held.to(original.dtype)


def facts_of(found: Quantized, kind: Any) -> dict[str, Any]:
    """What the record of a shard says of a layer."""
    stored: StoredLayer = stored_layer(found.packed, kind)
    facts = {"loss": found.loss, "bits_per_weight": stored.bits_per_weight, "notes": list(found.notes)}
    return facts | {"scheme": stored.scheme.to_json(), "outliers": stored.outliers}


def split_batches(hidden: Hidden) -> tuple[list[int], list[int]]:
    """Batches to fit corrections on and batches to judge them by; the last ones are held out."""
    count = len(hidden.batches)
    held = max(1, count // HELD_OUT) if count > 1 else 0
    everything = list(range(count))
    return everything[: count - held], everything[count - held :] or everything


def set_tensor(block: nn.Module, name: str, tensor: Tensor) -> None:
    """Write a float tensor of a block, in place."""
    held = block.state_dict()[name]
    held.copy_(tensor)


def _read(item: Item, source: Source, record: dict[str, Any]) -> Tensor:
    whole = read_tensor(source, item.origin.name)
    record["hashes"][item.origin.name] = tensor_hash(whole)
    return item.origin.read(whole)


