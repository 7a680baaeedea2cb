"""One block of a calibrated run: load, observe, quantize, install, tweak, write, advance; or walk it as it was stored.

A block leaves here exactly as it will be read back, so that a run that is resumed sees the same states as one that was not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fracbit.checkpoint.format import StoredLayer, packed_layer, stored_layer, tensor_names
from fracbit.checkpoint.output import Output
from fracbit.checkpoint.source import Source, read_tensor, tensor_hash
from fracbit.errors import WeightError
from fracbit.models.blocks import blocks, groups, weight_of
from fracbit.models.family import Family
from fracbit.models.install import materialize, release, set_weight
from fracbit.models.tweak import Evidence, tweak_block
from fracbit.models.walk import Hidden, advance
from fracbit.numerics.activations import round_through
from fracbit.numerics.packed import decode
from fracbit.numerics.stats import Stats
from fracbit.pipeline.quantize.axis import choose_axes
from fracbit.pipeline.quantize.observe import borrow, observe_all, observe_some
from fracbit.pipeline.quantize.rewrite import rewrite_block
from fracbit.pipeline.quantize.rotate import fed_through, turn_block, turned_inputs
from fracbit.pipeline.quantize.schedule import Item
from fracbit.pipeline.quantize.stream import check_finite
from fracbit.quantizers import Quantizer, nearest_of
from fracbit.quantizers.group import quantize_group
from fracbit.quantizers.quantizer import Quantized
from fracbit.records.calibration import Calibration
from fracbit.records.inputs import Inputs, parse_inputs
from fracbit.records.progress import Progress
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import Scheme

HELD_OUT = 8  # one batch in so many judges the corrections, which do not see it


@dataclass(frozen=True)
class Work:
    """What every block of a run needs: the same for all of them, and nothing that changes.

    `dtype` is that of the forward passes, `stored` the source's own; `stream` has the signs of the residual stream's
    rotation, or is None, and `untied` says that the rotation made two matrices of one table.
    """

    recipe: Recipe
    plan: Calibration
    source: Source
    model: PreTrainedModel
    family: Family
    fill: Quantizer
    dtype: torch.dtype
    stored: torch.dtype
    device: torch.device
    stream: Tensor | None
    untied: bool
    show: Progress


def load_block(
    work: Work, items: Sequence[Item], path: str, block: nn.Module
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Bring the float block to the device, rotated where the recipe asks for it.

    Returns the record to fill, with the hashes of what was read, and the linears whose inputs are rotated at run time.
    """
    record: dict[str, Any] = {"hashes": {}, "layers": {}}
    tensors = {item.name.removeprefix(f"{path}."): read_item(item, work.source, record) for item in items}
    materialize(block, tensors, work.dtype, work.device)
    quantized = [item.layer.name.removeprefix(f"{path}.") for item in items if item.layer and item.stored]
    return record, turn_block(block, work.family, work.stream, work.plan.transforms, quantized)


def do_block(
    work: Work, target: Output, shard: str, items: Sequence[Item], path: str, block: nn.Module, hidden: Hidden
) -> Hidden:
    """Observe, quantize, install, correct, advance, write."""
    record, turned = load_block(work, items, path, block)
    stored = {i.layer.name.removeprefix(f"{path}."): i.stored for i in items if i.layer and i.stored}
    schemes = {name: layer.scheme for name, layer in stored.items()}
    with turned_inputs(block, turned):
        made, floats, rounding = quantize_block(work, path, block, hidden, schemes, record, turned)
        for name, found in made.items():
            facts = facts_of(found, stored[name].kind, rounding.get(name), name in turned)
            record["layers"][f"{path}.{name}"] = facts
        tensors = shard_tensors(
            work, items, path, block, {f"{path}.{name}": found for name, found in made.items()}
        )
        for item in items:
            inside = item.name.removeprefix(f"{path}.")
            if inside.removesuffix(".weight") not in made:
                set_tensor(block, inside, tensors[item.name])  # as it will be read back
        target.write_shard(shard, tensors, record)
        if work.plan.chain == "float":
            assert floats is not None
            release(block)
            return floats
        return leave_block(work, block, hidden, rounding)


def redo_block(
    work: Work, target: Output, shard: str, items: Sequence[Item], path: str, block: nn.Module, hidden: Hidden
) -> Hidden:
    """Walk through a block that an earlier run finished: float, or as it was stored."""
    _, turned = load_block(work, items, path, block)
    rounding: dict[str, Inputs] = {}
    if work.plan.chain == "quantized":
        record, tensors = target.record(shard), load_file(target.folder / shard)
        assert record is not None
        for item in items:
            inside = item.name.removeprefix(f"{path}.")
            if item.layer is None or item.stored is None:
                set_tensor(block, inside, tensors[item.name])
                continue
            stored = item_as_stored(item, record["layers"]).stored
            assert stored is not None
            packed = packed_layer(item.layer.name, stored, tensors)
            name = inside.removesuffix(".weight")
            set_weight(block.get_submodule(name), decode(packed))
            rounding |= {} if stored.inputs is None else {name: stored.inputs}
    with turned_inputs(block, turned):
        return leave_block(work, block, hidden, rounding)


def leave_block(work: Work, block: nn.Module, hidden: Hidden, rounding: Mapping[str, Inputs]) -> Hidden:
    """Advance to the next block, where there is one, and free this one."""
    if hidden.index + 1 < len(blocks(work.model, work.family)):
        with rounded_inputs(block, rounding):
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
    turned: Sequence[str] = (),
) -> tuple[dict[str, Quantized], Hidden | None, dict[str, Inputs]]:
    """Quantize, install and tweak a block whose linears `turned` see rotated inputs.

    Returns what was made, the float block's states where they are needed, and how inputs are rounded.
    """
    order = [tuple(name for name in group if name in schemes) for group in groups(block, work.family)]
    order = [group for group in order if group]
    gram = (
        "gram" in work.fill.needs
        or work.plan.axis != "scheme"
        or work.plan.tweak != "none"
        or bool(work.plan.transforms)
    )
    stats, floats = observe_block(work, path, block, hidden, order, gram)
    rewrite_block(
        work.plan.transforms, block, work.family, work.model.config, schemes, stats, work.stored, turned
    )
    rounding = roundings(work.plan.inputs, order, stats)
    compared = order if work.plan.tweak != "none" else []
    weights = {name: weight_of(block.get_submodule(name)).clone() for group in compared for name in group}
    made: dict[str, Quantized] = {}
    for number, group in enumerate(order):
        if work.plan.sequential and number:
            stats |= observe_some(block, hidden, path, [group], gram)
        own, notes = borrow(stats, [group])
        chosen = choose_axes(
            work.plan.axis, work.family, block, hidden, group, schemes, own[group[0]], work.fill
        )
        for name, found in quantize_names(work.fill, path, block, group, chosen, own[group[0]]).items():
            note = (notes[group[0]],) if group[0] in notes else ()
            made[name] = replace(found, notes=(*found.notes, *note))
            work.show(f"{path}.{name} {found.loss:.2e}", len(made), len(schemes))
            if work.plan.sequential:
                set_weight(block.get_submodule(name), decode(found.packed))
    for name, found in made.items():
        set_weight(block.get_submodule(name), decode(found.packed))
    if work.plan.tweak != "none" and floats is not None:
        evidence = Evidence(hidden, floats.states, *split_batches(hidden), weights, stats)
        depth = hidden.index / len(blocks(work.model, work.family))
        with rounded_inputs(block, rounding):
            tweaked = tweak_block(block, work.family, evidence, work.plan.tweak, depth)
        record["tweak"] = {"block": hidden.index, **tweaked.to_json()}
    return made, floats, rounding


def roundings(
    asked: str | None, order: Sequence[tuple[str, ...]], stats: Mapping[str, Stats]
) -> dict[str, Inputs]:
    """How the inputs of each linear are rounded; a static scale is the largest magnitude that calibration met."""
    if asked is None:
        return {}
    inputs = parse_inputs(asked)
    if inputs.scope == "token":
        return {name: inputs for group in order for name in group}
    missing = [group[0] for group in order if group[0] not in stats]
    if missing:
        raise WeightError(
            f"{missing[0]} saw no calibration token: it has no static scale; use scope token or more samples"
        )
    scales = {name: float(stats[group[0]].absmax.max()) for group in order for name in group}
    return {name: replace(inputs, scale=scale) for name, scale in scales.items()}


def rounded_inputs(block: nn.Module, rounding: Mapping[str, Inputs]) -> AbstractContextManager[None]:
    """A context in which the named linears are fed rounded inputs."""
    return fed_through(
        block, {name: partial(round_through, inputs=inputs) for name, inputs in rounding.items()}
    )


def observe_block(
    work: Work, path: str, block: nn.Module, hidden: Hidden, order: Sequence[tuple[str, ...]], gram: bool
) -> tuple[dict[str, Stats], Hidden | None]:
    """Statistics of all groups; the float block's states only where something reads them."""
    if work.plan.tweak == "none" and work.plan.chain == "quantized":
        return observe_some(block, hidden, path, order, gram), None
    return observe_all(block, hidden, path, order, gram, torch.empty_like(hidden.states))


def quantize_names(
    fill: Quantizer,
    path: str,
    block: nn.Module,
    group: Sequence[str],
    schemes: Mapping[str, Scheme],
    stats: Stats | None,
) -> dict[str, Quantized]:
    """The linears of one group, quantized. Raises `WeightError` naming the group."""
    weights = [weight_of(block.get_submodule(name)) for name in group]
    method = nearest_of(fill, search=True) if stats is None else fill
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
            tensors |= tensor_names(item.layer.name, made[item.layer.name].packed.to("cpu"))
        else:
            tensors[item.name] = stored_float(item, work, block, item.name.removeprefix(f"{path}."))
    return tensors


def stored_float(item: Item, work: Work, block: nn.Module, inside: str) -> Tensor:
    """A float tensor to write: the source's own bytes, unless a correction changed it."""
    original = item.origin.read(read_tensor(work.source, item.origin.name))
    held: Tensor = block.state_dict()[inside].cpu()
    if torch.equal(held, original.to(held.dtype)):
        return original
    return held.to(original.dtype)


def facts_of(
    found: Quantized, kind: Any, inputs: Inputs | None = None, rotated: bool = False
) -> dict[str, Any]:
    """What the record of a shard says of a layer."""
    stored: StoredLayer = stored_layer(found.packed, kind)
    facts = {"loss": found.loss, "bits_per_weight": stored.bits_per_weight, "notes": list(found.notes)}
    facts |= {"scheme": stored.scheme.to_json(), "outliers": stored.outliers}
    facts |= {"outlier_dtype": stored.outlier_dtype} if stored.outliers else {}
    facts |= {"rotated": True} if rotated else {}
    return facts if inputs is None else facts | {"inputs": inputs.to_json()}


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


def read_item(item: Item, source: Source, record: dict[str, Any]) -> Tensor:
    """A tensor from the source, its hash noted in the record."""
    whole = read_tensor(source, item.origin.name)
    record["hashes"][item.origin.name] = tensor_hash(whole)
    tensor = item.origin.read(whole)
    check_finite(item.name, tensor)
    return tensor


def item_as_stored(item: Item, layers: Mapping[str, Any]) -> Item:
    """A scheduled tensor with the scheme that it really got, by the record of its shard."""
    facts = layers.get(item.layer.name, {}) if item.layer else {}
    if item.stored is None or "scheme" not in facts:
        return item
    scheme, inputs = Scheme.from_json(facts["scheme"]), facts.get("inputs")
    rounding = None if inputs is None else Inputs.from_json(inputs)
    stored = replace(
        item.stored,
        scheme=scheme,
        outliers=facts.get("outliers", 0),
        outlier_dtype=facts.get("outlier_dtype", "bf16"),
        inputs=rounding,
        rotated=facts.get("rotated", False),
    )
    return replace(item, stored=stored, bytes=stored.bytes)
