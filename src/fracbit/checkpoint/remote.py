"""Models that stay where they are: of their weight files, headers and then only the bytes that are asked for are fetched.

    a stand-in folder: the small files, and for each weight file one of its size that holds nothing but what was fetched

So `inspect` and `plan` of a model on the hub read some megabytes of it. Files are read by fsspec: huggingface_hub's file system
for hub ids. Only `Source` reads stand-ins; nothing else may, since what was not fetched reads as zeros. Torch-free.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from fracbit.checkpoint.place import fetch_small, find_place, is_local
from fracbit.errors import SourceError

AHEAD = 1 << 16  # bytes of the first request for a header, which often has it all
GAP = 1 << 18  # bytes between two parts that are fetched along with them rather than asked for apart
AT_ONCE = 8  # requests
LARGEST_HEADER = 100 << 20  # bytes, as safetensors bounds them
WEIGHTS = ".safetensors"

ByteRange = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Remote:
    """The weight files of a model in `root` of the file system `files`, and the stand-in `folder`.

    `held` is its state: what was fetched of each file, in order and apart.
    """

    files: Any
    root: str
    folder: Path
    held: dict[str, list[ByteRange]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fetch(self, file: str, spans: Iterable[ByteRange]) -> None:
        """Bring bytes of a weight file into its stand-in. Raises `SourceError`."""
        with self.lock:
            missing = without(joined(spans, GAP), self.held.get(file, []))
            if not missing:
                return
            with ThreadPoolExecutor(AT_ONCE) as pool:
                parts = list(pool.map(lambda span: self._read(file, span), missing))
            path = self.folder / file
            state = path.stat()
            with path.open("r+b") as stand_in:
                for (start, _), data in zip(missing, parts, strict=True):
                    stand_in.seek(start)
                    stand_in.write(data)
            os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # it is the same file as before
            self.held[file] = joined([*self.held.get(file, []), *missing], 0)

    def fetch_whole(self) -> None:
        """Bring everything, for a reader that takes whole files. Raises `SourceError`."""
        for file in self.held:
            self.fetch(file, [(0, (self.folder / file).stat().st_size)])

    def begin(self, file: str, size: int) -> None:
        """Make the stand-in of a weight file, with its header. Raises `SourceError`."""
        with (self.folder / file).open("wb") as stand_in:
            stand_in.truncate(size)
        self.fetch(file, [(0, min(AHEAD, size))])
        with (self.folder / file).open("rb") as stand_in:
            end = 8 + int.from_bytes(stand_in.read(8), "little")
        if end > min(size, LARGEST_HEADER):
            raise SourceError(
                f"{self.root}/{file} is truncated or no safetensors file: its header would end at byte {end}"
            )
        self.fetch(file, [(0, end)])

    def _read(self, file: str, span: ByteRange) -> bytes:
        start, end = span
        try:
            data: bytes = self.files.cat_file(f"{self.root}/{file}", start, end, cache_type="none")
        except OSError as error:
            raise SourceError(f"{self.root}/{file} cannot be read from afar: {error}") from error
        if len(data) != end - start:
            raise SourceError(
                f"{self.root}/{file}: asked for {end - start} bytes at {start}, got {len(data)}; try again"
            )
        return data


def joined(spans: Iterable[ByteRange], gap: int) -> list[ByteRange]:
    """Spans in order; those less than `gap` bytes apart, or overlapping, as one."""
    found: list[ByteRange] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1] + gap:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        elif start < end:
            found.append((start, end))
    return found


def without(spans: Sequence[ByteRange], held: Sequence[ByteRange]) -> list[ByteRange]:
    """The parts of `spans` that are not in `held`, both in order and apart."""
    left: list[ByteRange] = []
    for start, end in spans:
        for begin, stop in held:
            if stop <= start or begin >= end:
                continue
            if begin > start:
                left.append((start, begin))
            start = min(max(start, stop), end)
        if start < end:
            left.append((start, end))
    return left


def stand_in(
    model: str, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[Path, Remote | None]:
    """A folder with the model, and where its weights are if they stay there; what is here, or in the cache, is used as it is.

    Raises `SourceError`.
    """
    if is_local(model):
        return find_place(model, revision, trust_remote_code), None
    return _stand_in(model, revision, trust_remote_code)


@cache
def _stand_in(model: str, revision: str | None, trust_remote_code: bool) -> tuple[Path, Remote | None]:
    from huggingface_hub import HfFileSystem

    files: Any = HfFileSystem()
    root = model if revision is None else f"{model}@{revision}"
    try:
        listed = {
            Path(each["name"]).name: int(each["size"]) for each in files.ls(root) if each["type"] == "file"
        }
    except (OSError, ValueError):  # offline, gated, not there: the cache has it, or says why not
        return find_place(model, revision, trust_remote_code), None
    weights = {name: size for name, size in listed.items() if name.endswith(WEIGHTS)}
    if not weights or "adapter_config.json" in listed:
        return find_place(model, revision, trust_remote_code), None
    small = fetch_small(model, revision, trust_remote_code)
    if all((small / name).is_file() for name in weights):
        return small, None
    return _made(Remote(files, root, Path(tempfile.mkdtemp(prefix="remote-"))), small, weights)


def _made(remote: Remote, small: Path, weights: Mapping[str, int]) -> tuple[Path, Remote]:
    atexit.register(shutil.rmtree, remote.folder, ignore_errors=True)
    for path in small.iterdir():
        if path.is_file() and path.suffix != WEIGHTS:
            shutil.copyfile(path, remote.folder / path.name)
    for name, size in weights.items():
        remote.begin(name, size)
    return remote.folder, remote
