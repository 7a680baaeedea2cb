"""LoRA adapters, merged while their base model is read: w + scale * B A, one tensor at a time.

A folder may hold an adapter alone (its config names the base model), beside its base model, or the weights of a model that was
saved before its adapter was merged (`base_layer`). What peft does beyond plain LoRA is refused by name: peft itself merges it.

Ref: Hu et al. 2021 (https://arxiv.org/abs/2106.09685); rsLoRA's scale: Kalajdzievski 2023 (https://arxiv.org/abs/2312.03732).
"""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from fracbit.checkpoint.formats.decoding import Decoding, Part
from fracbit.checkpoint.source import FLOATS, Source, TensorInfo, find_folder, read_headers, read_model_file
from fracbit.errors import SourceError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE, DOWN, UP = ".base_layer.", ".lora_A.", ".lora_B."
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "true", "false")
"""Values of `init_lora_weights` that leave the base model as it is."""
HARMLESS = {
    "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "target_modules",
    "task_type", "use_rslora", "parent_library",
}  # fmt: skip
"""Entries of a config that need nothing beyond w + scale * B A, or are looked at below."""
BESIDE = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*", "merges.txt", "*.model",
    "*.tiktoken",
)  # fmt: skip
"""Files of an adapter's folder that replace those of the base model: its tokenizer."""
REMEDY = "merge it with peft (model.merge_and_unload()), save the model, and use that"


@dataclass(frozen=True)
class Adapter:
    """An adapter: its folder, its config, and its tensors by their names in the file."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    def scale(self, module: str, rank: int) -> float:
        """The factor of B A in a module, as peft has it."""
        alpha = float(self.config.get("lora_alpha", 8))
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = float(value)
                break
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)


def base_of(folder: Path) -> str | None:
    """The base model of a folder that holds an adapter alone; None for any other folder. Raises `SourceError`."""
    if not (folder / CONFIG).is_file() or (folder / "config.json").is_file():
        return None
    config = read_model_file(folder / CONFIG, "it names the base model of an adapter")
    base = config.get("base_model_name_or_path")
    if not base:
        raise SourceError(f"{folder} holds an adapter, and its {CONFIG} names no base model; {REMEDY}")
    return str(base)


def adapter_folder(folder: Path, base: str, revision: str | None, trust_remote_code: bool) -> Path:
    """A folder with the config of an adapter's base model and the adapter's tokenizer, until this process ends.

    Raises `SourceError` that says what the adapter is where its base model is not there.
    """
    try:
        return _assembled(folder.resolve(), find_folder(base, revision, trust_remote_code))
    except SourceError as error:
        raise SourceError(
            f"{folder} is an adapter of {base}, which is not there ({error}); {REMEDY}"
        ) from error


@cache
def _assembled(folder: Path, base: Path) -> Path:
    made = Path(tempfile.mkdtemp(prefix="fracbit-lora-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    own = [path for pattern in BESIDE for path in folder.glob(pattern)]
    base_files = [
        path
        for path in base.iterdir()
        if path.is_file() and path.suffix in (".json", ".txt", ".jinja", ".model")
    ]
    for path in [*base_files, *own]:
        if not path.name.endswith(".index.json"):
            shutil.copyfile(path, made / path.name)
    return made


def adapted(base: Source, name: str, *, place: Path, folder: Path) -> Source:
    """The base model with the adapter at `place`, under the name and with the folder that the adapter has."""

    def placed(info: TensorInfo) -> TensorInfo:
        return replace(info, file=str((base.folder / info.file).resolve()))

    decodings = {each: replace(made, info=placed(made.info)) for each, made in base.decodings.items()}
    moved = replace(
        base,
        name=name,
        folder=folder,
        tensors={each: placed(info) for each, info in base.tensors.items()},
        decodings=decodings,
        stored={each: placed(info) for each, info in base.on_disk.items()},
    )
    return merged(moved, place)


def merged(source: Source, folder: Path) -> Source:
    """A base model with the adapter in `folder` merged into it. Raises `SourceError` for what is not plain LoRA."""
    adapter = _read(source, folder)
    renamed = _renamed(source)
    found, used = _merges(renamed, adapter)
    stored = {**source.on_disk, **adapter.tensors}
    saved = {name: info for name, info in adapter.tensors.items() if name not in used}
    tensors = {name: info for name, info in renamed.tensors.items() if name not in adapter.tensors}
    decodings = {**renamed.decodings, **found}
    for name, info in saved.items():
        target = name.removeprefix(PREFIX).replace(".modules_to_save.default.", ".")
        if "lora_" in target or (target in tensors and tensors[target].shape != info.shape):
            raise SourceError(
                f"{folder} holds {name} {list(info.shape)}, which has no place in {source.name} as it is; {REMEDY}"
            )
        tensors[target] = info
        decodings[target] = _same(name, info)
    what = f"LoRA merged into {len(found)} weights"
    note = f"a LoRA adapter was merged into {len(found)} weights while they were read"
    return replace(
        source,
        tensors=tensors,
        decodings=decodings,
        stored=stored,
        decoded="; ".join([*([source.decoded] if source.decoded else []), what]),
        quantization={**source.quantization, "adapter": dict(adapter.config)},
        notes=(*source.notes, note),
    )


def unmerged(source: Source) -> bool:
    """Whether the tensors of a model were saved before an adapter was merged."""
    return any(BASE in name or DOWN in name for name in source.tensors)


def with_adapter(source: Source) -> Source:
    """A model with the adapter that lies beside its weights or among them, if there is one. Raises `SourceError`."""
    if (source.folder / CONFIG).is_file():
        return merged(source, source.folder)
    found = [name for name in source.tensors if BASE in name or DOWN in name]
    if not found:
        return source
    raise SourceError(
        f"{source.name} was saved before its LoRA adapter was merged ({found[0]}), and has no {CONFIG}, which holds the "
        f"scale of the adapter; {REMEDY}"
    )


def _read(source: Source, folder: Path) -> Adapter:
    """The adapter of a folder, or the one within the source's own tensors. Raises `SourceError`."""
    config = read_model_file(folder / CONFIG, "it holds the scale of an adapter")
    kind = str(config.get("peft_type", "LORA"))
    start = config.get("init_lora_weights")
    odd = [name for name, value in config.items() if name not in HARMLESS and value]
    odd += ["init_lora_weights"] if start not in PLAIN_STARTS else []
    odd += ["bias"] if config.get("bias", "none") != "none" else []
    if kind != "LORA" or odd:
        what = f"{kind} with {odd[0]} = {config[odd[0]]!r}" if odd else kind
        raise SourceError(f"{folder} is an adapter of peft ({what}), and fracbit merges plain LoRA; {REMEDY}")
    inside = {name: info for name, info in source.tensors.items() if DOWN in name or UP in name}
    if inside:
        return Adapter(folder, config, inside)
    if not (folder / WEIGHTS).is_file():
        raise SourceError(
            f"{folder} has {CONFIG} and no {WEIGHTS}; if a pickle holds the adapter, save it again with peft "
            "(safe_serialization=True)"
        )
    headers = read_headers([folder / WEIGHTS])
    return Adapter(
        folder,
        config,
        {name: replace(info, file=str((folder / WEIGHTS).resolve())) for name, info in headers.items()},
    )


def _renamed(source: Source) -> Source:
    """A model saved before merging, under the names of its base model: `base_layer` is left out of them."""
    if not unmerged(source):
        return source
    tensors, decodings = dict[str, TensorInfo](), dict(source.decodings)
    for name, info in source.tensors.items():
        inside = DOWN in name or UP in name
        plain = name if inside else name.removeprefix(PREFIX).replace(BASE, ".")
        tensors[plain] = info
        if plain != name:
            decodings[plain] = decodings.pop(name) if name in decodings else _same(name, info)
    return replace(source, tensors=tensors, decodings=decodings, stored=source.on_disk)


def _same(name: str, info: TensorInfo) -> Decoding:
    """A stored tensor under another name."""
    part = Part(name, rows=1) if info.shape else Part(name)
    return Decoding(info, {"same": part}, lambda parts: parts["same"], upright=False)


def _merges(source: Source, adapter: Adapter) -> tuple[dict[str, Decoding], set[str]]:
    """The merged weights by name, and the tensors of the adapter that they take."""
    found: dict[str, Decoding] = {}
    used: set[str] = set()
    for down in adapter.tensors:
        if DOWN not in down:
            continue
        up = down.replace(DOWN, UP)
        module = down.removeprefix(PREFIX).partition(DOWN)[0]
        name = next((n for n in _names(module) if n in source.tensors), None)
        if up not in adapter.tensors or name is None:
            lacks = up if up not in adapter.tensors else f"{module}.weight"
            raise SourceError(
                f"{adapter.folder} adapts {module}, and {lacks} is not there; it may belong to another model than "
                f"{source.name}"
            )
        if name in found:
            raise SourceError(f"{adapter.folder} has several adapters for {module}; {REMEDY}")
        found[name] = _merge(source, adapter, name, module=module, down=down, up=up)
        used |= {down, up}
    return found, used


def _names(module: str) -> tuple[str, ...]:
    """What the weight of a module may be called on the disk: hub files may lack the base model's prefix."""
    return f"{module}.weight", f"{module.partition('.')[2]}.weight"


def _merge(source: Source, adapter: Adapter, name: str, *, module: str, down: str, up: str) -> Decoding:
    """W + scale * B A. The product is made in fp64, so that a row does not depend on how many others are asked for."""
    info, first, second = source.tensors[name], adapter.tensors[down], adapter.tensors[up]
    rank = first.shape[0]
    turned = bool(adapter.config.get("fan_in_fan_out"))
    shape = (second.shape[0], first.shape[-1])
    fits = len(first.shape) == len(second.shape) == 2 and second.shape[1] == rank
    if not fits or info.shape != (shape[::-1] if turned else shape) or info.dtype not in FLOATS:
        raise SourceError(
            f"{adapter.folder}: {module} has factors {list(first.shape)} and {list(second.shape)}, which do not fit {name} "
            f"{info.dtype} {list(info.shape)} of {source.name}"
        )
    scale = adapter.scale(module, rank)
    inner = source.decodings.get(name) or _same(name, info)
    roles = {f"base {role}": part for role, part in inner.parts.items()}

    def values(parts: Mapping[str, Tensor]) -> Tensor:
        weight = inner.decode({role: parts[f"base {role}"] for role in inner.parts})
        weight = weight.to(FLOATS[info.dtype]).double()
        if turned:
            return weight + scale * (parts["up"].double() @ parts["down"].double()).T
        return weight + scale * (parts["up"].double() @ parts["down"].double())  # [rows, in]

    whole = turned or not any(part.rows for part in inner.parts.values())
    roles = {role: Part(part.name) if whole else part for role, part in roles.items()}
    parts = {**roles, "up": Part(up, rows=0 if whole else 1), "down": Part(down)}
    return Decoding(info, parts, values, upright=inner.upright)
