"""Norm tweaking of one block of a foreign checkpoint: its norms are moved until it gives what the float block gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fracbit.checkpoint.source import FLOATS
from fracbit.errors import FormatError
from fracbit.models.blocks import blocks, find, groups, weight_of
from fracbit.models.correction import Correction, Evidence, norm_parameters
from fracbit.models.install import release
from fracbit.pipeline.improve.alongside import Place, Walk
from fracbit.pipeline.improve.twins import Twins
from fracbit.pipeline.quantize.block import split_batches
from fracbit.pipeline.quantize.observe import Observer, observe_all
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
        observer = Observer(place.path, gram=True, length=hidden.states.shape[1])
        out = torch.empty_like(hidden.states)  # [samples, tokens, width]
        stats, floats = observe_all(module, hidden, observer, order, out=out)
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
            stats=stats,
            depth=place.number / len(blocks(walk.twins.coded.model, family)),
            seed=walk.samples.seed,
            kind=self.kind,
        )

        def show(what: str, done: int, total: int) -> None:
            walk.show(f"{place.path} {what}", place.number, place.number + 1)

        found = self.correction(module, family, evidence, show)
        names = norm_names(walk.twins)
        changed = {
            names[f"{place.path}.{name}"]: parameter.detach().cpu().clone()
            for name, parameter in norm_parameters(module, family).items()
        }
        release(module)
        record = TweakRecord(place.number, before=found.before, after=found.after, kept=found.kept)
        return as_stored(walk.twins, changed), ShardRecord(tweak=record)


def norm_names(twins: Twins) -> dict[str, str]:
    """The gains and biases of all norms by full name, each with its tensor on the disk. Raises `FormatError`."""
    coded = twins.coded
    family, found = coded.family, dict[str, str]()
    names = [
        f"{path}.{name}"
        for path, block in blocks(coded.model, family)
        for name in norm_parameters(block, family)
    ]
    final = find(coded.model, family.final_norm) if family.final_norm else None
    names += [] if final is None else [f"{family.final_norm}.{leaf}" for leaf, _ in final.named_parameters()]
    for name in names:
        plain = coded.origins.tensors[name].plain
        if plain is None or plain in coded.source.decodings:
            raise FormatError(
                f"{name} is not a tensor of its own in {coded.source.name}, so that no new value can take its place"
            )
        found[name] = plain
    if not found:
        raise FormatError(
            f"the norms of a {type(coded.model).__name__} have no gains, so that there is nothing to move; use fracbit refine"
        )
    return found


def norm_kind(twins: Twins) -> torch.dtype:
    """The least precise type that norms are stored in."""
    stored = {twins.coded.source.on_disk[name].dtype for name in norm_names(twins).values()}
    return torch.bfloat16 if "BF16" in stored else torch.float16 if "F16" in stored else torch.float32


def as_stored(twins: Twins, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their names on the disk in the types that they have there."""
    stored = twins.coded.source.on_disk
    return {name: tensor.to(FLOATS[stored[name].dtype]) for name, tensor in tensors.items()}


def norm_gains(twins: Twins, model: nn.Module) -> dict[str, nn.Parameter]:
    """The gains and biases of a loaded model by their names on the disk."""
    return {plain: model.get_parameter(name) for name, plain in norm_names(twins).items()}
