"""One block of a calibrated run: load, observe, rewrite, quantize, install, correct, write, advance.

A block that an earlier run finished is only walked. The next states come from the block exactly as it will be read
back, so a resumed run sees the same states as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from fracbit.checkpoint.format import packed_layer, tensor_names
from fracbit.checkpoint.output import Shards
from fracbit.errors import WeightError
from fracbit.models.blocks import blocks, borrowed, groups, weight_of
from fracbit.models.correction import Corrected, Evidence, correction
from fracbit.models.install import materialize, release, set_tensor, set_weight
from fracbit.models.walk import Hidden, advance
from fracbit.numerics.activations import round_through
from fracbit.numerics.packed import decode
from fracbit.numerics.stats import Stats, TreeSum
from fracbit.pipeline.quantize.axis import choose_axes
from fracbit.pipeline.quantize.layer import quantize_layers
from fracbit.pipeline.quantize.observe import (
    FEW_TOKENS,
    Observer,
    borrow,
    is_expert,
    observe_all,
    observe_some,
)
from fracbit.pipeline.quantize.ranks import cost
from fracbit.pipeline.quantize.reader import read_items
from fracbit.pipeline.quantize.record import layer_record, stored_as
from fracbit.pipeline.quantize.rewrite import rewrite_block
from fracbit.pipeline.quantize.rotate import fed_through, rotates, turn_block, turned_inputs
from fracbit.pipeline.quantize.schedule import Item, LayerItem
from fracbit.pipeline.quantize.shared import borrowed_floats, install_borrowed
from fracbit.pipeline.quantize.work import Block, Entrance, Groups, Seen, Work, reads_gram, walk_key
from fracbit.quantizers import Quantized
from fracbit.records.inputs import Inputs, parse_inputs
from fracbit.records.run import ShardRecord, TweakRecord

UNWEIGHED = "counts tokens alike: which ones reach an expert is not known before it is quantized"
HELD_OUT = 8  # one batch in 8 is held out, to evaluate the corrections


@dataclass(frozen=True, eq=False)
class Filled:
    """A quantized block: its linears by name, the output states of the float block (if needed), how inputs are rounded,
    and what the correction did.
    """

    made: Mapping[str, Quantized]
    floats: Hidden | None
    rounding: Mapping[str, Inputs]
    tweak: TweakRecord | None


def do_block(
    work: Work,
    target: Shards,
    shard: str,
    *,
    items: Sequence[Item],
    path: str,
    module: nn.Module,
    entrance: Entrance,
) -> Entrance:
    """Load, observe, quantize, install, correct, write; returns the states that enter the next block."""
    hashes, block = load_block(work, items, path=path, module=module, entrance=entrance)
    with turned_inputs(module, block.turned):
        filled = quantize_block(work, block, partial(install_borrowed, work, target, path, module))
        tensors = shard_tensors(work, items, block, filled.made)
        for item in items:
            inside = item.name.removeprefix(f"{path}.")
            if inside.removesuffix(".weight") not in filled.made:
                set_tensor(module, inside, tensors[item.name])  # as it will be read back
        if work.ranks.writes(entrance.hidden.index):
            target.write_shard(shard, tensors, shard_record(items, block, filled, hashes))
        if work.calibration.chain == "float":
            assert filled.floats is not None
            release(module)
            return Entrance(filled.floats)
        hidden = leave_block(work, module, entrance.hidden, filled.rounding)
        return Entrance(hidden, None if entrance.exact is None else filled.floats)


def redo_block(
    work: Work,
    target: Shards,
    shard: str,
    *,
    items: Sequence[Item],
    path: str,
    module: nn.Module,
    entrance: Entrance,
) -> Entrance:
    """Walk through a block that an earlier run finished: float in the float chain, else as it was stored."""
    _, block = load_block(work, items, path=path, module=module, entrance=entrance)
    exact, rounding = entrance.exact, dict[str, Inputs]()
    if exact is not None:
        with turned_inputs(module, block.turned):
            exact = advance(module, exact, exact.states)
    if work.calibration.chain == "quantized":
        install_borrowed(work, target, path, module)
        record, tensors = target.record(shard), target.tensors(shard)
        assert record is not None
        for item in items:
            inside = item.name.removeprefix(f"{path}.")
            if isinstance(item, LayerItem):
                stored = stored_as(item, record.layers[item.layer.name])
                name = inside.removesuffix(".weight")
                set_weight(module.get_submodule(name), decode(packed_layer(item.layer.name, stored, tensors)))
                rounding |= {} if stored.inputs is None else {name: stored.inputs}
            else:
                set_tensor(module, inside, tensors[item.name])
    with turned_inputs(module, block.turned):
        return Entrance(leave_block(work, module, entrance.hidden, rounding), exact)


def load_block(
    work: Work, items: Sequence[Item], path: str, module: nn.Module, entrance: Entrance
) -> tuple[dict[str, str], Block]:
    """Load the float block to the device, rotated if the recipe says so. Also returns the hashes of its tensors."""
    tensors, hashes = read_items(work.reader, items)
    inside = {name.removeprefix(f"{path}."): tensor for name, tensor in tensors.items()}
    inside |= borrowed_floats(work, path)
    if work.memory is not None:  # other runs read these tensors too, and this one writes into its block
        inside = {name: tensor.clone() for name, tensor in inside.items()}
    materialize(module, inside, work.dtype, work.device)
    family, transforms = work.opened.family, work.calibration.transforms
    schemes = {
        item.layer.name.removeprefix(f"{path}."): item.stored.scheme
        for item in items
        if isinstance(item, LayerItem)
    }
    turned = turn_block(module, family, signs=work.signs, transforms=transforms, quantized=schemes)
    order = [tuple(name for name in group if name in schemes) for group in groups(module, family)]
    # Linears of one input have weights of tokens, and so statistics, of their own.
    weighed = {name for name in schemes if f"{path}.{name}" in work.token_weights}
    order = [part for group in order for part in ([(n,) for n in group] if weighed & {*group} else [group])]
    return hashes, Block(
        path,
        module,
        hidden=entrance.hidden,
        exact=entrance.exact,
        schemes=schemes,
        order=[group for group in order if group],
        turned=turned,
    )


def leave_block(work: Work, module: nn.Module, hidden: Hidden, rounding: Mapping[str, Inputs]) -> Hidden:
    """Advance to the next block, if there is one, and free this one."""
    if hidden.index + 1 < len(blocks(work.opened.model, work.opened.family)):
        with rounded_inputs(module, rounding):
            hidden = advance(module, hidden, hidden.states)
    release(module)
    return hidden


def quantize_block(work: Work, block: Block, borrow: Callable[[], None]) -> Filled:
    """Observe, rewrite, quantize, install and correct a block; `borrow` installs what other blocks stored for it."""
    calibration, module = work.calibration, block.module
    # Observe the inputs of its linears.
    stats, floats = observe_block(work, block)
    stats |= shared_in(work, block)
    borrow()
    # Rewrite: fold the factors of the transforms, and choose how inputs are rounded.
    rewrite_block(work, block, stats)
    rounding = roundings(calibration.inputs, block.order, stats)
    # Quantize its linears, and install what will be read back.
    compared = block.order if calibration.tweak != "none" else ()
    weights = {name: weight_of(module.get_submodule(name)).clone() for group in compared for name in group}
    made = fill_block(work, block, stats)
    for name, found in made.items():
        set_weight(module.get_submodule(name), decode(found.packed))
    # Correct it, on inputs rounded as they will be.
    tweak = None
    if made and calibration.tweak != "none" and floats is not None:
        train, judge = split_batches(block.hidden)
        evidence = Evidence(
            block.hidden,
            floats.states,
            train=train,
            judge=judge,
            weights=weights,
            packed={name: found.packed for name, found in made.items()},
            stats=stats,
            depth=block.hidden.index / len(blocks(work.opened.model, work.opened.family)),
            seed=work.recipe.seed,
            kind=work.source_dtype,
        )
        with rounded_inputs(module, rounding):
            corrected = correct(work, block, evidence)
        tweak = TweakRecord(
            block.hidden.index, before=corrected.before, after=corrected.after, kept=corrected.kept
        )
        for name, packed in corrected.packed.items():
            made[name] = replace(made[name], packed=packed)
            set_weight(module.get_submodule(name), decode(packed))
    return Filled(made, floats, rounding, tweak)


def fill_block(work: Work, block: Block, stats: dict[str, Stats]) -> dict[str, Quantized]:
    """Quantize the groups of a block in order of use, each linear along the axis that the recipe chooses.

    `stats`: by the first linear of each group. A sequential run observes a group after the groups before it are
    quantized. Ranks take some of the groups each; all of them get what was made.
    """
    sequential, ranks = work.calibration.sequential, work.ranks
    owners, made = owners_of(work, block), dict[str, Quantized]()
    for number, group in enumerate(block.order):
        if sequential and number:
            stats |= observe_group(work, block, group) | shared_in(work, block)
        if owners[group[0]] == ranks.number:
            made |= fill_group(work, block, group, stats=stats, done=len(made))
        if sequential:
            made = ranks.unite(made, block.schemes)
            for name in group:
                set_weight(block.module.get_submodule(name), decode(made[name].packed))
    return ranks.unite(made, [name for group in block.order for name in group])


def fill_group(
    work: Work, block: Block, group: tuple[str, ...], *, stats: dict[str, Stats], done: int
) -> dict[str, Quantized]:
    """Quantize the linears of a group, by name; `done` linears of the block were quantized before."""
    own, notes = borrow(stats, [group])
    seen = own[group[0]]
    weights = {f"{block.path}.{name}": weight_of(block.module.get_submodule(name)) for name in group}
    chosen = choose_axes(work, block, group, seen)
    schemes = {f"{block.path}.{name}": chosen[name] for name in group}
    said = [notes[group[0]]] if group[0] in notes else []
    if work.token_weights and seen is not None and is_expert(group[0]):
        said.append(UNWEIGHED)
    made: dict[str, Quantized] = {}
    for full, found in quantize_layers(work.method, weights, schemes, seen).items():
        name = full.removeprefix(f"{block.path}.")
        made[name] = replace(found, notes=(*found.notes, *said))
        work.show(f"{name} {found.loss:.2e}", done + len(made), len(block.schemes))
    return made


def owners_of(work: Work, block: Block) -> dict[str, int]:
    """The rank that quantizes each group, by its first linear."""
    weights = {name: weight_of(block.module.get_submodule(name)) for name in block.schemes}  # [out, in] each
    return work.ranks.owners({group[0]: cost([weights[name] for name in group]) for group in block.order})


def shared_in(work: Work, block: Block) -> dict[str, Stats]:
    """Statistics of the block's linears that others use too, by the first of each group."""
    firsts = (group[0] for group in block.order)
    return {name: work.shared[full] for name in firsts if (full := f"{block.path}.{name}") in work.shared}


def correct(work: Work, block: Block, evidence: Evidence) -> Corrected:
    """Correct a quantized block as the recipe says."""

    def show(what: str, done: int, total: int) -> None:
        work.show(f"{what}, {done} of {total}", len(block.schemes), len(block.schemes))

    # A norm of another block is that block's to move.
    others, family = borrowed(work.opened.model, block.path), work.opened.family
    own = tuple(norm for norm in family.norms if f"{norm.name}.weight" not in others)
    return correction(work.calibration.tweak)(block.module, replace(family, norms=own), evidence, show)


def roundings(asked: str | None, order: Groups, stats: Mapping[str, Stats]) -> dict[str, Inputs]:
    """How the inputs of each linear are rounded; a static scale is the largest magnitude in calibration."""
    if asked is None:
        return {}
    inputs = parse_inputs(asked)
    if inputs.scope != "tensor":
        return {name: inputs for group in order for name in group}
    missing = [group[0] for group in order if group[0] not in stats]
    if missing:
        raise WeightError(
            f"{missing[0]} saw no calibration token: it has no static scale; use scope token or more samples"
        )
    scales = {name: float(stats[group[0]].absmax.max()) for group in order for name in group}
    return {name: replace(inputs, scale=scale) for name, scale in scales.items()}


def rounded_inputs(module: nn.Module, rounding: Mapping[str, Inputs]) -> AbstractContextManager[None]:
    """A context in which the named linears are fed rounded inputs."""
    return fed_through(
        module, {name: partial(round_through, inputs=inputs) for name, inputs in rounding.items()}
    )


def observe_block(work: Work, block: Block) -> tuple[dict[str, Stats], Hidden | None]:
    """Statistics of all groups, by the first linear of each, and the float block's output states if they are needed.

    In the float chain they do not depend on quantized blocks, so runs that share a memory observe a block once.
    """
    module, pieces, observer = block.module, work.pieces, observers(work, block)
    if block.exact is not None:
        seen = observe_some(module, block.hidden, block.order, pieces=pieces, observer=observer)
        return total(work, block, seen), advance(module, block.exact, block.exact.states)
    if work.calibration.tweak == "none" and work.calibration.chain == "quantized":
        return total(
            work, block, observe_some(module, block.hidden, block.order, pieces=pieces, observer=observer)
        ), None

    def observe() -> Seen:
        place = torch.empty_like(block.hidden.states)  # [samples, tokens, width]
        seen, exits = observe_all(
            module, block.hidden, block.order, pieces=pieces, observer=observer, out=place
        )
        return total(work, block, seen), exits

    shared = (
        work.memory is not None
        and work.calibration.chain == "float"
        and not rotates(work.calibration.transforms)
    )
    if not shared:
        return observe()
    assert work.memory is not None
    key = (*walk_key(work), block.hidden.index, tuple(block.order), reads_gram(work), work.calibration.weigh)
    if key not in work.memory.observed:
        work.memory.observed[key] = observe()
    stats, floats = work.memory.observed[key]
    return dict(stats), floats  # rewrites change the dictionary


def observe_group(work: Work, block: Block, group: tuple[str, ...]) -> dict[str, Stats]:
    """Statistics of one group, as the block is now."""
    seen = observe_some(
        block.module, block.hidden, [group], pieces=work.pieces, observer=observers(work, block)
    )
    return total(work, block, seen)


def total(work: Work, block: Block, seen: TreeSum) -> dict[str, Stats]:
    """What all ranks have seen of a block's inputs."""

    def needed(tokens: Mapping[str, int]) -> bool:
        """Factors of transforms are found by every rank, and experts with few tokens read the sums of all experts."""
        few = [name for name, count in tokens.items() if is_expert(name) and count < FEW_TOKENS]
        unseen = [group[0] for group in block.order if is_expert(group[0]) and group[0] not in tokens]
        return bool(work.calibration.transforms or few or unseen)

    return work.ranks.total(seen, owners_of(work, block), needed, device=work.device)


def observers(work: Work, block: Block) -> Callable[[int], Observer]:
    """Makes what sums up a run's needs of a block's inputs, from a sample on."""
    weights = {
        name: work.token_weights[f"{block.path}.{name}"]
        for group in block.order
        for name in group
        if f"{block.path}.{name}" in work.token_weights
    }
    return partial(Observer, block.path, reads_gram(work), block.hidden.states.shape[1], weights)


def shard_tensors(
    work: Work, items: Sequence[Item], block: Block, made: Mapping[str, Quantized]
) -> dict[str, Tensor]:
    """The tensors of a block's shard: packed linears, and all others as they are in the block, in the source's type."""
    tensors: dict[str, Tensor] = {}
    for item in items:
        inside = item.name.removeprefix(f"{block.path}.")
        if isinstance(item, LayerItem):
            packed = made[inside.removesuffix(".weight")].packed
            tensors |= tensor_names(item.layer.name, packed.to("cpu"))
        else:
            tensors[item.name] = stored_float(work, item, block.module, inside)
    return tensors


def shard_record(
    items: Sequence[Item], block: Block, filled: Filled, hashes: Mapping[str, str]
) -> ShardRecord:
    """The record of a quantized block."""
    layers = {}
    for item in items:
        if isinstance(item, LayerItem):
            name = item.layer.name.removeprefix(f"{block.path}.")
            layers[item.layer.name] = layer_record(
                filled.made[name], item.stored.kind, filled.rounding.get(name), name in block.turned
            )
    return ShardRecord(hashes, layers, filled.tweak)


def stored_float(work: Work, item: Item, module: nn.Module, inside: str) -> Tensor:
    """A float tensor to write: the source's own bytes, unless a rewrite or a correction changed it."""
    original = work.reader.read(item)[0]
    held: Tensor = module.state_dict()[inside].cpu()
    if torch.equal(held, original.to(held.dtype)):
        return original
    return held.to(original.dtype)


def split_batches(hidden: Hidden) -> tuple[list[int], list[int]]:
    """Batches to fit corrections on, and batches to evaluate them on; the last ones are held out."""
    count = len(hidden.batches)
    held = max(1, count // HELD_OUT) if count > 1 else 0
    everything = list(range(count))
    return everything[: count - held], everything[count - held :] or everything
