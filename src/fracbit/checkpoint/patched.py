"""A copy of a checkpoint in which some tensors get other values: every other byte is as it was.

    weight files -> copies in the journal -> new values in their places, step by step -> the copies move to the output

A new value has the type and the shape of the old one, so that its bytes take the same place in the file: headers, order and
size stay. A step is done when its record stands in the journal; one that was cut off is written again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from fracbit.checkpoint.folder import JOURNAL
from fracbit.checkpoint.formats.gguf_record import lone_file, refill
from fracbit.checkpoint.output import (
    Output,
    copy_file,
    copy_rest,
    file_hash,
    write_json,
)
from fracbit.checkpoint.place import GGUF
from fracbit.checkpoint.read_manifest import beside, manifest_of
from fracbit.checkpoint.source import (
    Source,
    TensorInfo,
    content,
    read_headers,
    stored_span,
    tensor_pieces,
)
from fracbit.errors import FormatError
from fracbit.records.files import read_json
from fracbit.records.run import ShardRecord, StoredTensor

FORGOTTEN = ("checkpoint", "files", "tensors", "requantized", "divergence")
"""What the manifest of a checkpoint says that does not hold for a copy with other values."""
ALSO_COPIED = ("README.md", "*.index.json")
"""Files beside the weights that hold for a copy, and not for a checkpoint of another format."""


@dataclass(frozen=True, eq=False)
class PatchedCopy:
    """Copies of the weight files of `source`, in the journal of `target` until they are whole."""

    source: Source
    target: Output

    @cached_property
    def now(self) -> Source:
        """The source with the values that its tensors have by now."""
        return replace(
            self.source,
            tensors=self._moved(self.source.tensors),
            stored=self._moved(self.source.on_disk),
        )

    def record(self, step: str) -> ShardRecord | None:
        """What was noted when a step was done; None where it still has to be. Raises `FormatError`."""
        path = self._record(step)
        if not path.is_file():
            return None
        try:
            return ShardRecord.from_json(read_json(path))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{path} cannot be read ({error}); start again with --overwrite") from error

    def write(self, step: str, changed: Mapping[str, Tensor], record: ShardRecord) -> None:
        """Give tensors new values, by their names on the disk, and then note the step.

        Raises `FormatError` where one would not fit its place.
        """
        for name, tensor in changed.items():
            info = self.now.on_disk[name]
            if (info.kind, info.shape) != (tensor.dtype, tuple(tensor.shape)):
                raise FormatError(
                    f"{name} is {info.dtype} {list(info.shape)} in {self.source.name}, and its new value is {tensor.dtype} "
                    f"{list(tensor.shape)}"
                )
            start, _ = stored_span(self.now, name)
            with Path(info.file).open("r+b") as file:
                file.seek(start)
                file.write(content(tensor.contiguous()))
                file.flush()
                os.fsync(file.fileno())
        write_json(self._record(step), record.to_json())

    def finish(self, facts: Mapping[str, Any], *, code: bool, file: Path | None = None) -> int:
        """Give the copies their places, with all else that lies beside the source. Returns the bytes of weights.

        `facts`: what the manifest says of the change; `code`: the model's own code is copied too. `file`: the output is
        this one file, and its manifest lies beside it.
        """
        manifest, names = self._manifest(facts), self._files()
        for name in names:
            if self.target.record(name) is None:
                copy = self._copy(name)
                self.target.take_file(name, copy, _whole(copy, manifest))
        size = sum((self.target.folder / name).stat().st_size for name in names)
        if file is not None:
            whole = {"files": {file.name: file_hash(self.target.folder / names[0])}}
            write_json(beside(file), {**manifest, **whole})
            self.target.move_out(names[0], file)
            return size
        home, config = self.home, self.home / "config.json"
        copy_rest(home, self.target.folder, code=code)
        for path in (path for pattern in ALSO_COPIED for path in home.glob(pattern)):
            copy_file(path, self.target.folder / path.name)
        text = config if config.is_file() else self.source.folder / "config.json"
        self.target.finish(text.read_bytes().decode("utf-8"), manifest)
        return size

    @property
    def home(self) -> Path:
        """The folder in which the weight files of the source lie."""
        file = lone_file(self.source)
        return self.source.folder if file is None else file.parent

    def _files(self) -> list[str]:
        """The names of the weight files."""
        return sorted({Path(info.file).name for info in self.source.on_disk.values()})

    def _moved(self, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        return {
            name: replace(info, file=str(self._copy(Path(info.file).name))) for name, info in tensors.items()
        }

    def _copy(self, name: str) -> Path:
        """Where the copy of a file is: in the journal, or in its place already."""
        place = self.target.folder / name
        return (place if place.is_file() else self.target.folder / JOURNAL / name).absolute()

    def _record(self, step: str) -> Path:
        return self.target.folder / JOURNAL / f"{step}.json"

    def begin(self) -> None:
        """Copy the files that are not copied yet."""
        for name in self._files():
            copy = self._copy(name)
            if not copy.is_file():
                copy_file(self.home / name, copy)

    def _manifest(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """What is said of the copy: of an export that was improved, also its format and where it comes from."""
        said = manifest_of(self.source)
        old = {name: value for name, value in said.items() if name not in FORGOTTEN}
        texts = [*old.get("texts", ()), *facts.get("texts", ())]  # all that the numbers have seen
        if "improved" in old:
            facts = {**facts, "improved": {**facts["improved"], "before": old["improved"]}}
        return {**old, **facts, "layers": {}, "texts": texts}


def patched_copy(source: Source, target: Output) -> PatchedCopy:
    """Copies of the weight files of `source` for `target`, begun or gone on with."""
    found = PatchedCopy(source, target)
    found.begin()
    return found


def _whole(copy: Path, manifest: Mapping[str, Any]) -> ShardRecord:
    """The record of a copy that is whole. A GGUF file that says of its own making what no longer holds says less."""
    if copy.suffix == GGUF:
        refill(copy, {name: value for name, value in manifest.items() if name not in ("improved", "texts")})
        return ShardRecord()
    plain = Source(copy.name, copy.parent, {}, read_headers([copy]))
    stored = {
        name: StoredTensor(info.dtype, info.shape, _hash(plain, name)) for name, info in plain.tensors.items()
    }
    return ShardRecord(stored=stored)


def _hash(source: Source, name: str) -> str:
    digest = hashlib.sha256()
    for piece in tensor_pieces(source, name):
        digest.update(piece)
    return digest.hexdigest()
