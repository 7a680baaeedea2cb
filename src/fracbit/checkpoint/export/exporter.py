"""The protocol of export formats, and the export of a fracbit checkpoint to a folder.

    checkpoint -> files + skeleton -> can the format hold every layer? -> its shards -> other files, manifest, config.json

The folder is written like a checkpoint (checkpoint/output.py): at any moment it is absent, resumable or complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from fracbit.checkpoint.format import QUANT_METHOD, StoredLayer, packed_layer, read_layers, tensor_name
from fracbit.checkpoint.opened import model_config, open_checkpoint
from fracbit.checkpoint.output import MANIFEST, Output, copy_rest, open_output
from fracbit.checkpoint.shards import check_apart
from fracbit.checkpoint.source import Source, read_tensor
from fracbit.errors import FormatError
from fracbit.models.skeleton import skeleton
from fracbit.numerics.packed import PackedTensor, part_shapes
from fracbit.records import tables
from fracbit.records.progress import Progress, Shown, showing
from fracbit.records.tables import Table
from fracbit.records.version import __version__

SHOWN = 4  # names of layers in a message


@dataclass(frozen=True, eq=False)
class StoredModel:
    """A fracbit checkpoint on disk, read one layer at a time, and the skeleton of its model, mixtures split into linears."""

    source: Source
    model: PreTrainedModel
    layers: Mapping[str, StoredLayer]

    def packed(self, layer: str) -> PackedTensor:
        """The packed weight of a quantized layer. Raises `FormatError` or `SourceError`."""
        stored = self.layers[layer]
        names = [tensor_name(layer, part) for part in _parts(stored)]
        held = {name: read_tensor(self.source, name) for name in names if name in self.source.tensors}
        return packed_layer(layer, stored, held)

    def tensor(self, name: str) -> Tensor:
        """A tensor that stayed float, as it is stored."""
        return read_tensor(self.source, name)

    @cached_property
    def rest(self) -> tuple[str, ...]:
        """The stored tensors that belong to no quantized layer: norms, biases, what was kept float."""
        parts = {tensor_name(name, part) for name, stored in self.layers.items() for part in _parts(stored)}
        return tuple(name for name in self.source.tensors if name not in parts)


@dataclass(frozen=True)
class Written:
    """What an exporter wrote: its weight files by name, and what config.json is to hold."""

    files: tuple[str, ...]
    config: Mapping[str, Any]


class Exporter(Protocol):
    """A format with its parameter, if it has one."""

    def fault(self, layer: StoredLayer) -> str:
        """Why the format cannot hold a layer, and what to do instead; "" where it can."""
        ...

    def size(self, stored: StoredModel) -> int:
        """Bytes that `write` will take on the disk."""
        ...

    def write(self, stored: StoredModel, target: Output, show: Progress) -> Written:
        """Write the weights, except shards that `target` has a record of."""
        ...


FORMATS: Table[Callable[[str], Exporter]] = tables.FORMATS


@dataclass(frozen=True)
class Exported:
    """What an export made: the folder, its format, and the bytes of its weight files."""

    output: str
    format: str
    bytes: int


def export(
    checkpoint: str | Path,
    output: str | Path,
    format: str,  # noqa: A002
    *,
    overwrite: bool = False,
    resume: bool = False,
    trust_remote_code: bool = False,
    progress: Shown = "auto",
) -> Exported:
    """Write a fracbit checkpoint (a folder or hub id) into the folder `output` in another format.

    `format` is a name of `FORMATS`, with a parameter after a colon if the format has one: `float`, `float:fp32`.
    Raises `RecipeError` for an unknown format, `FormatError` for a layer that it cannot hold, `SourceError`, `OutputError`.
    """
    exporter = exporter_of(format)
    stored = open_stored(checkpoint, trust_remote_code)
    folder = Path(output).expanduser()
    check_apart(folder, stored.source.folder)
    check_layers(stored, exporter, format)
    key, size = _key(stored, format), exporter.size(stored)
    with (
        showing(progress) as show,
        open_output(folder, key, expected_bytes=size, overwrite=overwrite, resume=resume) as target,
    ):
        written = exporter.write(stored, target, show or (lambda what, done, total: None))
        copy_rest(stored.source.folder, folder)
        target.finish(written.config, _manifest(stored, format))
    return Exported(str(folder), format, sum((folder / name).stat().st_size for name in written.files))


def exporter_of(asked: str) -> Exporter:
    """The exporter called `asked`, with its parameter after a colon. Raises `RecipeError` with near matches."""
    name, _, parameter = asked.partition(":")
    return FORMATS[name](parameter)


def open_stored(checkpoint: str | Path, trust_remote_code: bool = False) -> StoredModel:
    """Open a finished fracbit checkpoint; no tensor is read. Raises `FormatError` for any other model."""
    source = open_checkpoint(checkpoint, trust_remote_code)
    quantization = source.config.get("quantization_config") or {}
    if quantization.get("quant_method") != QUANT_METHOD:
        raise FormatError(
            f"{source.name} is not a fracbit checkpoint; quantize it first with `fracbit quantize`"
        )
    config = model_config(source, trust_remote_code)
    del config.quantization_config
    model = skeleton(config, trust_remote_code=trust_remote_code)
    return StoredModel(source, model, read_layers(quantization))


def check_layers(stored: StoredModel, exporter: Exporter, asked: str) -> None:
    """Raise `FormatError` naming the layers that the format cannot hold, by reason."""
    faults: dict[str, list[str]] = {}
    for name, layer in stored.layers.items():
        fault = exporter.fault(layer)
        if fault:
            faults.setdefault(fault, []).append(name)
    if faults:
        reasons = [f"{_some(names)}: {fault}" for fault, names in faults.items()]
        raise FormatError(
            f"format {asked} cannot hold every layer of {stored.source.name}. {'. '.join(reasons)}"
        )


def _parts(stored: StoredLayer) -> Sequence[str]:
    return tuple(part_shapes(stored.scheme, stored.shape, stored.outliers))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _key(stored: StoredModel, asked: str) -> str:
    """16 hex digits that name an export; another checkpoint, format or program version cannot resume it."""
    headers = {name: (info.dtype, info.shape, info.file) for name, info in stored.source.tensors.items()}
    facts = [__version__, asked, stored.source.config, headers, _manifest_of(stored)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _manifest_of(stored: StoredModel) -> dict[str, Any]:
    path = stored.source.folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except ValueError as error:
        raise FormatError(f"{path} cannot be read: {error}") from error


def _manifest(stored: StoredModel, asked: str) -> dict[str, Any]:
    """Where the export comes from: the recipe and source of the checkpoint, and the format."""
    old = _manifest_of(stored)
    origin = ("recipe", "recipe_key", "source", "texts", "seed")
    kept: dict[str, Any] = {name: old[name] for name in origin if name in old}
    return {"fracbit": __version__, "exported": asked, **kept, "layers": {}}
