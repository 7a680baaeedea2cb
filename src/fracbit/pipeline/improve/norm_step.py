"""Norm tweaking of one block of a foreign checkpoint: its norms are moved until it gives what the float block gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fracbit.errors import FormatError
from fracbit.models.blocks import blocks, find, groups, weight_of
from fracbit.models.correction import Correction, Evidence, norm_parameters
from fracbit.models.install import release
from fracbit.pipeline.improve.alongside import Place, Walk
from fracbit.pipeline.improve.twins import Twins
from fracbit.pipeline.quantize.block import split_batches
from fracbit.pipeline.quantize.observe import Observer, observe_all
from fracbit.pipeline.quantize.sample_pieces import pieces_in
from fracbit.records.run import ShardRecord, TweakRecord


@dataclass(frozen=True, eq=False)
class NormStep:
    """Moves norms by a correction; `kind`: the least precise type that norms are stored in."""

    correction: Correction
    kind: torch.dtype

    def __call__(self, walk: Walk, place: Place) -> tuple[dict[str, Tensor], ShardRecord]:
        """See `BlockStep`. What is judged is what is stored."""
        module, family, hidden = place.module, walk.family, place.hidden
        # What the float block gives from these states, and the inputs of its linears.
        walk.load_float(place)
        order = groups(module, family)
        observer = partial(Observer, place.path, True, hidden.states.shape[1], {})
        out = torch.empty_like(hidden.states)  # [samples, tokens, width]
        seen, floats = observe_all(
            module, hidden, order, pieces=pieces_in(hidden), observer=observer, out=out
        )
        weights = {name: weight_of(module.get_submodule(name)).clone() for group in order for name in group}
        release(module)
        # The quantized block, corrected.
        walk.load_coded(place)
        train, judge = split_batches(hidden)
        evidence = Evidence(
            hidden,
            floats.states,
            train=train,
            judge=judge,
            weights=weights,
            packed={},
            stats=seen.whole(),
            depth=place.number / len(blocks(walk.twins.coded.model, family)),
            seed=walk.samples.seed,
            kind=self.kind,
        )

        def show(what: str, done: int, total: int) -> None:
            walk.show(f"{what}, {done} of {total}", done, total)

        found = self.correction(module, family, evidence, show)
        places = norm_places(walk.twins)
        changed = dict(
            places[f"{place.path}.{name}"].stored(parameter)
            for name, parameter in norm_parameters(module, family).items()
        )
        release(module)
        record = TweakRecord(place.number, before=found.before, after=found.after, kept=found.kept)
        return changed, ShardRecord(tweak=record)


@dataclass(frozen=True, eq=False)
class NormPlace:
    """Where a gain or a bias is stored: the tensor `name` of this type. `change`: how it differs there."""

    name: str
    kind: torch.dtype
    change: Callable[[Tensor], Tensor]

    def stored(self, value: Tensor) -> tuple[str, Tensor]:
        """The name, and what is stored of a value."""
        return self.name, self.change(value.detach().cpu().clone()).to(self.kind)


def norm_places(twins: Twins) -> dict[str, NormPlace]:
    """The gains and biases of all norms by full name, each with its place on the disk. Raises `FormatError`."""
    coded = twins.coded
    family, found = coded.family, dict[str, NormPlace]()
    names = [
        f"{path}.{name}"
        for path, block in blocks(coded.model, family)
        for name in norm_parameters(block, family)
    ]
    final = find(coded.model, family.final_norm) if family.final_norm else None
    names += [] if final is None else [f"{family.final_norm}.{leaf}" for leaf, _ in final.named_parameters()]
    for name in names:
        place = _place(twins, coded.origins.tensors[name].plain)
        if place is None:
            raise FormatError(
                f"{name} is not a tensor of its own in {coded.source.name}, so that no new value can take its place"
            )
        found[name] = place
    if not found:
        raise FormatError(
            f"the norms of a {type(coded.model).__name__} have no gains, so that there is nothing to move; use fracbit refine"
        )
    return found


def _place(twins: Twins, plain: str | None) -> NormPlace | None:
    """The place of a tensor that is stored as floats, by its name; None for any other."""
    source = twins.coded.source
    if plain is None:
        return None
    decoding = source.decodings.get(plain)
    if decoding is None:
        return NormPlace(plain, source.on_disk[plain].kind, lambda value: value)
    if decoding.floats is None:
        return None
    (part,) = decoding.parts.values()
    return NormPlace(part.name, source.on_disk[part.name].kind, decoding.floats)


def norm_kind(twins: Twins) -> torch.dtype:
    """The least precise type that norms are stored in."""
    stored = {place.kind for place in norm_places(twins).values()}
    return next((kind for kind in (torch.bfloat16, torch.float16) if kind in stored), torch.float32)
