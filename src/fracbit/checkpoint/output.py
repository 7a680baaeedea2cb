"""The output folder: every file is written under a temporary name, flushed and renamed; config.json comes last.

While a run is unfinished the folder holds `.fracbit/`: the key of the run and one record per finished shard. It shows that the
checkpoint is not complete, and `--resume` continues from the records. Without it the checkpoint is whole. A run that is killed
at any moment leaves an output that is absent, resumable or complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fracbit.checkpoint.folder import JOURNAL, MANIFEST, RUN, check_output, is_unfinished, key_of
from fracbit.checkpoint.lock import holder, only_writer
from fracbit.checkpoint.source import INDEX, PICKLES, TYPE_NAMES, content_hash
from fracbit.errors import FormatError, OutputError
from fracbit.records.files import parse_json
from fracbit.records.run import LayerRecord, ShardRecord, StoredTensor

T = TypeVar("T")
WeightRecord: TypeAlias = Callable[[Mapping[str, LayerRecord]], Mapping[str, Any]]
"""What a weight file that stands by itself says of its making, given the layers that were rounded again."""
TEMPORARY = ".tmp"
"""Ends the name of a file that is being written; a run that was killed may leave one."""
WRITTEN = {"format": "pt"}
"""What the header of a weight file says beside its tensors; transformers asks for it."""
WRITER = "writer.json"
"""Names the process that is writing, or was when it was killed."""
NOT_COPIED = (
    "*.safetensors", INDEX, "config.json", "README.md", ".*", "*.index.json", "*.gguf", "*.h5", "*.msgpack",
    "adapter_config.json", MANIFEST, "proof.json", f"*{TEMPORARY}", *PICKLES,
)  # fmt: skip
"""What belongs to the weights of a folder, or proves or lists their bytes: no copy with other weights has it."""
CODE = "*.py"
SHARD_BYTES = 256 << 20  # of one weight file
SPARE_BYTES = 16 << 20  # for the tokenizer, the card and the file system's own blocks


class Shards(Protocol):
    """Where a run puts its finished shards: a folder (`Output`), or memory (`InMemory`)."""

    @property
    def journal(self) -> Path | None:
        """A folder for files that the run needs until it ends; None: there is none."""
        ...

    def record(self, shard: str) -> ShardRecord | None:
        """What was noted when `shard` was finished, or None when it still has to be made."""
        ...

    def tensors(self, shard: str) -> dict[str, Tensor]:
        """The tensors of a finished shard."""
        ...

    def write_shard(self, shard: str, tensors: Mapping[str, Tensor], record: ShardRecord) -> None:
        """Keep a finished shard and its record."""
        ...


@dataclass(frozen=True)
class Output:
    """An output folder that a run is filling. `notes`: what its file system does not give.

    `inside`: what its one weight file is to hold of its record, where that file leaves the folder; None where it stays.
    """

    folder: Path
    notes: tuple[str, ...] = ()
    inside: WeightRecord | None = None

    @property
    def journal(self) -> Path | None:
        """The folder that holds the run's records."""
        return self.folder / JOURNAL

    def record(self, shard: str) -> ShardRecord | None:
        """See `Shards`. Raises `FormatError` for a broken record."""
        path = self.folder / JOURNAL / f"{shard}.json"
        if not path.is_file() or not (self.folder / shard).is_file():
            return None
        try:
            return ShardRecord.from_json(parse_json(path.read_bytes(), path))
        except (ValueError, KeyError, TypeError, AttributeError, FormatError) as error:
            raise FormatError(f"{path} cannot be read ({error}); start again with --overwrite") from error

    def tensors(self, shard: str) -> dict[str, Tensor]:
        """See `Shards`."""
        return load_file(self.folder / shard)

    def write_shard(self, shard: str, tensors: Mapping[str, Tensor], record: ShardRecord) -> None:
        """Write a shard and then its record: a shard without a record is made again."""
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        record = replace(record, stored={name: _stored(tensor) for name, tensor in contiguous.items()})
        _replace(self.folder / shard, lambda path: save_file(contiguous, path, metadata=WRITTEN))
        write_json(self.folder / JOURNAL / f"{shard}.json", record.to_json())

    def write_file(self, name: str, write: Callable[[Path], ShardRecord]) -> None:
        """Let `write` make a weight file that is not safetensors, and then keep the record that it returns.

        `finish` lists the hash of the file, not of its tensors.
        """
        record = _replace(self.folder / name, write)
        write_json(self.folder / JOURNAL / f"{name}.json", record.to_json())

    def take_file(self, name: str, made: Path, record: ShardRecord) -> None:
        """Keep a weight file that is whole and lies in the journal, or has its place already, and its record."""
        write_json(self.folder / JOURNAL / f"{name}.json", record.to_json())
        with _disk_errors(self.folder):
            _for_readers(made, self.folder)
            _flush(made)
            os.replace(made, self.folder / name)
            _flush(self.folder)

    def move_out(self, name: str, file: Path) -> None:
        """Give a finished weight file its place outside, whole or not at all, and remove the folder."""
        with _disk_errors(file.parent):
            os.replace(self.folder / name, file)
            _flush(file.parent)
            shutil.rmtree(self.folder)

    def finish(
        self, config: Mapping[str, Any] | str, manifest: Mapping[str, Any], card: str | None = None
    ) -> None:
        """Write the model card and the manifest, which gets the hashes of all tensors and files; remove the journal.

        config.json, an object or its very text, makes the checkpoint loadable and is written last.
        """
        if card is not None:
            write_text(self.folder / "README.md", card)
        shards = [path.stem for path in sorted((self.folder / JOURNAL).glob("*.safetensors.json"))]
        tensors = {
            name: {"file": shard, **tensor.to_json()}
            for shard in shards
            for name, tensor in (self.record(shard) or ShardRecord()).stored.items()
        }
        last = config if isinstance(config, str) else json_text(config)
        files = self._hashes({*shards, MANIFEST}) | {"config.json": hashlib.sha256(last.encode()).hexdigest()}
        stored = {"files": dict(sorted(files.items())), "tensors": tensors}
        write_json(self.folder / MANIFEST, {**manifest, **stored})
        write_text(self.folder / "config.json", last)
        _empty(self.folder / JOURNAL)
        (self.folder / JOURNAL).rmdir()

    def _hashes(self, without: Collection[str]) -> dict[str, str]:
        """SHA-256 of the files in the folder."""
        files = [path for path in self.folder.iterdir() if path.is_file() and path.suffix != TEMPORARY]
        return {path.name: file_hash(path) for path in files if path.name not in without}


@dataclass(frozen=True, eq=False)
class InMemory:
    """Shards that stay in memory, for a sweep to evaluate."""

    held: dict[str, tuple[dict[str, Tensor], ShardRecord]] = field(default_factory=dict)
    journal: Path | None = None

    def record(self, shard: str) -> ShardRecord | None:
        """See `Shards`."""
        return self.held[shard][1] if shard in self.held else None

    def tensors(self, shard: str) -> dict[str, Tensor]:
        """See `Shards`."""
        return dict(self.held[shard][0])

    def write_shard(self, shard: str, tensors: Mapping[str, Tensor], record: ShardRecord) -> None:
        """See `Shards`."""
        self.held[shard] = {name: tensor.contiguous() for name, tensor in tensors.items()}, record


@contextmanager
def open_output(
    folder: Path, key: str, expected_bytes: int, overwrite: bool, resume: bool
) -> Iterator[Output]:
    """An output for the run with this `key`.

    Raises `OutputError` when the folder holds something else, when another process writes into it, or when its disk has too
    little space.
    """
    check_output(folder, key, overwrite, resume)
    _check_space(folder, expected_bytes)
    with _disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with only_writer(folder, folder / JOURNAL / WRITER) as notes:
            check_output(folder, key, overwrite, resume)  # another run may have written or ended meanwhile
            if overwrite and not (resume and is_unfinished(folder) and key_of(folder) == key):
                _clear(folder)
            (folder / JOURNAL).mkdir(exist_ok=True)
            write_json(folder / JOURNAL / RUN, {"key": key})
            write_json(folder / JOURNAL / WRITER, holder())
            yield Output(folder, notes)


def _stored(tensor: Tensor) -> StoredTensor:
    return StoredTensor(TYPE_NAMES[tensor.dtype], tuple(tensor.shape), content_hash(tensor))


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def json_text(value: Mapping[str, Any]) -> str:
    """A JSON object as fracbit writes it; in ASCII where a text in it, half of a pair of code points, has no other form."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=1) + "\n"
    return text


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object whole or not at all."""
    write_text(path, json_text(value))


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def copy_rest(source: Path, target: Path, *, code: bool) -> None:
    """Copy every file beside the weights of the folder `source`: tokenizer, chat template, generation config, license.

    `code`: the model's own code too.
    """
    left = NOT_COPIED if code else (*NOT_COPIED, CODE)
    for path in sorted(source.iterdir()):
        if path.is_file() and not any(path.match(pattern) for pattern in left):
            copy_file(path, target / path.name)


def code_in(folder: Path) -> list[str]:
    """The files of a folder that hold code of a model."""
    return sorted(path.name for path in folder.glob(CODE) if path.is_file())


def copy_file(source: Path, target: Path) -> None:
    """Copy a file whole or not at all."""
    _replace(target, lambda temporary: shutil.copyfile(source, temporary))


def _replace(path: Path, write: Callable[[Path], T]) -> T:
    """Write a file whole or not at all; returns what `write` does."""
    temporary = path.with_name(path.name + TEMPORARY)
    with _disk_errors(path.parent):
        try:
            made = write(temporary)
            _for_readers(temporary, path.parent)
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    return made


def _for_readers(file: Path, folder: Path) -> None:
    """Let all read a file who may read its folder: safetensors makes files for their owner alone."""
    file.chmod(0o600 | (folder.stat().st_mode & 0o044))


def _flush(path: Path) -> None:
    """Force a file, or a folder's entries, to the disk: a rename must not reach the disk before its file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        what = "the disk is full" if full else str(error)
        raise OutputError(
            f"{folder} cannot be written: {what}; finished shards stay, continue with --resume"
        ) from error


def _check_space(folder: Path, expected: int) -> None:
    existing = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    free = shutil.disk_usage(existing).free + _written(folder) + _written(folder / JOURNAL)
    if free < expected + SPARE_BYTES:
        raise OutputError(
            f"{folder} needs {expected:,} bytes but its disk has {free:,} free; free some space or name another disk"
        )


def _written(folder: Path) -> int:
    """Bytes of the files in a folder, which another run may be filling or emptying meanwhile."""
    total = 0
    with suppress(FileNotFoundError, NotADirectoryError):
        for path in folder.iterdir():
            with suppress(FileNotFoundError):
                total += path.stat().st_size if path.is_file() else 0
    return total


def _clear(folder: Path) -> None:
    """Remove the files of an earlier fracbit output; folders other than the journal are left alone.

    The journal is made before the first removal, so that the folder counts as unfinished if the process is killed in between.
    """
    if not folder.is_dir():
        return
    journal = folder / JOURNAL
    journal.mkdir(exist_ok=True)
    _empty(journal)
    for path in folder.iterdir():
        if path.is_file() or path.is_symlink():
            path.unlink()


def _empty(journal: Path) -> None:
    """Empty the journal, the run's key last: records without a key could be taken for those of another run."""
    for path in sorted(journal.iterdir(), key=lambda path: path.name == RUN):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
