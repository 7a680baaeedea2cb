"""What an export is compared with: the checkpoint that it was made from, or, where that is gone, its own reading by fracbit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from fracbit.checkpoint.export.as_exported import as_exported
from fracbit.checkpoint.export.coded import names_of
from fracbit.checkpoint.export.exporter import StoredModel, exporter_of, fitted, open_stored
from fracbit.checkpoint.load import load
from fracbit.checkpoint.opened import open_float
from fracbit.checkpoint.read_manifest import read_manifest
from fracbit.checkpoint.source import read_tensor
from fracbit.errors import EngineError
from fracbit.numerics.packed import decode
from fracbit.records.files import named_path

PLAIN = "float"
"""The format of plain weights."""


@dataclass(frozen=True, eq=False)
class ComparedWith:
    """Where an export comes from. `weights`: its layers by their names in the files, each decoded when it is called, fp32.

    `folder` has the tokenizer; `model` gives the model in fp32.
    """

    name: str
    folder: Path
    config: PreTrainedConfig
    weights: Mapping[str, Callable[[], Tensor]]
    model: Callable[[], AbstractContextManager[PreTrainedModel]]


def compared_with(path: Path, manifest: Mapping[str, Any], against: str | Path | None) -> ComparedWith:
    """The checkpoint `against`, or the one that the manifest of the export `path` names, or the export itself.

    Raises `EngineError` where `against` is not there.
    """
    named = against or manifest.get("checkpoint")
    folder = None if named is None else named_path(named, EngineError)
    if folder is not None and (folder / "config.json").is_file():
        return _checkpoint(folder, manifest)
    if against is not None:
        raise EngineError(
            f"{against} is not there; name the checkpoint that {path} was made from, or leave --against out"
        )
    return _itself(path)


def _checkpoint(folder: Path, manifest: Mapping[str, Any]) -> ComparedWith:
    asked = str(manifest["exported"])
    own = read_manifest(folder)
    if (own.get("recipe_key"), own.get("source")) != (manifest.get("recipe_key"), manifest.get("source")):
        raise EngineError(
            f"{folder} is not the checkpoint that the export was made from: its manifest names another recipe or source"
        )
    stored = fitted(open_stored(folder), exporter_of(asked), asked, requantize=True)
    names = names_of(stored)
    weights = {names.module(layer): partial(_exported, stored, layer) for layer in stored.layers}
    if asked.partition(":")[0] == PLAIN:  # whose type may round the weights
        model = partial(as_exported, stored, form=asked)
    else:
        model = partial(as_exported, stored) if stored.changed else partial(_loaded, folder)
    return ComparedWith(str(folder), folder, stored.model.config, weights=weights, model=model)


def _itself(path: Path) -> ComparedWith:
    file = path if path.is_file() else path / "model.gguf"
    opened = open_float(file if file.is_file() else path)
    weights = {
        name.removesuffix(".weight"): partial(read_tensor, opened.source, name, torch.float32)
        for name in opened.source.decodings
    }
    model = partial(_loaded, file if file.is_file() else path)
    return ComparedWith(
        "the export as fracbit reads it", path, opened.model.config, weights=weights, model=model
    )


def _exported(stored: StoredModel, layer: str) -> Tensor:
    return decode(stored.exported(layer)[0])


@contextmanager
def _loaded(place: Path) -> Iterator[PreTrainedModel]:
    yield load(place, torch.float32)
