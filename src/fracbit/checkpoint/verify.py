"""`fracbit verify`: whether the bytes of a checkpoint are those that were written.

A fracbit checkpoint is compared with the hashes in its manifest, a GGUF file of fracbit that stands by itself with the hash in
its header. A float model has none: its index must name the tensors that its files hold, and all of them must be finite.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from fracbit.checkpoint.complete import check_headers, check_listed, listed_tensors
from fracbit.checkpoint.folder import MANIFEST
from fracbit.checkpoint.format import StoredLayer, own_quantization, packed_layer, read_layers
from fracbit.checkpoint.formats.gguf_record import lone_file, unchanged
from fracbit.checkpoint.opened import open_checkpoint
from fracbit.checkpoint.output import WRITTEN, file_hash
from fracbit.checkpoint.read_manifest import read_manifest
from fracbit.checkpoint.source import (
    FLOATS,
    INDEX,
    SINGLE,
    Source,
    read_metadata,
    read_model_file,
    read_tensor,
    tensor_pieces,
)
from fracbit.errors import FormatError
from fracbit.numerics.packed import check_values
from fracbit.records.progress import Shown, showing
from fracbit.records.run import StoredTensor

THREADS = 4  # hashing and reading release Python's lock


@dataclass(frozen=True)
class Verified:
    """What was checked, and `faults`: what is wrong, a line each.

    `tensors` in `files` weight and other files, `bytes` of the tensors. `hashed`: the manifest has hashes, so every changed bit
    was found; without them only what no program writes.
    """

    folder: str
    files: int
    tensors: int
    bytes: int
    hashed: bool
    faults: tuple[str, ...]
    seconds: float


def verify(model: str | Path, *, revision: str | None = None, progress: Shown = "auto") -> Verified:
    """Read every file of a checkpoint, a folder or a hub id, and compare it with what its manifest, index and headers say.

    Raises `SourceError` or `FormatError` where it cannot even be opened: an unfinished output, a file that is cut.
    """
    source = open_checkpoint(model, revision=revision)
    own = Path(model)  # a folder with a GGUF file: the source is then a folder that was made of it
    return verified(replace(source, folder=own) if own.is_dir() else source, progress)


def verified(source: Source, progress: Shown = None) -> Verified:
    """`verify`, of a checkpoint that is open already."""
    started = time.perf_counter()
    listed, files = listed_tensors(source.folder), _listed_files(source.folder)
    weights = {Path(info.file).name for info in source.on_disk.values()}
    lone = lone_file(source)
    kept = None if lone is None or files else _kept(lone)
    whole = (
        kept is not None or weights <= files.keys()
    )  # files that are hashed as a whole, not tensor by tensor
    if listed or whole:  # compared as it lies there, not decoded
        source = replace(source, tensors=source.on_disk, decodings={}, stored={})
    faults = [*_structure(source), *_files(source.folder, files)]
    faults += [f"{lone} has changed since it was written"] if kept is False else []
    faults += [] if whole else _contents(source, listed, progress)
    faults += [] if listed or whole else _values(source)
    return Verified(
        str(source.folder if lone is None or files else lone),
        files=len(weights | files.keys()),
        tensors=len(source.tensors),
        bytes=source.bytes,
        hashed=bool(listed) or whole,
        faults=tuple(faults),
        seconds=round(time.perf_counter() - started, 3),
    )


def _contents(source: Source, listed: Mapping[str, StoredTensor], progress: Shown) -> Iterator[str]:
    """What is wrong with the bytes of the tensors, all of which are read."""
    hashes = {name: tensor.sha256 for name, tensor in listed.items()}
    done = 0
    with showing(progress) as show, ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda name: _tensor(source, name, hashes.get(name)), source.tensors)
        for (name, info), fault in zip(source.tensors.items(), found, strict=True):
            done += info.bytes
            if show is not None:
                show(f"verifying: {name}", done, source.bytes)
            if fault:
                yield fault


def _layers(source: Source) -> Mapping[str, StoredLayer]:
    """The quantized layers; none in a float model. Raises `FormatError`."""
    quantization = own_quantization(source.config)
    return {} if quantization is None else read_layers(quantization)


def _structure(source: Source) -> Iterator[str]:
    """What headers alone show: tensors that are missing, foreign or of another shape, and an index that does not fit."""
    name = str(source.folder)
    yield from _fault(partial(check_listed, name, listed_tensors(source.folder), source.tensors))
    yield from _fault(partial(check_headers, name, _layers(source), source.tensors))
    if listed_tensors(source.folder) and own_quantization(source.config) and read_metadata(source) != WRITTEN:
        yield f"headers of the weight files say {read_metadata(source)}, and fracbit writes {WRITTEN}"
    path = source.folder / INDEX
    if not path.is_file() or any(info.file == SINGLE for info in source.tensors.values()):
        return
    named = read_model_file(path, "the index names the shard of every tensor")["weight_map"]
    stored = source.on_disk
    for tensor in sorted(named.keys() | stored.keys()):
        held = stored[tensor].file if tensor in stored else "no file"
        if named.get(tensor) != held:
            yield f"{tensor} is in {held}, and {INDEX} says {named.get(tensor, 'nothing of it')}"


def _fault(check: Callable[[], None]) -> Iterator[str]:
    try:
        check()
    except FormatError as error:
        yield str(error)


def _files(folder: Path, hashes: Mapping[str, str]) -> Iterator[str]:
    """Files beside the weights that are missing or changed."""
    for name, wanted in hashes.items():
        path = folder / name
        if Path(name).name != name:
            yield f"{name} is listed, and lies outside of the folder"
        elif not path.is_file():
            yield f"{name} is missing"
        elif file_hash(path) != wanted:
            yield f"{name} has changed since it was written"


def _tensor(source: Source, name: str, wanted: str | None) -> str:
    """What is wrong with a tensor: its hash where one is known, or a value that is not finite; "" for nothing."""
    info = source.tensors[name]
    digest, finite, dtype = hashlib.sha256(), True, FLOATS.get(info.dtype)
    for piece in tensor_pieces(source, name):
        if wanted is not None:
            digest.update(piece)
        elif dtype is not None:
            finite = finite and bool(torch.isfinite(torch.frombuffer(piece, dtype=dtype)).all())
    if wanted is not None and digest.hexdigest() != wanted:
        return f"{name} in {info.file} has changed since it was written"
    return "" if finite else f"{name} in {info.file} holds a value that is not finite"


def _values(source: Source) -> Iterator[str]:
    """Packed layers whose values no quantizer makes."""
    for name, stored in _layers(source).items():
        yield from _fault(partial(_check_layer, source, name, stored))


def _check_layer(source: Source, name: str, stored: StoredLayer) -> None:
    mine = [tensor for tensor in source.tensors if tensor.rpartition(".")[0] == name]
    try:
        check_values(packed_layer(name, stored, {tensor: read_tensor(source, tensor) for tensor in mine}))
    except FormatError as error:
        raise FormatError(f"layer {name}: {error}") from error


def _listed_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file beside the weights, as the manifest lists them. Raises `FormatError`."""
    files = read_manifest(folder).get("files", {})
    if not isinstance(files, dict):
        raise FormatError(f"{folder / MANIFEST} has files = {files!s:.60}, expected names with their hashes")
    return {str(name): str(value) for name, value in files.items()}


def _kept(file: Path) -> bool | None:
    """Whether one file has the hash that it names itself, or that its manifest beside it does; None where none is named."""
    own = unchanged(file)  # first: a changed byte may lie in what the file says of itself
    if own is not None:
        return own
    listed = read_manifest(file).get("files", {}).get(file.name)
    return None if listed is None else listed == file_hash(file)
