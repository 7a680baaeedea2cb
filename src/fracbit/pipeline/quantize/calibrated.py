"""THE LOOP for runs that look at data: block by block, each seeing what the quantized blocks before it give.

    tokens -> embed -> for each block: load, observe, quantize, install, correct, advance, write -> manifest, card, config

What is in memory: one block, its statistics, and the hidden states, which go to a file when they pass `spill_bytes`. A block is
a shard; a resumed run walks the finished blocks from their shards and goes on bit-identically at the first that is missing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fracbit.checkpoint.format import tensor_names
from fracbit.checkpoint.load import check_device, load, load_tokenizer
from fracbit.checkpoint.output import JOURNAL, Output, open_output
from fracbit.checkpoint.source import Source, open_source
from fracbit.data import Samples, parse_source, read_calibration
from fracbit.errors import RecipeError
from fracbit.models.blocks import blocks
from fracbit.models.find import family_of
from fracbit.models.fold import scaling_sites
from fracbit.models.install import materialize
from fracbit.models.skeleton import skeleton
from fracbit.models.spill import storage
from fracbit.models.walk import Hidden, embed
from fracbit.numerics.packed import PackedTensor, decode
from fracbit.pipeline.quantize.block import Work, do_block, facts_of, item_as_stored, read_item, redo_block
from fracbit.pipeline.quantize.manifest import finish
from fracbit.pipeline.quantize.rotate import ROTATIONS, stream_rotation, turned_rest, untie
from fracbit.pipeline.quantize.schedule import Item, Schedule, make_schedule
from fracbit.pipeline.quantize.self_distill import distill_shards
from fracbit.pipeline.quantize.stream import Result, model_config, peak_rss, refuse
from fracbit.quantizers import RoundToNearest, quantizer
from fracbit.records.calibration import Calibration
from fracbit.records.progress import Progress
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import Scheme
from fracbit.transforms import TRANSFORMS

SPILL_BYTES = 4 << 30
CACHED_TOKENS = 1024  # through a block at a time: a tenth less memory than 4096 and no slower
ID_FORMATS = ("u16", "u32", "npy")


def run_calibrated(
    recipe: Recipe,
    output: str | Path,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    spill_bytes: int = SPILL_BYTES,
    device: str | torch.device = "cpu",
) -> Result:
    """Quantize a model as `recipe` says into the folder `output`, with its calibration data.

    Blocks are brought to `device` one at a time, with their statistics; everything else stays in memory. Raises a
    `FracbitError`, as `run`, and `DataError` when the texts do not give what was asked for.
    """
    started = time.perf_counter()
    work = prepare(recipe, Path(output), progress, device)
    samples = read_samples(work)
    schedule = make_schedule(recipe, work.source, work.model, untied=work.untied)
    schedule = by_block(schedule, work, samples)
    with open_output(Path(output), schedule.key, schedule.bytes, overwrite, resume) as target:
        shards = list(schedule.shards.items())
        rest = write_rest(target, *shards[0], work)
        hidden = embed_all(work, rest, samples, target.folder, spill_bytes)
        steps = [1 + sum(item.stored is not None for item in items) for _, items in shards[1:]]
        for number, (shard, items) in enumerate(shards[1:]):
            path, block = blocks(work.model, work.family)[number]
            done = target.record(shard)
            part = replace(work, show=partial(show_part, work.show, sum(steps[:number]), sum(steps)))
            hidden = (do_block if done is None else redo_block)(
                part, target, shard, items, path, block, hidden
            )
            work.show(f"block {number + 1} of {len(steps)}", sum(steps[: number + 1]), sum(steps))
        if work.plan.distill:
            distill_shards(work, target, schedule, samples)
        schedule = as_stored(schedule, target)
        schedule = replace(schedule, notes=(*schedule.notes, *rewrite_notes(work)))
        changed = {"tie_word_embeddings": False} if work.untied else {}
        totals = finish(target, recipe, work.source, schedule, work.model, (samples.to_json(),), changed)
    seconds = time.perf_counter() - started
    return Result(str(output), **totals, seconds=seconds, peak_rss_bytes=peak_rss())


def show_part(show: Progress, before: int, total: int, what: str, done: int, _: int) -> None:
    """Show a step inside a part of the run that begins `before` steps into its `total`."""
    show(what, before + done, total)


def prepare(
    recipe: Recipe, output: Path, progress: Progress | None, device: str | torch.device = "cpu"
) -> Work:
    """Open the source and build its skeleton.

    Raises `RecipeError` when the recipe has no calibration or asks for a rotation that the model does not allow.
    """
    if recipe.calibration is None:
        raise RecipeError(f"quantizer {recipe.quantizer} looks at data; name texts with --calibration FILE")
    plan = recipe.calibration
    if plan.tweak != "none" and plan.samples < 2:
        raise RecipeError(
            "norm tweaking fits on some samples and is judged on others: give at least 2, or tweak none"
        )
    check_device(device)
    source = open_source(recipe.model, recipe.revision, recipe.trust_remote_code)
    refuse(source, output)
    config = model_config(source, recipe.trust_remote_code)
    untied = untie(config, plan.transforms)
    model = skeleton(config, trust_remote_code=recipe.trust_remote_code)
    family = family_of(model)
    return Work(
        recipe,
        plan,
        source,
        model,
        family,
        fill=quantizer(recipe.quantizer, recipe.search, plan.outliers),
        dtype=forward_dtype(plan, source, torch.device(device)),
        stored=stored_dtype(source),
        device=torch.device(device),
        stream=stream_rotation(model, family, plan.transforms, recipe.seed),
        untied=untied,
        show=progress or (lambda what, done, total: None),
    )


def rewrite_notes(work: Work) -> tuple[str, ...]:
    """What rewrites changed besides the quantized weights, and those that found no place."""
    notes = []
    factors = [name for name in work.plan.transforms if name in TRANSFORMS]
    stack = blocks(work.model, work.family)
    if factors and not any(scaling_sites(block, work.family, work.model.config) for _, block in stack):
        notes.append(
            f"{' and '.join(factors)} did nothing: family {work.family.name} has no norm to fold factors into"
        )
    if work.untied:
        head, table = work.family.head, work.family.embeddings[0]
        notes.append(f"{head} is no longer {table}: rotated, they are two matrices, and both are stored")
    if work.stream is not None and work.stored != torch.float32:
        kind = str(work.stored).removeprefix("torch.")
        notes.append(f"rotated tensors that stay float are rounded to {kind}, the type of the source")
    return tuple(notes)


def forward_dtype(plan: Calibration, source: Source, device: torch.device) -> torch.dtype:
    """bfloat16 when asked for, or when the device multiplies it natively and the model is stored in it.

    Rotated weights are no longer bfloat16 numbers: they are kept in float32 until they are quantized.
    """
    if plan.dtype != "auto" or ROTATIONS & set(plan.transforms):
        return torch.bfloat16 if plan.dtype == "bfloat16" else torch.float32
    stored = {info.dtype for info in source.tensors.values()}
    native = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
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
        model=lambda: load(
            work.source.folder, device=work.device, trust_remote_code=work.recipe.trust_remote_code
        ),
        progress=lambda done, total: work.show("writing calibration text", done, total),
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
    where = "" if work.device.type == "cpu" else f" {work.device.type}"  # another device rounds otherwise
    key = hashlib.sha256(f"{schedule.key} {samples.sha256}{where}".encode()).hexdigest()[:16]
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


def write_rest(target: Output, shard: str, items: Sequence[Item], work: Work) -> dict[str, Tensor]:
    """Write what lies outside the blocks: embeddings, head, final norm; round-to-nearest where they have a scheme.

    Returns the float tensors that the blocks' states begin with: as they are stored, or in the float chain, exact.
    """
    record: dict[str, Any] = {"hashes": {}, "layers": {}}
    tensors = {item.name: read_item(item, work.source, record) for item in items}
    if work.stream is not None:
        tensors = turned_rest(work.model, work.family, work.stream, tensors)
    packed = {
        item.name: quantize_rest(item, tensors[item.name], work, record)
        for item in items
        if item.layer is not None and item.stored is not None
    }
    if target.record(shard) is None:
        stored = {name: tensor for name, tensor in tensors.items() if name not in packed}
        for name, tensor in packed.items():
            stored |= tensor_names(name.removesuffix(".weight"), tensor)
        target.write_shard(shard, stored, record)
    if work.plan.chain == "float":
        return tensors
    transposed = {item.name for item in items if item.layer is not None and item.layer.transposed}
    decoded = {name: decode(tensor) for name, tensor in packed.items()}
    return tensors | {name: w.T if name in transposed else w for name, w in decoded.items()}


def quantize_rest(item: Item, tensor: Tensor, work: Work, record: dict[str, Any]) -> PackedTensor:
    """A matrix outside the blocks, rounded to nearest; what came out is noted in the record."""
    assert item.layer is not None
    assert item.stored is not None
    weight = (tensor.T if item.layer.transposed else tensor).float()
    found = RoundToNearest(work.recipe.search)(weight, item.stored.scheme)
    record["layers"][item.layer.name] = facts_of(found, item.stored.kind)
    return found.packed


def embed_all(
    work: Work, outside: Mapping[str, Tensor], samples: Samples, folder: Path, spill_bytes: int
) -> Hidden:
    """The hidden states at the first block, in memory or, when they pass `spill_bytes`, in a file."""
    known = work.model.state_dict()
    materialize(
        work.model,
        {name: tensor for name, tensor in outside.items() if name in known},
        work.dtype,
        partial=True,
    )
    count, length = samples.ids.shape
    width = work.model.config.get_text_config().hidden_size
    size = count * length * width * work.dtype.itemsize
    place = storage((count, length, width), work.dtype, folder / JOURNAL if size > spill_bytes else None)
    return embed(work.model, work.family, samples.ids, batch_of(work.plan, work.device), place)


def batch_of(plan: Calibration, device: torch.device) -> int:
    """Samples through a block at a time, `plan.batch` at most.

    Few enough that a correction is judged by a batch that it was not fitted on; where nothing is fitted to a batch, a CPU
    takes no more than what its caches hold, which saves memory and gives the same.
    """
    if plan.tweak != "none":
        return min(plan.batch, plan.samples // 2)
    if device.type == "cpu":
        return min(plan.batch, max(1, CACHED_TOKENS // plan.length))
    return plan.batch
