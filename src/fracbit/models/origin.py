"""Where the tensors of a model lie on disk: by name, as a part of a tensor, or joined from several.

Hub files may lack the base model's prefix (GPT-2's and BLOOM's `h.0...`), hold tied tensors once, name a mixture's experts one
by one where transformers fuses them, or hold what a module joins (a convolution over q, k and v) in parts. transformers has
tables of all that, which are followed here as a whole; none is copied.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from fracbit.errors import SourceError
from fracbit.models.blocks import borrowed, find
from fracbit.models.experts import Cut, Half, SplitExperts, parts_of

HALVES: tuple[Half | None, ...] = ("first", "second", "even", "odd", None)


@dataclass(frozen=True, eq=False)
class Conversion:
    """How transformers makes tensors of a model from several on disk, such as by joining or transposing them.

    `patterns`: for every tensor on disk the pattern of the converter that it fits. `first`: the model's name of what they are
    collected under; `target`: the one that is wanted.
    """

    converter: WeightConverter
    patterns: tuple[str, ...]
    first: str
    target: str
    model: PreTrainedModel

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensor called `target` from those on disk. Raises `SourceError` where transformers does not make it."""
        work: Any = deepcopy(self.converter)
        for pattern, tensor in zip(self.patterns, tensors, strict=True):
            work.add_tensor(self.first, pattern, pattern, tensor)
        made = work.convert(self.first, model=_Whole(self.model), config=self.model.config)
        if self.target not in made:
            raise SourceError(f"tensor {self.target} cannot be made from {', '.join(self.patterns)}")
        found = made[self.target]
        single: Tensor = found[0] if isinstance(found, list) else found
        return single


class _Whole:
    """A model as rules of transformers know it: with fused mixtures."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def get_parameter(self, name: str) -> Tensor:
        """A parameter, on the meta device where it is that of a mixture."""
        path, _, leaf = name.rpartition(".")
        module = find(self.model, path)
        if isinstance(module, SplitExperts):
            return torch.empty(module.shapes[leaf], device="meta")
        return self.model.get_parameter(name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


@dataclass(frozen=True)
class Origin:
    """Where a tensor of the model lies on disk: the tensors there, how they are joined, and which part of that it is."""

    names: tuple[str, ...]
    conversion: Conversion | None = None
    cut: Cut | None = None

    def read(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensor of the model from those called `names`; a view where nothing is joined."""
        return self.part_of(self.joined(tensors))

    def joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensor of which this is a part, from those called `names`."""
        return tensors[0] if self.conversion is None else self.conversion(tensors)

    def part_of(self, whole: Tensor) -> Tensor:
        """The tensor of the model from the one that is joined, a view."""
        return whole if self.cut is None else self.cut.read(whole)

    @property
    def plain(self) -> str | None:
        """The name of the one tensor on disk that is the model's as it is; None where it is only a part, or joined."""
        return self.names[0] if self.conversion is None and self.cut is None else None


@dataclass(frozen=True)
class Origins:
    """The model's tensors by name with their place on disk, names on disk that no module needs, and names without a tensor."""

    tensors: dict[str, Origin]
    unused: tuple[str, ...]
    missing: tuple[str, ...]


def origins(model: PreTrainedModel, disk_names: Iterable[str]) -> Origins:
    """Where each tensor of a skeleton lies among the tensor names of a checkpoint.

    Applies the rules with which transformers itself loads this architecture. A tied tensor is listed under the name that the
    checkpoint holds and is not missing under the other.
    """
    disk_names = list(disk_names)
    state = model.state_dict(keep_vars=True)
    parts = parts_of(model)
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    # What transformers has before mixtures are split.
    whole: dict[str, Any] = {name: True for name in state if name not in _names_of(parts)}
    whole |= dict.fromkeys(parts, True)
    prefix = model.base_model_prefix
    found: dict[str, Origin] = {}
    joined: dict[str, list[tuple[str, str]]] = defaultdict(list)
    unused = []
    for disk in sorted(disk_names, key=dot_natural_key):
        name, pattern = rename_source_key(disk, renamings, converters, prefix, whole)
        if name not in whole and disk in whole:  # one of the model's own names that a rule fits
            name, pattern = disk, None
        if name in whole and pattern is not None:
            joined[name].append((disk, pattern))
        elif name in whole:
            found[name] = Origin((disk,))
        else:
            plain = _prefixed(rename_source_key(disk, renamings, [], prefix, state)[0], prefix, state)
            plain = plain or _prefixed(disk, prefix, state)  # an expert by its own name
            if plain:
                found[plain] = Origin((disk,))
            else:
                unused.append(disk)
    for first, sources in joined.items():
        found |= _converted(model, by_pattern, first, sources=sources, parts=parts, whole=whole)
    tensors = {
        name: origin for fused, place in found.items() for name, origin in _split(fused, place, parts).items()
    }
    order = {name: number for number, name in enumerate(disk_names)}
    tensors = dict(sorted(tensors.items(), key=lambda item: order[item[1].names[0]]))
    held = {id(state[name]) for name in tensors}
    missing = tuple(name for name, tensor in state.items() if id(tensor) not in held)
    return Origins(tensors, tuple(sorted(unused, key=order.__getitem__)), missing)


def block_places(model: PreTrainedModel, places: Origins, path: str) -> dict[str, Origin]:
    """Where the tensors of the block at `path` lie, by their names inside it; those that it shares with others among them."""
    within = f"{path}."
    found = {
        name.removeprefix(within): place for name, place in places.tensors.items() if name.startswith(within)
    }
    ties = model.all_tied_weights_keys
    for inside, owner in borrowed(model, path).items():
        alike = (owner, *(name for name, its in ties.items() if its == owner))
        held = next((places.tensors[name] for name in alike if name in places.tensors), None)
        if inside not in found and held is not None:
            found[inside] = held
    return found


def released_names(model: PreTrainedModel) -> dict[str, str]:
    """What released checkpoints call the tensors of a skeleton, by its own names: those that each hold one tensor as it is.

    The rules with which transformers saves this architecture, followed backwards from its names to ours.
    """
    parts = parts_of(model)
    whole = {name: tensor for name, tensor in model.state_dict().items() if name not in _names_of(parts)}
    split = {path: module for path, module in model.named_modules() if isinstance(module, SplitExperts)}
    for fused in parts:
        path, _, leaf = fused.rpartition(".")
        whole[fused] = torch.empty(split[path].shapes[leaf], device="meta")
    with torch.device("meta"):
        disk = revert_weight_conversion(model, whole)
    found = origins(model, disk).tensors
    return {name: place.plain for name, place in found.items() if place.plain is not None}


def _names_of(parts: Mapping[str, Mapping[str, Cut]]) -> set[str]:
    return {name for inside in parts.values() for name in inside}


def _split(name: str, place: Origin, parts: Mapping[str, Mapping[str, Cut]]) -> dict[str, Origin]:
    """The tensors of the model that one of transformers' holds: itself, or every expert's."""
    if name not in parts:
        return {name: place}
    return {part: replace(place, cut=cut) for part, cut in parts[name].items()}


def _prefixed(name: str, prefix: str, state: Mapping[str, object]) -> str | None:
    """The model's tensor that is called `name` with or without the base model's prefix."""
    for each in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if each in state:
            return each
    return None


def _converted(
    model: PreTrainedModel,
    by_pattern: Mapping[str, WeightConverter],
    first: str,
    *,
    sources: Sequence[tuple[str, str]],
    parts: Mapping[str, Mapping[str, Cut]],
    whole: Mapping[str, object],
) -> dict[str, Origin]:
    """The tensors that a converter makes of `sources`, names on disk with their patterns, collected under `first`."""
    converter = by_pattern[sources[0][1]]
    if first in parts:
        single = _one_by_one(converter, sources, parts[first])
        if single:
            return single
    names, patterns = tuple(name for name, _ in sources), tuple(pattern for _, pattern in sources)
    target, *others = converter.target_patterns
    targets = [first, *(first.replace(target, other) for other in others)]
    return {
        name: Origin(names, Conversion(converter, patterns, first, target=name, model=model))
        for name in targets
        if name in whole
    }


def _one_by_one(
    converter: WeightConverter, sources: Sequence[tuple[str, str]], inside: Mapping[str, Cut]
) -> dict[str, Origin]:
    """Experts that the disk holds one by one and transformers stacks: each of the model's is one on disk, as it is.

    Empty where it does more with them than to stack, and to put gate above up.
    """
    kinds = {type(operation).__name__ for operation in converter.operations}
    by_pattern: dict[str, dict[int, str]] = defaultdict(dict)
    for name, pattern in sources:
        numbers = re.findall(r"\.(\d+)(?=\.)", name)
        by_pattern[pattern][int(numbers[-1]) if numbers else -1] = name
    order = [by_pattern[pattern] for pattern in converter.source_patterns if pattern in by_pattern]
    present = {cut.half for cut in inside.values()}
    halves: list[Half | None] = [half for half in HALVES if half in present]
    plain = not any(cut.transposed or cut.half in ("even", "odd") for cut in inside.values())
    if not kinds <= {"MergeModulelist", "Concatenate"} or len(order) != len(halves) or not plain:
        return {}
    places = {name: (order[halves.index(cut.half)], cut.expert) for name, cut in inside.items()}
    if not all(expert in names for names, expert in places.values()):
        return {}
    return {name: Origin((names[expert],)) for name, (names, expert) in places.items()}
