"""Pruning: whole blocks are dropped instead of getting fewer bits, and a real checkpoint is written.

The folder is an ordinary float checkpoint with fewer blocks: transformers loads it, fracbit quantizes it.
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

from fracbit.checkpoint.opened import Opened, open_float
from fracbit.checkpoint.output import SHARD_BYTES, copy_rest, open_output
from fracbit.checkpoint.shards import check_apart, cut_shards, write_index
from fracbit.checkpoint.source import Source, read_tensor
from fracbit.errors import OutputError, RecipeError, SourceError, near_matches
from fracbit.models.blocks import blocks
from fracbit.models.origin import origins
from fracbit.models.skeleton import skeleton
from fracbit.records.files import named_path
from fracbit.records.run import ShardRecord
from fracbit.records.scores import Scores, check_scores

COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
PER_BLOCK = ("layer_types", "no_rope_layers", "mlp_layer_types", "attention_types", "attention_layers")
INDICES = ("mlp_only_layers",)


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

    Raises `RecipeError` for scores of another model, and when no block or every block would be dropped.
    """
    check_scores(scores, names)
    if not 0 < count < len(names):
        raise RecipeError(
            f"dropping {count} of {len(names)} blocks leaves no pruned model; drop 1 to {len(names) - 1}"
        )
    gone = set(scores.order()[-count:])
    return tuple(name for name in names if name in gone)


def pruned_config(config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The config entries that change when only the blocks `kept` stay: counts, and lists with one entry per block.

    Aliases of a count change together; an entry that is not a list of the old length stays as it is. Lists of block
    numbers (Qwen-MoE's dense blocks) are renumbered.
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


def prune(
    model: str | Path | Opened, dropped: Sequence[str], output: str | Path, overwrite: bool = False
) -> Pruned:
    """Write a model without the blocks `dropped` as an ordinary float checkpoint: tensors bit for bit, blocks renumbered.

    `model`: a folder, a hub id, or a checkpoint that is open already.
    One shard is in memory at a time; tokenizer, generation config and licenses are copied. Raises `RecipeError` for
    names that are not blocks or for all blocks, `SourceError` when the config has no count of blocks, `OutputError`.
    """
    folder, opened = (
        named_path(output, OutputError),
        model if isinstance(model, Opened) else open_float(model),
    )
    check_apart(folder, opened.source.folder)
    kept = _kept([name for name, _ in blocks(opened.model, opened.family)], dropped)
    config = _smaller_config(opened, kept)
    shards = _renamed(opened.source, opened.family.blocks, kept)
    _check(opened, config, [new for names in shards.values() for new in names])
    infos = [opened.source.tensors[old] for names in shards.values() for old in names.values()]
    total = sum(info.bytes for info in infos)
    key = hashlib.sha256(json.dumps([opened.source.name, list(dropped)]).encode()).hexdigest()[:16]
    with open_output(folder, key, total, overwrite, resume=False) as out:
        for shard, names in shards.items():
            tensors = {new: read_tensor(opened.source, old) for new, old in names.items()}
            out.write_shard(shard, tensors, ShardRecord())
        write_index(folder, {name: shard for shard, names in shards.items() for name in names}, total)
        copy_rest(opened.source.folder, folder, code=opened.trust_remote_code)
        out.finish(config, {"pruned": {"source": opened.source.name, "dropped": list(dropped)}})
    parameters = sum(math.prod(info.shape) for info in infos)
    size = sum((folder / shard).stat().st_size for shard in shards)
    return Pruned(str(folder), tuple(dropped), blocks=len(kept), parameters=parameters, bytes=size)


def _smaller_config(opened: Opened, kept: Sequence[int]) -> dict[str, Any]:
    old = dict(opened.source.config)
    config = {**old, **pruned_config(old, kept)}
    if config == old:
        raise SourceError(
            f"{opened.source.name} cannot be pruned: its config has no number of blocks ({', '.join(COUNTS)})"
        )
    return config


def _check(opened: Opened, config: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse a model whose config builds other blocks after renumbering (for example, every second one a mixture)."""
    smaller = type(opened.model.config).from_dict(dict(config))
    found = origins(skeleton(smaller, trust_remote_code=opened.trust_remote_code), names)
    if found.missing or len(found.unused) > len(opened.origins.unused):
        raise SourceError(
            f"{opened.source.name} cannot be pruned at these blocks: in its config the kind of a block depends on its "
            f"number, and {(*found.missing, *found.unused)[0]} no longer fits; drop other blocks"
        )


def _kept(names: Sequence[str], dropped: Sequence[str]) -> list[int]:
    """Numbers of the blocks that stay."""
    unknown = [name for name in dropped if name not in names]
    if unknown:
        raise RecipeError(f"{unknown[0]} is not a block of this model; {near_matches(unknown[0], names)}")
    kept = [index for index, name in enumerate(names) if name not in set(dropped)]
    if not kept or not dropped:
        raise RecipeError(
            f"dropping {len(dropped)} of {len(names)} blocks leaves no pruned model; drop 1 to {len(names) - 1}"
        )
    return kept


def _renamed(source: Source, stack: str, kept: Sequence[int]) -> dict[str, dict[str, str]]:
    """Shard -> new name -> name on disk. A checkpoint may omit the base model's prefix, as GPT-2's and BLOOM's do."""
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
    parts = cut_shards(names.items(), lambda pair: source.tensors[pair[1]].bytes, SHARD_BYTES)
    return {shard: dict(part) for shard, part in parts.items()}
