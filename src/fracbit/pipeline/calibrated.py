"""THE LOOP for runs that look at data: block by block, each seeing what the quantized blocks before it give.

    tokens -> embed -> for each block: load, observe, quantize, install, correct, advance, write -> manifest, card, config

What is in memory: one block, its statistics, and the hidden states, which go to a file when they pass `spill_bytes`. A block is
a shard; a resumed run walks the finished blocks from their shards and goes on bit-identically at the first that is missing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fracbit.checkpoint.format import tensor_names
from fracbit.checkpoint.load import load, load_tokenizer
from fracbit.checkpoint.output import JOURNAL, Output, open_output
from fracbit.checkpoint.source import Source, open_source, read_tensor
from fracbit.data import Calibration as Samples
from fracbit.data import parse_source, read_calibration
from fracbit.errors import RecipeError
from fracbit.models.blocks import blocks
from fracbit.models.find import family_of
from fracbit.models.install import materialize
from fracbit.models.skeleton import skeleton
from fracbit.models.spill import storage
from fracbit.models.walk import Hidden, embed
from fracbit.pipeline.block import Work, do_block, facts_of, item_as_stored, read_item, redo_block
from fracbit.pipeline.distill import distill_shards
from fracbit.pipeline.finish import finish
from fracbit.pipeline.run import Progress, Result, model_config, peak_rss, refuse
from fracbit.pipeline.schedule import Item, Schedule, make_schedule
from fracbit.quantizers import RoundToNearest, quantizer
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import Scheme

SPILL_BYTES = 4 << 30
ID_FORMATS = ("u16", "u32", "npy")


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
            hidden = (do_block if done is None else redo_block)(
                work, target, shard, items, path, block, hidden
            )
            work.show(f"block {number + 1} of {len(shards) - 1}", number + 1, len(shards) - 1)
        if work.plan.distill:
            distill_shards(work, target, schedule, samples)
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
    return Work(
        recipe, recipe.calibration, source, model, family_of(model), fill, dtype, stored_dtype(source), show
    )


def forward_dtype(asked: str, source: Source) -> torch.dtype:
    """bfloat16 when asked for, or when the machine multiplies it natively and the model is stored in it."""
    if asked != "auto":
        return torch.float32 if asked == "float32" else torch.bfloat16
    stored = {info.dtype for info in source.tensors.values()}
    native = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if stored == {"BF16"} and native else torch.float32


def stored_dtype(source: Source) -> torch.dtype:
    """The coarsest float type that the source stores tensors in."""
    stored = {info.dtype for info in source.tensors.values()}
    return torch.bfloat16 if "BF16" in stored else torch.float16 if "F16" in stored else torch.float32


def read_samples(work: Work) -> Samples:
    """The calibration samples. Raises `DataError`."""
    config = work.model.config.get_text_config()
    only_ids = all(parse_source(text).format in ID_FORMATS for text in work.plan.texts)
    return read_calibration(
        work.plan.texts,
        None if only_ids else load_tokenizer(work.source.folder),
        config.vocab_size,
        samples=work.plan.samples,
        length=work.plan.length,
        seed=work.recipe.seed,
        model=lambda: load(work.source.folder, trust_remote_code=work.recipe.trust_remote_code),
    )


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
    return replace(
        schedule, key=key, shards={name: tuple(part) for name, part in zip(names, parts, strict=True)}
    )


def as_stored(schedule: Schedule, target: Output) -> Schedule:
    """The schedule with the schemes that layers really got, where the run had a choice."""
    shards, decisions = {}, dict(schedule.decisions)
    for shard, items in schedule.shards.items():
        record = target.record(shard)
        assert record is not None
        shards[shard] = tuple(item_as_stored(item, record["layers"]) for item in items)
        for name, facts in record["layers"].items():
            if "scheme" in facts:
                decisions[name] = replace(decisions[name], scheme=Scheme.from_json(facts["scheme"]))
    return replace(schedule, shards=shards, decisions=decisions)


def write_rest(target: Output, shard: str, items: Sequence[Item], work: Work) -> None:
    """The shard of what lies outside the blocks: embeddings, head, final norm; round-to-nearest where they have a scheme."""
    if target.record(shard) is not None:
        return
    tensors: dict[str, Tensor] = {}
    record: dict[str, Any] = {"hashes": {}, "layers": {}}
    for item in items:
        tensor = read_item(item, work.source, record)
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
