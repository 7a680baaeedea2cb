"""A copy of a checkpoint in which some tensors have other values: every other byte is as it was.

A new value has the type and the shape of the old one, so that its bytes take the same place in the file: headers, order and
size stay. Blocks that are finished wait in the journal, and files are written when all are.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fracbit.checkpoint.folder import JOURNAL, MANIFEST
from fracbit.checkpoint.output import CODE, TEMPORARY, Output, copy_file
from fracbit.checkpoint.source import (
    PICKLES,
    TYPE_NAMES,
    Source,
    content,
    read_headers,
    stored_span,
    tensor_pieces,
)
from fracbit.errors import FormatError
from fracbit.records.run import ShardRecord, StoredTensor

BLOCKS = "blocks"
NOT_COPIED = (
    ".*", f"*{TEMPORARY}", MANIFEST, "config.json", "proof.json", "*.safetensors", "*.gguf", "*.h5", "*.msgpack", *PICKLES
)  # fmt: skip
"""config.json is written last; what proves or lists the old bytes, and weights that nobody reads, are left out."""
FORGOTTEN = ("checkpoint", "files", "tensors", "requantized", "divergence")
"""What the manifest of a checkpoint says that does not hold for a copy with other values."""


def finished_blocks(target: Output) -> Output:
    """Where the new tensors of finished blocks wait: an output inside the journal."""
    inside = Output(target.folder / JOURNAL / BLOCKS)
    (inside.folder / JOURNAL).mkdir(parents=True, exist_ok=True)
    return inside


def write_patched(
    source: Source, changed: Mapping[str, Tensor], target: Output, facts: Mapping[str, Any], *, code: bool
) -> int:
    """Finish `target` as a copy of `source` with `changed` tensors, by their names on the disk. Returns the bytes of weights.

    `facts`: what the manifest says of the change; `code`: the model's own code is copied too. Raises `FormatError` where a
    tensor would not fit its place.
    """
    for name, tensor in changed.items():
        info = source.on_disk[name]
        if info.start is not None or (TYPE_NAMES[tensor.dtype], tuple(tensor.shape)) != (
            info.dtype,
            info.shape,
        ):
            raise FormatError(
                f"{name} is {info.dtype} {list(info.shape)} in {source.name}, and its new value is "
                f"{TYPE_NAMES[tensor.dtype]} {list(tensor.shape)}"
            )
    files = sorted({info.file for info in source.on_disk.values()})
    for file in files:
        some = {name: tensor for name, tensor in changed.items() if source.on_disk[name].file == file}
        target.write_file(file, partial(_patch, source, file, some))
    left = NOT_COPIED if code else (*NOT_COPIED, CODE)
    for path in sorted(source.folder.iterdir()):
        if path.is_file() and not any(path.match(pattern) for pattern in left):
            copy_file(path, target.folder / path.name)
    config = (source.folder / "config.json").read_bytes().decode("utf-8")
    old = _manifest(source)
    texts = [*old.get("texts", ()), *facts.get("texts", ())]  # all that the numbers have seen
    if "improved" in old:
        facts = {**facts, "improved": {**facts["improved"], "before": old["improved"]}}
    target.finish(config, {**old, **facts, "texts": texts})
    return sum((target.folder / file).stat().st_size for file in files)


def _patch(source: Source, file: str, changed: Mapping[str, Tensor], path: Path) -> ShardRecord:
    """Copy a weight file to `path` with other bytes in the places of some tensors."""
    shutil.copyfile(source.folder / file, path)
    with path.open("r+b") as opened:
        for name, tensor in changed.items():
            opened.seek(stored_span(source, name)[0])
            opened.write(content(tensor))
    plain = Source(source.name, path.parent, {}, read_headers([path]))
    stored = {
        name: StoredTensor(info.dtype, info.shape, _hash(plain, name)) for name, info in plain.tensors.items()
    }
    return ShardRecord(stored=stored)


def _hash(source: Source, name: str) -> str:
    digest = hashlib.sha256()
    for piece in tensor_pieces(source, name):
        digest.update(piece)
    return digest.hexdigest()


def _manifest(source: Source) -> dict[str, Any]:
    """What a manifest beside the source says that still holds: of an export, its format and where it comes from."""
    path = source.folder / MANIFEST
    if not path.is_file():
        return {"layers": {}}
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} cannot be read: {error}") from error
    return {**{name: value for name, value in old.items() if name not in FORGOTTEN}, "layers": {}}
