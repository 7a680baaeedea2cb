"""A model's files, read lazily: headers first, then one tensor at a time. Nothing is ever unpickled.

A source is a folder or a hub id (fetched by huggingface_hub into its cache). Opening it reads the header of every shard, so
that a truncated or corrupt shard is found before any work starts. What other programs have quantized is decoded tensor by
tensor while it is read (formats/): `Source.tensors` holds the floats, whatever lies on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fracbit.checkpoint.formats.decoding import Decoding, Part, cut, filled
from fracbit.checkpoint.place import find_place
from fracbit.checkpoint.remote import Remote, stand_in
from fracbit.errors import SourceError, blamed_on
from fracbit.records.files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EXLLAMA = "output*.safetensors"
"""Files of exllamav2, which leaves the index of the float model beside them."""
PIECE = 4 << 20  # bytes that are read at a time to hash a tensor
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
"""Types as the header of a safetensors file names them."""
_DTYPES = {name: dtype for dtype, name in TYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """The file of a tensor, its type and its shape, read from the header. `start`: the byte of a file that is no safetensors
    file where its data begins.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int | None = None

    @property
    def kind(self) -> torch.dtype:
        """The type in which it is read: blocks of other formats are bytes."""
        return _DTYPES.get(self.dtype, torch.uint8)

    @property
    def bytes(self) -> int:
        """Bytes of the tensor's data."""
        return torch.Size(self.shape).numel() * self.kind.itemsize


@dataclass(frozen=True)
class Source:
    """An opened model: `name` as the user gave it, its folder, its config.json and its tensors in file order.

    Of a source that was quantized before, `tensors` are the floats that its codes stand for, and `config` says nothing of it:

    - `decodings`: how these floats are made; `stored`: all tensors by the names and types that they have on the disk.
    - `decoded`: what it was, such as "block fp8, 8 bits"; "" for a float model.
    - `quantization`: what its config said; `notes`: what the user should know.

    `remote`: where the weights are, if they are fetched as they are read.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    decodings: Mapping[str, Decoding] = field(default_factory=dict)
    stored: Mapping[str, TensorInfo] = field(default_factory=dict)
    decoded: str = ""
    quantization: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    remote: Remote | None = field(default=None, compare=False)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.bytes for info in self.tensors.values())

    @property
    def on_disk(self) -> Mapping[str, TensorInfo]:
        """The tensors as they lie on the disk, by the names that they have there."""
        return self.stored or self.tensors


def open_source(
    model: str, revision: str | None = None, trust_remote_code: bool = False, afar: bool = False
) -> Source:
    """Open a folder or a hub id; `afar`: weights that are not here stay where they are, and are fetched as they are read.

    Raises `SourceError` for what is missing, pickled, truncated or corrupt.
    """
    from fracbit.checkpoint.formats.known import decoded
    from fracbit.checkpoint.formats.lora import adapted, base_of, with_adapter
    from fracbit.checkpoint.formats.places import check_names, folder_of, weights_of

    remote = None
    if afar:
        place, remote = stand_in(model, revision, trust_remote_code)
    else:
        place = find_place(model, revision, trust_remote_code)
    folder = folder_of(place, revision, trust_remote_code)
    base = base_of(place)
    if base is not None:
        return adapted(open_source(base, revision, trust_remote_code), model, place=place, folder=folder)
    check_names(folder)
    config = read_config(folder)
    _check_links(folder)
    files = weights_of(folder) or [folder / file for file in _weight_files(folder)]
    return with_adapter(decoded(Source(model, folder, config, read_headers(files), remote=remote)))


def find_folder(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """The local folder of a model; a hub id is fetched, or found in the cache when offline. Raises `SourceError`.

    `bundled` is the model that comes with fracbit, unless a folder of that name is here. A GGUF file, or an adapter without its
    base model, gives a folder of this process with a config and a tokenizer.
    """
    from fracbit.checkpoint.formats.places import folder_of

    return folder_of(find_place(model, revision, trust_remote_code), revision, trust_remote_code)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder. Raises `SourceError` when it is missing or not a JSON object."""
    return read_model_file(
        folder / "config.json", "a model folder holds config.json, safetensors and a tokenizer"
    )


def read_tensor(source: Source, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """One tensor in its own type, or decoded to `dtype`. The file is opened only for it, so that its pages leave the memory."""
    decoding = source.decodings.get(name)
    if decoding is None:
        return read_stored(source, name)
    parts = {role: read_stored(source, part.name) for role, part in decoding.parts.items()}
    with blamed_on(_undecoded(source, name, decoding), SourceError, parsing=True):
        return filled(decoding, parts, dtype or FLOATS[decoding.info.dtype])


def _undecoded(source: Source, name: str, decoding: Decoding) -> str:
    stored = {part.name: source.on_disk[part.name] for part in decoding.parts.values()}
    held = ", ".join(f"{part} {info.dtype} {list(info.shape)}" for part, info in stored.items())
    return f"{source.name}: {name} cannot be decoded from {held}; fetch the files again"


def read_rows(source: Source, name: str, rows: Sequence[slice], axis: int = 0) -> Tensor:
    """These rows (`axis` 0) or columns (1) of a matrix, one after another."""
    decoding = source.decodings.get(name)
    if decoding is None:
        return _stored_rows(source, name, rows, axis)
    if axis == 1:
        whole = read_tensor(source, name)
        return torch.cat([whole[:, some] for some in rows], axis)
    return torch.cat([_decoded_rows(source, name, some) for some in rows])


def _decoded_rows(source: Source, name: str, rows: slice) -> Tensor:
    """Rows of a decoded tensor, from the steps of rows that hold them."""
    decoding = source.decodings[name]
    wide = decoding.widened(rows)
    parts = {role: _read_part(source, part, wide) for role, part in decoding.parts.items()}
    with blamed_on(_undecoded(source, name, decoding), SourceError, parsing=True):
        found = decoding.decode(parts).to(FLOATS[decoding.info.dtype])
    return found[rows.start - wide.start : rows.stop - wide.start]


def _read_part(source: Source, part: Part, rows: slice) -> Tensor:
    """What rows of a decoded tensor need of one of its parts."""
    info = source.on_disk[part.name]
    if not part.rows:
        return read_stored(source, part.name)
    if info.start is not None and part.axis:
        return cut(part, read_stored(source, part.name), rows)
    return _stored_rows(source, part.name, [part.indices(rows, info.shape[part.axis])], part.axis)


def _bring(source: Source, name: str, rows: Sequence[slice] | None = None) -> None:
    """Fetch a stored tensor, or rows of it, where the weights are elsewhere. Raises `SourceError`."""
    if source.remote is None:
        return
    info = source.on_disk[name]
    start, end = stored_span(source, name)
    spans = [(start, end)]
    if rows is not None:
        width = (end - start) // max(info.shape[0], 1)  # bytes of a row
        spans = [(start + some.start * width, start + some.stop * width) for some in rows]
    source.remote.fetch(info.file, spans)


def read_stored(source: Source, name: str) -> Tensor:
    """One tensor as it lies on the disk. Raises `SourceError`."""
    info = source.on_disk[name]
    _bring(source, name)
    try:
        if info.start is not None:
            return _rows_at(source.folder / info.file, info.start, info, [slice(0, info.shape[0])])
        with safe_open(source.folder / info.file, framework="pt") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]
    except (SafetensorError, OSError) as error:
        raise SourceError(f"tensor {name} cannot be read from {info.file}: {error}") from error


def read_several(source: Source, names: Iterable[str]) -> dict[str, Tensor]:
    """Small tensors as they lie on the disk; each file is opened once. Raises `SourceError`."""
    files: dict[str, list[str]] = {}
    for name in names:
        _bring(source, name)
        files.setdefault(source.on_disk[name].file, []).append(name)
    found: dict[str, Tensor] = {}
    for file, some in files.items():
        found |= _tensors_of(source.folder / file, some)
    return found


def _tensors_of(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise SourceError(f"tensor {names[0]} cannot be read from {path.name}: {error}") from error


def read_metadata(source: Source) -> dict[str, str]:
    """What the headers of all files say beside their tensors. Raises `SourceError`."""
    found: dict[str, str] = {}
    for file in dict.fromkeys(info.file for info in source.on_disk.values()):
        found |= _metadata_of(source.folder / file)
    return found


def _metadata_of(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise SourceError(f"the header of {path.name} cannot be read: {error}") from error


def _stored_rows(source: Source, name: str, rows: Sequence[slice], axis: int) -> Tensor:
    """Rows or columns of a tensor as it lies on the disk.

    Rows are read by position: with a mapped file, the system would read much more data around every row.
    """
    info = source.on_disk[name]
    path = source.folder / info.file
    _bring(source, name, rows if axis == 0 else None)
    try:
        if axis == 0 and (info.start is not None or info.dtype in _DTYPES):
            start = _span(path, name, info)[0]
            return _rows_at(path, start, info, rows)
        with safe_open(path, framework="pt") as file:
            matrix = file.get_slice(name)
            return torch.cat([matrix[some] if axis == 0 else matrix[:, some] for some in rows], axis)
    except (SafetensorError, OSError) as error:
        raise SourceError(f"tensor {name} cannot be read from {info.file}: {error}") from error


def _rows_at(path: Path, start: int, info: TensorInfo, rows: Sequence[slice]) -> Tensor:
    """Rows of a matrix that begins at byte `start` of a file."""
    width = info.bytes // info.shape[0]  # bytes of a row
    data = bytearray(width * sum(cut.stop - cut.start for cut in rows))
    view, filled = memoryview(data), 0
    with path.open("rb", buffering=0) as file:
        if sys.platform == "linux":
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for cut in rows:
            file.seek(start + cut.start * width)
            end = filled + (cut.stop - cut.start) * width
            while filled < end:
                count = file.readinto(view[filled:end])
                if not count:
                    raise SourceError(f"shard {path.name} ends inside a tensor; fetch it again: {path}")
                filled += count
    return torch.frombuffer(data, dtype=info.kind).view(-1, *info.shape[1:])  # [rows, in]


def tensor_pieces(source: Source, name: str) -> Iterator[bytearray]:
    """The bytes of a tensor, some megabytes at a time, so that no file stays in memory. Raises `SourceError`."""
    decoding = source.decodings.get(name)
    if decoding is not None:
        for rows in decoding.pieces():
            yield bytearray(content(_decoded_rows(source, name, rows)))
        return
    info = source.on_disk[name]
    path = source.folder / info.file
    _bring(source, name)
    try:
        start, end = _span(path, name, info)
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            left = end - start
            while left:
                piece = bytearray(min(PIECE, left))
                if file.readinto(piece) != len(piece):
                    raise SourceError(f"shard {path.name} ends inside a tensor; fetch it again: {path}")
                left -= len(piece)
                yield piece
    except OSError as error:
        raise SourceError(f"tensor {name} cannot be read from {info.file}: {error}") from error


def stored_span(source: Source, name: str) -> tuple[int, int]:
    """Where the data of a stored tensor begins and ends in its file."""
    info = source.on_disk[name]
    return _span(source.folder / info.file, name, info)


def fingerprint(source: Source) -> list[object]:
    """What tells a source from others, and from itself after a change: headers, settings, sizes and times of its files."""
    headers = [(name, info.dtype, info.shape) for name, info in sorted(source.on_disk.items())]
    files = sorted({info.file for info in source.on_disk.values()})
    states = [(source.folder / file).stat() for file in files]  # a changed source file gives another key
    stamps = [(state.st_size, state.st_mtime_ns) for state in states]
    return [source.config, source.quantization, headers, stamps]


def _span(path: Path, name: str, info: TensorInfo) -> tuple[int, int]:
    """Where the data of a stored tensor begins and ends."""
    if info.start is not None:
        return info.start, info.start + info.bytes
    return _offsets(path, path.stat().st_mtime_ns)[name]


@lru_cache(maxsize=256)
def _offsets(path: Path, changed: int) -> dict[str, tuple[int, int]]:
    """Where each tensor's data begins and ends, from the header of a safetensors file as it was at the time `changed`."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: (8 + size + begin, 8 + size + end) for name, (begin, end) in spans.items()}


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, with its type and shape."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(content(tensor))
    return digest.hexdigest()


def content_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, as they are stored."""
    return hashlib.sha256(content(tensor)).hexdigest()


def content(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row by row."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def combined_hash(hashes: Mapping[str, str]) -> str:
    """One SHA-256 for a set of named tensors, independent of their order and files."""
    lines = "".join(f"{name} {value}\n" for name, value in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _weight_files(folder: Path) -> list[str]:
    """The single file before the index, in transformers' order; exllamav2's before an index, which is not theirs."""
    if (folder / SINGLE).is_file():
        return [SINGLE]
    made = sorted(path.name for path in folder.glob(EXLLAMA))
    if made:
        return made
    if (folder / INDEX).is_file():
        index = read_model_file(folder / INDEX, "the index names the shard of every tensor")
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
            raise SourceError(f"{folder / INDEX} has no weight_map from the names of tensors to their files")
        files = sorted(set(shards.values()))
        outside = [file for file in files if Path(file).name != file]
        if outside:
            raise SourceError(
                f"{folder / INDEX} names {outside[0]!r}; a shard lies beside the index, in the same folder"
            )
        missing = [file for file in files if not (folder / file).is_file()]
        if missing or not files:
            raise SourceError(
                f"{folder / INDEX} names {missing[:3] or 'no shards'}, which the folder does not hold"
            )
        return files
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise SourceError(
            f"{folder} holds only pickled weights ({', '.join(pickles[:3])}), which can run code when they are read; "
            "convert them to safetensors first (on a machine where you trust them)"
        )
    raise SourceError(f"{folder} holds neither {SINGLE} nor {INDEX}")


def _check_links(folder: Path) -> None:
    """Refuse links to files elsewhere: they would be read, and copied into outputs. The hub's cache links to its own blobs."""
    homes = [folder.resolve()]
    if folder.parent.name == "snapshots":
        homes.append((folder.parent.parent / "blobs").resolve())
    for path in sorted(folder.iterdir()):
        where = path.resolve()
        if path.is_symlink() and not any(where.is_relative_to(home) for home in homes):
            raise SourceError(
                f"{path} is a link to {where}, outside of the model's folder; copy the file into the folder"
            )


def read_headers(paths: Iterable[Path]) -> dict[str, TensorInfo]:
    """The tensors of weight files, in file order. Raises `SourceError` for a file that is truncated or corrupt."""
    from fracbit.checkpoint.formats.places import stored_tensors

    tensors: dict[str, TensorInfo] = {}
    for path in paths:
        tensors |= stored_tensors(path) or _header(path)
    return tensors


def _header(path: Path) -> dict[str, TensorInfo]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            return {n: TensorInfo(path.name, s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise SourceError(
            f"shard {path.name} is truncated or corrupt ({error}); fetch it again: {path}"
        ) from error


def read_model_file(path: Path, what: str) -> dict[str, Any]:
    """A JSON object in a file of a model; `what` says what it is for where there is none. Raises `SourceError`."""
    if not path.exists():
        raise SourceError(f"{path.parent} has no {path.name}: {what}")
    return read_json(path, SourceError)
