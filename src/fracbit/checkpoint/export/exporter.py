"""The protocol of export formats, and the export of a fracbit checkpoint to a folder.

    checkpoint -> files + skeleton -> can the format hold every layer? -> its shards -> other files, manifest, config.json
                                      no: an error, or with requantize the nearest form that it can hold

The folder is written like a checkpoint (checkpoint/output.py): at any moment it is absent, resumable or complete.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from torch import Tensor
from transformers import PreTrainedModel

from fracbit.checkpoint.export.again import requantized
from fracbit.checkpoint.export.old_keys import with_old_keys
from fracbit.checkpoint.export.one_file import (
    FORMATS_OF,
    check_ending,
    check_file,
    is_one_file,
    made_record,
    partial_of,
)
from fracbit.checkpoint.folder import check_output
from fracbit.checkpoint.format import (
    StoredLayer,
    own_quantization,
    packed_layer,
    read_layers,
    tensor_name,
)
from fracbit.checkpoint.opened import model_config, open_checkpoint
from fracbit.checkpoint.output import Output, copy_rest, open_output
from fracbit.checkpoint.read_manifest import manifest_of
from fracbit.checkpoint.shards import check_apart
from fracbit.checkpoint.source import Source, read_tensor
from fracbit.errors import FormatError, OutputError
from fracbit.models.skeleton import skeleton
from fracbit.numerics.packed import PackedTensor, part_shapes
from fracbit.records import tables
from fracbit.records.files import named_path
from fracbit.records.grouped import some_of
from fracbit.records.progress import Progress, Shown, phase, showing, silent
from fracbit.records.run import LayerRecord, ShardRecord
from fracbit.records.scheme import Scheme
from fracbit.records.tables import Table
from fracbit.records.version import __version__


@dataclass(frozen=True, eq=False)
class StoredModel:
    """A fracbit checkpoint on disk, read one layer at a time, and the skeleton of its model, mixtures split into linears.

    `disk`: how each layer is stored. `layers`: how each is to be exported; where the two differ it is rounded again, and a
    layer that only `disk` has is exported as floats.
    """

    source: Source
    model: PreTrainedModel
    disk: Mapping[str, StoredLayer]
    layers: Mapping[str, StoredLayer]

    def packed(self, layer: str) -> PackedTensor:
        """The packed weight of a quantized layer as it is stored. Raises `FormatError` or `SourceError`."""
        stored = self.disk[layer]
        names = [tensor_name(layer, part) for part in _parts(stored)]
        held = {name: read_tensor(self.source, name) for name in names if name in self.source.tensors}
        return packed_layer(layer, stored, held)

    def exported(self, layer: str) -> tuple[PackedTensor, LayerRecord | None]:
        """The packed weight of a layer in its exported form, and what rounding it again lost, if it was."""
        packed = self.packed(layer)
        if self.layers[layer] == self.disk[layer]:
            return packed, None
        return requantized(packed, self.layers[layer].scheme)

    def tensor(self, name: str) -> Tensor:
        """A tensor that stayed float, as it is stored."""
        return read_tensor(self.source, name)

    @property
    def changed(self) -> bool:
        """Whether a layer is exported in another form than it is stored in."""
        return self.layers != self.disk

    @cached_property
    def rest(self) -> tuple[str, ...]:
        """The stored tensors that belong to no quantized layer: norms, biases, what was kept float."""
        parts = {tensor_name(name, part) for name, stored in self.disk.items() for part in _parts(stored)}
        return tuple(name for name in self.source.tensors if name not in parts)


@dataclass(frozen=True)
class Nearest:
    """The nearest form to a layer's own that a format can hold.

    `scheme`: how its weight would be stored, "float" for plain floats, None where nothing but the layer's own would do.
    `reason`: why the layer's own form will not do; "" where it will.
    """

    scheme: Scheme | Literal["float"] | None
    reason: str = ""


@dataclass(frozen=True)
class Written:
    """What an exporter wrote: its weight files by name, what config.json is to hold, and what programs make of it (`notes`)."""

    files: tuple[str, ...]
    config: Mapping[str, Any]
    notes: tuple[str, ...] = ()


class Exporter(Protocol):
    """A format with its parameter, if it has one."""

    def check(self, model: PreTrainedModel, folder: Path) -> None:
        """Raise `FormatError` for a model, with its tokenizer in `folder`, that cannot have the format whatever its layers."""
        ...

    def nearest(self, layer: StoredLayer) -> Nearest:
        """The nearest form of a layer that the format can hold."""
        ...

    def beside(self, model: PreTrainedModel, folder: Path) -> int:
        """Bytes at most that its weight files take beyond those of a fracbit checkpoint, for a model with its tokenizer."""
        ...

    def size(self, stored: StoredModel) -> int:
        """Bytes that `write` will take on the disk, about."""
        ...

    def write(self, stored: StoredModel, target: Output, show: Progress) -> Written:
        """Write the weights, except shards that `target` has a record of."""
        ...


FORMATS: Table[Callable[[str], Exporter]] = tables.FORMATS
Measure: TypeAlias = Callable[[StoredModel], Mapping[str, Any]]
"""How far the predictions of a model as it is exported are from those of its checkpoint, as JSON values."""


@dataclass(frozen=True)
class Exported:
    """What an export made: the folder or the one file, its format, and the bytes of its weight files.

    `requantized`: the layers that were rounded again, with what that lost; `floats`: the layers that became floats.
    `divergence`: how far the predictions are from the checkpoint's for both, with its text and protocol; None: not measured.
    `warnings`: what a program that reads the format makes of it.
    """

    output: str
    format: str
    bytes: int
    requantized: Mapping[str, LayerRecord] = field(default_factory=dict)
    floats: tuple[str, ...] = ()
    divergence: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What is not as it was stored, and what rounding again cost."""
        return (*self.warnings, *self._weights(), *self._predictions())

    def _predictions(self) -> Iterator[str]:
        if self.divergence is not None:
            yield (
                f"predictions of the exported weights are {self.divergence['kl']:.5f} nats per token (mean KL) from the "
                f"checkpoint's, on {self.divergence['text']} ({self.divergence['protocol']['text']})"
            )
            yield from self.divergence["notes"]

    def _weights(self) -> tuple[str, ...]:
        floats = (f"{some_of(self.floats)} became floats",) if self.floats else ()
        if not self.requantized:
            return floats
        worst = max(self.requantized, key=lambda name: self.requantized[name].loss)
        lost = self.requantized[worst].loss ** 0.5
        mean = sum(layer.loss for layer in self.requantized.values()) / len(self.requantized)
        return (
            *floats,
            f"{len(self.requantized)} layers were rounded again: their weights moved by {mean**0.5:.2%} (relative error, mean "
            f"square), those of {worst} by {lost:.2%}",
        )


@dataclass(frozen=True, eq=False)
class ExportTask:
    """An export of `stored`, whose layers have the forms that the format `asked` holds; it is made in `place`.

    `passing`: the checkpoint goes when the export is there.
    """

    exporter: Exporter
    asked: str
    stored: StoredModel
    output: Path
    place: Path
    passing: bool = False

    @cached_property
    def key(self) -> str:
        """16 hex digits that name the export; another checkpoint, format or program version cannot resume it."""
        source = self.stored.source
        headers = {name: (info.dtype, info.shape, info.file) for name, info in source.tensors.items()}
        schemes = {name: str(layer.scheme) for name, layer in self.stored.layers.items()}
        facts = [__version__, self.asked, source.config, headers, manifest_of(source), schemes]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def export(
    checkpoint: str | Path,
    output: str | Path,
    format: str,  # noqa: A002
    *,
    requantize: bool = False,
    like: Mapping[str, StoredLayer] | None = None,
    measure: Measure | None = None,
    work: Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    trust_remote_code: bool = False,
    progress: Shown = "auto",
) -> Exported:
    """Write a fracbit checkpoint (a folder or hub id) into the folder `output` in another format.

    An `output` that ends in .gguf is that one file, which is absent or complete at any moment. It is made in `output`.partial,
    or in `work` by a run that removes the checkpoint afterwards.
    `format` is a name of `FORMATS`, with a parameter after a colon if the format has one: `float`, `float:fp32`. Nothing is
    rounded, unless `requantize` allows it: then layers that the format cannot hold get the nearest scheme that it can. `like`:
    the forms that another export gave the layers; they are rounded as they were there. `measure` is asked for the divergence
    before anything is written.
    Raises `RecipeError` for an unknown format, `FormatError` for a layer that it cannot hold, `SourceError`, `OutputError`.
    """
    exporter, output = exporter_of(format), named_path(output, OutputError)
    check_ending(output, format, f"export {FORMATS_OF.get(output.suffix)}")
    stored = open_stored(checkpoint, trust_remote_code)
    stored = stored if like is None else replace(stored, layers=like)
    one, there = is_one_file(output), output.exists()
    if one:
        check_file(output, overwrite=overwrite, resume=resume)
    check_apart(output, stored.source.folder)
    exporter.check(stored.model, stored.source.folder)
    stored = fitted(stored, exporter, format, requantize=requantize)
    place = (work or partial_of(output)) if one else output
    task = ExportTask(exporter, format, stored, output=output, place=place, passing=work is not None)
    if resume and (before := made_record(output) or {}).get("run") == task.key:
        if one:
            shutil.rmtree(place, ignore_errors=True)  # the run was killed between its last two steps
        again = {name: LayerRecord.from_json(layer) for name, layer in before["requantized"].items()}
        held = [output] if one else [output / name for name in sorted(_weight_files(before))]
        return _exported(task, held, again, divergence=before.get("divergence"))
    check_output(place, task.key, overwrite, resume)
    divergence = None if measure is None else measure(stored)
    with (
        showing(progress) as show,
        open_output(
            place, task.key, expected_bytes=exporter.size(stored), overwrite=overwrite, resume=resume
        ) as target,
    ):
        said = partial(_manifest, task, divergence=divergence)
        target = replace(target, inside=said) if one else target
        written = exporter.write(stored, target, phase(show or silent, "exporting"))
        records = [target.record(name) or ShardRecord() for name in written.files]
        again = {name: layer for record in records for name, layer in record.layers.items()}
        if one:
            check_file(output, overwrite=overwrite or there, resume=False)  # it may have come meanwhile
            target.move_out(written.files[0], output)
        else:
            _finish_folder(task, target, written, said(again), code=trust_remote_code)
    files = [output] if one else [output / name for name in written.files]
    made = _exported(task, files, again, divergence=divergence)
    return replace(made, warnings=written.notes)


def _finish_folder(
    task: ExportTask, target: Output, written: Written, manifest: Mapping[str, Any], *, code: bool
) -> None:
    """Write what lies beside the weights; `code`: the model's own code too."""
    copy_rest(task.stored.source.folder, target.folder, code=code)
    config = with_old_keys(written.config)
    if not code:
        config.pop("auto_map", None)  # it names code that is not here
    target.finish(config, manifest)


def _weight_files(manifest: Mapping[str, Any]) -> set[str]:
    return {str(tensor["file"]) for tensor in manifest["tensors"].values()}


def _exported(
    task: ExportTask,
    files: Sequence[Path],
    again: Mapping[str, LayerRecord],
    *,
    divergence: Mapping[str, Any] | None,
) -> Exported:
    size = sum(file.stat().st_size for file in files)
    floats = tuple(name for name in task.stored.disk if name not in task.stored.layers)
    return Exported(
        str(task.output), task.asked, size, requantized=again, floats=floats, divergence=divergence
    )


def exporter_of(asked: str) -> Exporter:
    """The exporter called `asked`, with its parameter after a colon. Raises `RecipeError` with near matches."""
    name, _, parameter = asked.partition(":")
    return FORMATS[name](parameter)


def open_stored(checkpoint: str | Path, trust_remote_code: bool = False) -> StoredModel:
    """Open a finished fracbit checkpoint; no tensor is read. Raises `FormatError` for any other model."""
    source = open_checkpoint(checkpoint, trust_remote_code)
    quantization = own_quantization(source.config)
    if quantization is None:
        raise FormatError(
            f"{source.name} is not a fracbit checkpoint; quantize it first with `fracbit quantize`"
        )
    config = model_config(source, trust_remote_code)
    del config.quantization_config
    model = skeleton(config, trust_remote_code=trust_remote_code)
    layers = read_layers(quantization)
    return StoredModel(source, model, layers, layers)


def fitted(stored: StoredModel, exporter: Exporter, asked: str, *, requantize: bool = False) -> StoredModel:
    """The model with every layer in a form that the format can hold.

    Raises `FormatError` naming the layers that it cannot hold, by reason, unless `requantize` allows their nearest forms.
    """
    faults: dict[Nearest, list[str]] = {}
    layers: dict[str, StoredLayer] = {}
    for name, layer in stored.layers.items():
        nearest = exporter.nearest(layer)
        if nearest.reason:
            faults.setdefault(nearest, []).append(name)
        if isinstance(nearest.scheme, Scheme):
            layers[name] = replace(layer, scheme=nearest.scheme, outliers=0) if nearest.reason else layer
    refused = (
        faults if not requantize else {near: names for near, names in faults.items() if near.scheme is None}
    )
    if not refused:
        return replace(stored, layers=layers)
    does = {
        "makes them floats" if near.scheme == "float" else "rounds them again"
        for near in refused
        if near.scheme
    }
    words = " or ".join(sorted(does, reverse=True))
    remedy = f". requantize=True (--requantize) {words}, and says what it costs" if does else ""
    reasons = [f"{some_of(names)}: {_explained(near)}" for near, names in refused.items()]
    raise FormatError(
        f"format {asked} cannot hold every layer of {stored.source.name}. {'. '.join(reasons)}{remedy}"
    )


def _explained(nearest: Nearest) -> str:
    if nearest.scheme is None:
        return nearest.reason
    return f"{nearest.reason}; the nearest that it can hold is {nearest.scheme}"


def _parts(stored: StoredLayer) -> Sequence[str]:
    return tuple(part_shapes(stored.scheme, stored.shape, stored.outliers))


def _manifest(
    task: ExportTask, again: Mapping[str, LayerRecord], *, divergence: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Where the export comes from: the recipe and source of the checkpoint, the format, and what rounding again cost.

    `run`: the key of the export; `checkpoint_run`: that of the checkpoint, which is named where it stays.
    """
    old = manifest_of(task.stored.source)
    origin = ("recipe", "recipe_key", "source", "texts", "seed", "layers")
    kept: dict[str, Any] = {name: old[name] for name in origin if name in old}
    checkpoint = {} if task.passing else {"checkpoint": str(task.stored.source.folder.resolve())}
    return {
        "fracbit": __version__, "exported": task.asked, "run": task.key, "checkpoint_run": old.get("run"), **checkpoint,
        "layers": {}, **kept, "requantized": {name: layer.to_json() for name, layer in again.items()},
        **({} if divergence is None else {"divergence": divergence}),
    }  # fmt: skip
