"""Refinement of one block of a foreign checkpoint: codes and scales of its linears move towards the float weights."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from fracbit.checkpoint.repacked import movable_layer
from fracbit.errors import FormatError
from fracbit.models.blocks import groups, weight_of
from fracbit.models.install import release
from fracbit.numerics.stats import Stats
from fracbit.pipeline.improve.alongside import Place, Walk
from fracbit.pipeline.quantize.observe import Observer, borrow, observe_some
from fracbit.pipeline.quantize.sample_pieces import pieces_in
from fracbit.quantizers import refined
from fracbit.records.run import RefineRecord, ShardRecord


def refine_step(walk: Walk, place: Place) -> tuple[dict[str, Tensor], ShardRecord]:
    """See `BlockStep`. A layer that cannot be written back stays as it is, with a note."""
    module = place.module
    layers = walk.twins.layers
    order = [
        tuple(name for name in group if f"{place.path}.{name}" in layers)
        for group in groups(module, walk.family)
    ]
    order = [group for group in order if group]
    # The weights that the codes should stand for, and the inputs that they are given.
    walk.load_float(place)
    weights = {
        name: weight_of(module.get_submodule(name)).float().clone() for group in order for name in group
    }
    release(module)
    walk.load_coded(place)
    hidden = place.hidden
    observer = partial(Observer, place.path, True, hidden.states.shape[1], {})
    total = observe_some(module, hidden, order, pieces=pieces_in(hidden), observer=observer)
    seen, said = borrow(total.whole(), order)
    release(module)
    # Layer by layer.
    changed: dict[str, Tensor] = {}
    records: dict[str, RefineRecord] = {}
    notes = {f"{place.path}.{name}": note for name, note in said.items()}
    for group in order:
        for name in group:
            full = f"{place.path}.{name}"
            try:
                found, record = _refined(walk, layers[full], weights[name], seen[group[0]])
            except FormatError as error:
                notes[full] = f"stayed as it was: {error}"
                continue
            changed |= found
            records[full] = record
            walk.show(name, len(records), sum(map(len, order)))
    return changed, ShardRecord(refined=records, notes=notes)


def _refined(
    walk: Walk, weight_name: str, weight: Tensor, stats: Stats | None
) -> tuple[dict[str, Tensor], RefineRecord]:
    """The new tensors of a layer whose decoded tensor is called `weight_name`, towards `weight` [out, in]; none: it stays."""
    if stats is None or stats.gram is None:
        raise FormatError("it saw no calibration token")
    layer = movable_layer(walk.twins.coded.source, weight_name)
    order = layer.order.to(weight.device)  # [in]
    gram = stats.gram[order][:, order]  # [in, in]
    old, new = refined(weight[:, order] / layer.factor, layer.packed.to(weight.device), gram)
    moved = {} if new is old else layer.stored(new.packed.to("cpu"))
    return moved, RefineRecord(old.loss, new.loss)
