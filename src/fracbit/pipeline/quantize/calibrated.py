"""The loop of calibrated runs: block after block, each calibrated on the outputs of the blocks before it.

    embed (-> weights of tokens) -> for each block: load, observe, rewrite, quantize, install, correct, write, advance

Memory holds one block, its statistics and the hidden states; states larger than `spill_bytes` go to a file. Each block
is one shard. A resumed run walks the finished blocks from their shards and continues at the first missing one, with the
same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fracbit.checkpoint.format import tensor_names
from fracbit.checkpoint.output import Shards
from fracbit.models.blocks import blocks
from fracbit.models.fold import scaling_sites
from fracbit.models.install import materialize
from fracbit.models.spill import storage
from fracbit.models.walk import Hidden, embed, left_out
from fracbit.numerics.packed import PackedTensor, decode
from fracbit.pipeline.quantize.block import do_block, redo_block
from fracbit.pipeline.quantize.reader import read_items
from fracbit.pipeline.quantize.record import layer_record
from fracbit.pipeline.quantize.rotate import turned_rest
from fracbit.pipeline.quantize.schedule import Item, LayerItem
from fracbit.pipeline.quantize.self_distill import distill_shards
from fracbit.pipeline.quantize.shared import shared_stats, shares
from fracbit.pipeline.quantize.stream import quantize_item
from fracbit.pipeline.quantize.token_weights import stack_of, token_weights
from fracbit.pipeline.quantize.work import Entrance, Work, batch_of, follows_model
from fracbit.records.progress import QUANTIZING, Progress, phase
from fracbit.records.run import LayerRecord, ShardRecord
from fracbit.transforms import TRANSFORMS

SPILL_BYTES = 4 << 30


def calibrate_shards(work: Work, target: Shards, spill_bytes: int = SPILL_BYTES) -> tuple[str, ...]:
    """Fill every shard that `target` lacks: first the tensors outside the blocks, then one shard for each block.

    Returns notes on what the texts did not go through. Raises `WeightError` (layer named), `OutputError`.
    """
    (first, outside), *shards = work.schedule.shards.items()
    floats, stored = write_rest(target, first, outside, work)
    follows, exact = follows_model(work.calibration), work.calibration.chain == "float"
    if work.calibration.weigh == "loss":
        weights = token_weights(work, target, lambda: embed_source(work, target, spill_bytes))
        work = replace(work, token_weights=weights)
    if shares(work):
        work = replace(
            work, shared=shared_stats(work, stack_of(work), embed_source(work, target, spill_bytes))
        )
    entrance = Entrance(
        exact=embed_all(work, floats, target, spill_bytes) if follows else None,
        hidden=embed_all(work, floats if exact else stored, target, spill_bytes),
    )
    notes = text_notes(work, entrance.hidden)
    steps = [1 + sum(isinstance(item, LayerItem) for item in items) for _, items in shards]
    show = phase(work.show, QUANTIZING)
    for number, (shard, items) in enumerate(shards):
        path, block = blocks(work.opened.model, work.opened.family)[number]
        do = do_block if target.record(shard) is None else redo_block
        said = phase(show, f"block {number + 1} of {len(steps)}")
        part = replace(work, show=partial(show_part, said, sum(steps[:number]), sum(steps)))
        entrance = do(part, target, shard, items=items, path=path, module=block, entrance=entrance)
        said("done", sum(steps[: number + 1]), sum(steps))
    if work.calibration.distill:
        distill_shards(work, target)
    return notes


def text_notes(work: Work, hidden: Hidden) -> tuple[str, ...]:
    """Notes: which part of the model the texts went through, and which blocks it leaves out for them."""
    model, part, notes = type(work.opened.model).__name__, hidden.way.part, []
    if part:
        notes.append(f"{model} does not run on text alone: the texts went through its {part}")
    missed = left_out(hidden)
    if missed:
        shown = ", ".join(map(str, missed))
        notes.append(
            f"{model} leaves {len(missed)} blocks out for text ({shown}): they were rounded to nearest"
        )
    return tuple(notes)


def show_part(show: Progress, before: int, total: int, what: str, done: int, _: int) -> None:
    """Show a step inside a part of the run that begins `before` steps into its `total`."""
    show(what, before + done, total)


def write_rest(
    target: Shards, shard: str, items: Sequence[Item], work: Work
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Write the tensors outside the blocks: embeddings, head, final norm; rounded to nearest where they have a scheme.

    Returns them as floats, for the first hidden states: exact, and as they are stored.
    """
    tensors, hashes = read_items(work.reader, items)
    if work.signs is not None:
        tensors = turned_rest(work.opened.model, work.opened.family, work.signs, tensors)
    packed: dict[str, PackedTensor] = {}
    layers: dict[str, LayerRecord] = {}
    for item in items:
        if isinstance(item, LayerItem):
            found = quantize_item(work.method, item, tensors[item.name])
            packed[item.name] = found.packed
            layers[item.layer.name] = layer_record(found, item.stored.kind)
    if work.ranks.leads and target.record(shard) is None:
        stored = {name: tensor for name, tensor in tensors.items() if name not in packed}
        for name, tensor in packed.items():
            stored |= tensor_names(name.removesuffix(".weight"), tensor)
        target.write_shard(shard, stored, ShardRecord(hashes, layers))
    transposed = {item.name for item in items if isinstance(item, LayerItem) and item.layer.transposed}
    decoded = {name: decode(tensor) for name, tensor in packed.items()}  # [out, in] each
    return tensors, tensors | {name: w.T if name in transposed else w for name, w in decoded.items()}


def embed_all(work: Work, outside: Mapping[str, Tensor], target: Shards, spill_bytes: int) -> Hidden:
    """The hidden states of this rank's samples at the first block."""
    assert work.samples is not None
    pieces = work.pieces
    return embed_ids(
        work, work.samples.ids[pieces.start : pieces.stop], outside, target, spill_bytes=spill_bytes
    )


def embed_ids(
    work: Work, ids: Tensor, outside: Mapping[str, Tensor], target: Shards, *, spill_bytes: int
) -> Hidden:
    """The states of `ids` at the first block, in memory or, when they pass `spill_bytes`, in a file of the journal."""
    model = work.opened.model
    known = model.state_dict()
    materialize(
        model,
        {name: tensor for name, tensor in outside.items() if name in known},
        work.dtype,
        partial=True,
    )

    def room(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        spills = torch.Size(shape).numel() * dtype.itemsize > spill_bytes
        return storage(shape, dtype, target.journal if spills else None)

    batch = batch_of(work.calibration, ids.shape[1], work.device)
    return embed(model, work.opened.family, ids, batch, room=room)


def embed_source(work: Work, target: Shards, spill_bytes: int = SPILL_BYTES) -> Hidden:
    """The states of all samples in the model as it is in the source, neither rotated nor quantized."""
    assert work.samples is not None
    outside = read_items(work.reader, next(iter(work.schedule.shards.values())))[0]
    return embed_ids(work, work.samples.ids, outside, target, spill_bytes=spill_bytes)


def rewrite_notes(work: Work) -> tuple[str, ...]:
    """Notes: what rewrites changed besides the quantized weights, and which rewrites had no effect."""
    opened, notes = work.opened, []
    factors = [name for name in work.calibration.transforms if TRANSFORMS[name].factors is not None]
    stack = blocks(opened.model, opened.family)
    if factors and not any(scaling_sites(block, opened.family, opened.model.config) for _, block in stack):
        notes.append(
            f"{' and '.join(factors)} did nothing: family {opened.family.name} has no norm to fold factors into"
        )
    if opened.untied:
        head, table = opened.family.head, opened.family.embeddings[0]
        notes.append(f"{head} is no longer tied to {table}: rotation makes two matrices, and both are stored")
    if work.signs is not None and work.source_dtype != torch.float32:
        kind = str(work.source_dtype).removeprefix("torch.")
        notes.append(f"rotated tensors that stay float are rounded to {kind}, the type of the source")
    return tuple(notes)
