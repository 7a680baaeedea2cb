"""Pruning by the same orders: whole blocks are dropped instead of getting fewer bits, and a real checkpoint is written.

The comparison of arXiv:2406.17415, section 5: at equal size, quantizing the less important layers should beat removing them,
except where they would fall to 2 bits. The written folder is an ordinary float checkpoint with fewer blocks: transformers
loads it, fracbit quantizes it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fracbit.checkpoint.output import MANIFEST, open_output, write_json
from fracbit.checkpoint.source import INDEX, SINGLE, Source, open_source, read_tensor
from fracbit.errors import OutputError, RecipeError, SourceError, near_matches
from fracbit.importance import Unit
from fracbit.models.blocks import blocks
from fracbit.models.find import family_of
from fracbit.models.skeleton import origins, skeleton
from fracbit.pipeline.quantize.manifest import copy_rest
from fracbit.pipeline.quantize.schedule import SHARD_BYTES
from fracbit.pipeline.quantize.stream import model_config
from fracbit.pipeline.study.float_model import FloatModel, rounded
from fracbit.pipeline.study.variants import Picks, losses_of
from fracbit.records.progress import Progress
from fracbit.records.scheme import Scheme
from fracbit.records.scores import Scores, check_scores

COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
PER_BLOCK = ("layer_types", "no_rope_layers", "mlp_layer_types", "attention_types", "attention_layers")
INDICES = ("mlp_only_layers",)
DROPPED = 2


@dataclass(frozen=True)
class Pruned:
    """A pruned model: what is left of it and where it was written."""

    output: str
    dropped: tuple[str, ...]
    blocks: int
    parameters: int
    bytes: int


def least_important(scores: Scores, count: int, names: Sequence[str]) -> tuple[str, ...]:
    """The `count` blocks of lowest score, in the order of the model.

    Raises `RecipeError` for scores of another model and when less than one or every block would go.
    """
    check_scores(scores, names)
    if not 0 < count < len(names):
        raise RecipeError(
            f"dropping {count} of {len(names)} blocks leaves no pruned model; drop 1 to {len(names) - 1}"
        )
    gone = set(scores.order()[-count:])
    return tuple(name for name in names if name in gone)


def pruned_config(config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The entries of a config that change when only the blocks numbered `kept` stay: counts, and lists with one entry a block.

    Aliases of a count change together; an entry that is no list of the old length is left alone. Lists of block numbers
    (Qwen-MoE's dense blocks) are renumbered.
    """
    old = max((int(config[name]) for name in COUNTS if name in config), default=0)
    changed: dict[str, Any] = {name: len(kept) for name in COUNTS if config.get(name) == old}
    for name in PER_BLOCK:
        if isinstance(config.get(name), list) and len(config[name]) == old:
            changed[name] = [config[name][index] for index in kept]
    for name in INDICES:
        if config.get(name):
            changed[name] = [new for new, index in enumerate(kept) if index in config[name]]
    return changed


def compare_with_quantizing(
    subject: FloatModel,
    units: Sequence[Unit],
    scores: Scores,
    high: Scheme | None,
    low: Scheme | None,
    held_out: Tensor,
    progress: Progress | None = None,
) -> dict[str, list[tuple[float, float]]]:
    """Dropping blocks against lowering them from `high` to `low`, by one order: (stored bits per weight, nats per token).

    Bits are over the weights of the whole model, so that what was dropped counts as saved. Both lines start at `high`
    everywhere (None: float); block after block goes, the least important first. Raises `RecipeError` when `low` takes no fewer
    bits than `high`.
    """
    if sum(unit.bits(low) for unit in units) >= sum(unit.bits(high) for unit in units):
        raise RecipeError(
            f"--low {low or 'float'} takes no fewer bits than --high {high or 'float'}; name a smaller scheme"
        )
    weights = sum(unit.weights for unit in units)
    filled = [
        [rounded(subject, dict.fromkeys(unit.shapes, scheme)) for scheme in (high, low)] for unit in units
    ]
    place = {unit.name: index for index, unit in enumerate(units)}
    order = [place[name] for name in reversed(scores.order())]
    ways = {"quantized": 1, "pruned": DROPPED}
    picks = {
        (way, count): tuple(number if index in order[:count] else 0 for index in range(len(units)))
        for way, number in ways.items()
        for count in range(len(units) + (way == "quantized"))
    }
    losses: dict[Picks, float] = {}
    for these, nats in losses_of(
        subject, picks.values(), lambda block, n: None if n == DROPPED else filled[block][n], held_out
    ):
        losses[these] = float(nats.mean())
        if progress is not None:
            progress("comparing", len(losses), len(set(picks.values())))
    lines: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for (way, _), these in picks.items():
        kept = [(unit, (high, low)[n]) for unit, n in zip(units, these, strict=True) if n != DROPPED]
        lines[way].append((sum(unit.bits(scheme) for unit, scheme in kept) / weights, losses[these]))
    return lines


Point = tuple[float, float]


def at_equal_size(lines: Mapping[str, Sequence[Point]]) -> list[tuple[Point, Point | None]]:
    """Every pruned model beside the quantized one of no more bits: (bits, nats) each, None when all quantized are larger."""
    found: list[tuple[Point, Point | None]] = []
    for pruned in lines["pruned"]:
        within = [point for point in lines["quantized"] if point[0] <= pruned[0] + 1e-9]
        found.append((pruned, max(within, default=None)))
    return found


def prune(source: str | Path, dropped: Sequence[str], output: str | Path, overwrite: bool = False) -> Pruned:
    """Write a model without the blocks `dropped` as an ordinary float checkpoint: tensors bit for bit, blocks renumbered.

    One shard is in memory at a time; tokenizer, generation config and licenses are copied. Raises `RecipeError` for names
    that are no blocks or all of them, `SourceError` when the config has no count of blocks, `OutputError`.
    """
    folder, opened = Path(output), open_source(str(source))
    if folder.exists() and folder.resolve() == opened.folder.resolve():
        raise OutputError(f"{folder} is the model itself; name another folder for the output")
    shell = skeleton(model_config(opened))
    family = family_of(shell)
    kept = _kept([name for name, _ in blocks(shell, family)], dropped)
    config = {**opened.config, **pruned_config(opened.config, kept)}
    if config == dict(opened.config):
        raise SourceError(
            f"{source} has no entry that counts its blocks ({', '.join(COUNTS)}); it cannot be pruned"
        )
    shards = _renamed(opened, family.blocks, kept)
    _check(opened, config, [new for names in shards.values() for new in names])
    total = sum(opened.tensors[old].bytes for names in shards.values() for old in names.values())
    key = hashlib.sha256(json.dumps([str(source), list(dropped)]).encode()).hexdigest()[:16]
    with open_output(folder, key, total, overwrite, resume=False) as target:
        for shard, names in shards.items():
            target.write_shard(shard, {new: read_tensor(opened, old) for new, old in names.items()}, {})
        if list(shards) != [SINGLE]:
            write_json(folder / INDEX, _index(shards, total))
        copy_rest(opened, target)
        write_json(folder / MANIFEST, {"pruned": {"source": str(source), "dropped": list(dropped)}})
        target.finish(config)
    parameters = sum(
        math.prod(opened.tensors[old].shape) for names in shards.values() for old in names.values()
    )
    size = sum((folder / shard).stat().st_size for shard in shards)
    return Pruned(str(folder), tuple(dropped), len(kept), parameters, size)


def _check(source: Source, config: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse a model whose config builds other blocks when they are renumbered (every second one a mixture, say)."""
    smaller = type(model_config(source)).from_dict(dict(config))
    found = origins(skeleton(smaller), names)
    if found.missing or len(found.unused) > len(
        origins(skeleton(model_config(source)), source.tensors).unused
    ):
        raise SourceError(
            f"{source.name} cannot be pruned at these blocks: its config decides by a block's number what is in it, and "
            f"{(*found.missing, *found.unused)[0]} no longer fits; drop other blocks"
        )


def _kept(names: Sequence[str], dropped: Sequence[str]) -> list[int]:
    """Numbers of the blocks that stay."""
    unknown = [name for name in dropped if name not in names]
    if unknown:
        raise RecipeError(f"{unknown[0]} is no block of this model; {near_matches(unknown[0], names)}")
    kept = [index for index, name in enumerate(names) if name not in set(dropped)]
    if not kept or not dropped:
        raise RecipeError(
            f"dropping {len(dropped)} of {len(names)} blocks leaves no pruned model; drop 1 to {len(names) - 1}"
        )
    return kept


def _renamed(source: Source, stack: str, kept: Sequence[int]) -> dict[str, dict[str, str]]:
    """Shard -> new name -> name on disk. A checkpoint may leave out the base model's prefix, GPT-2's and BLOOM's do."""
    base, _, leaf = stack.rpartition(".")
    pattern = re.compile(rf"((?:{re.escape(base)}\.|)(?:{re.escape(leaf)})\.)(\d+)(\..+)")
    number = {old: new for new, old in enumerate(kept)}
    names: dict[str, str] = {}
    for old in source.tensors:
        match = pattern.fullmatch(old)
        if match is None:
            names[old] = old
        elif int(match[2]) in number:
            names[f"{match[1]}{number[int(match[2])]}{match[3]}"] = old
    if len(names) == len(source.tensors):
        raise SourceError(
            f"{source.name} holds no tensors of single blocks below {stack!r}; it cannot be pruned"
        )
    return _shards(source, names)


def _shards(source: Source, names: dict[str, str]) -> dict[str, dict[str, str]]:
    groups: list[dict[str, str]] = [{}]
    size = 0
    for new, old in names.items():
        if groups[-1] and size + source.tensors[old].bytes > SHARD_BYTES:
            groups.append({})
            size = 0
        groups[-1][new] = old
        size += source.tensors[old].bytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{n:05}-of-{len(groups):05}.safetensors": group for n, group in enumerate(groups, 1)}


def _index(shards: dict[str, dict[str, str]], total: int) -> dict[str, Any]:
    places = {name: shard for shard, names in shards.items() for name in names}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
