"""Blocks that share weights (Zamba's attention): stored with the block that owns them, calibrated on the inputs of every use.

The statistics of a shared linear are those of the float model, summed over all blocks that use it, in a walk before the run. A
block that borrows tensors is observed with them as floats, and goes on with them as their owner stored them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from fracbit.checkpoint.format import packed_layer
from fracbit.checkpoint.output import Shards
from fracbit.models.backward import Stack
from fracbit.models.blocks import blocks, borrowed, groups
from fracbit.models.install import set_tensor, set_weight
from fracbit.models.walk import Hidden, observe
from fracbit.numerics.packed import decode
from fracbit.numerics.stats import Stats
from fracbit.pipeline.quantize.observe import Observer
from fracbit.pipeline.quantize.record import stored_as
from fracbit.pipeline.quantize.schedule import Item, LayerItem
from fracbit.pipeline.quantize.work import Work, reads_gram


def borrowed_items(work: Work, path: str) -> dict[str, Item]:
    """The items of other blocks whose tensors the block at `path` uses too, by their names inside it."""
    names = borrowed(work.opened.model, path)
    if not names:
        return {}
    items = {item.name: item for items in work.schedule.shards.values() for item in items}
    return {inside: items[owner] for inside, owner in names.items()}


def borrowed_floats(work: Work, path: str) -> dict[str, Tensor]:
    """Their tensors in the source."""
    return {inside: work.reader.read(item)[0] for inside, item in borrowed_items(work, path).items()}


def install_borrowed(work: Work, target: Shards, path: str, module: nn.Module) -> None:
    """Give a block what it borrows as it was stored, if that is there yet."""
    shards = {item.name: shard for shard, items in work.schedule.shards.items() for item in items}
    read: dict[str, dict[str, Tensor]] = {}
    for inside, item in borrowed_items(work, path).items():
        shard = shards[item.name]
        record = target.record(shard)
        if record is None:
            continue
        if shard not in read:
            read[shard] = target.tensors(shard)
        if isinstance(item, LayerItem):
            stored = stored_as(item, record.layers[item.layer.name])
            weight = decode(packed_layer(item.layer.name, stored, read[shard]))  # [out, in]
            set_weight(module.get_submodule(inside.removesuffix(".weight")), weight)
        else:
            set_tensor(module, inside, read[shard][item.name])


def shared_stats(work: Work, stack: Stack, hidden: Hidden) -> Mapping[str, Stats]:
    """Statistics of the linears that several blocks use, by the full name of the first of each group; summed over all uses.

    `stack`: the float model; `hidden`: its states before the first block, which are overwritten.
    """
    owners = [borrowed(work.opened.model, path) for path in stack.paths]
    shared = {owner.removesuffix(".weight") for each in owners for owner in each.values()}
    observer = Observer("the blocks", reads_gram(work), hidden.states.shape[1])
    for number, path in enumerate(stack.paths):
        with stack.loaded(number) as block:
            uses: dict[str, str] = {}  # of a linear inside this block: whose it is
            for name in (group[0] for group in groups(block, stack.family)):
                full = owners[number].get(f"{name}.weight", f"{path}.{name}.weight").removesuffix(".weight")
                if full in shared:
                    uses[name] = full
            hidden = observe(block, hidden, uses, partial(_seen, observer, uses), out=hidden.states)
        work.show("blocks that share weights", number + 1, len(stack.paths))
    return observer.stats


def _seen(observer: Observer, uses: Mapping[str, str], name: str, x: torch.Tensor) -> None:
    observer(uses[name], x)  # x [tokens, in]


def shares(work: Work) -> bool:
    """Whether blocks of the model use tensors of others."""
    model = work.opened.model
    return any(borrowed(model, path) for path, _ in blocks(model, work.opened.family))
