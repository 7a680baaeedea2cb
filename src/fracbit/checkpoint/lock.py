"""One writer at a time for an output folder.

The lock is the kernel's, on the folder itself (flock): a process that ends, however it ends, does not keep it. A record in the
journal says who holds it. Where a folder cannot be locked (Windows, some network file systems), that record alone is asked: a
writer on this machine counts while its process lives, one on another machine until someone removes the record.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fracbit.errors import OutputError

FCNTL: Any = (
    importlib.import_module("fcntl") if importlib.util.find_spec("fcntl") else None
)  # None on Windows

Holder = dict[str, Any]
UNLOCKED = (
    "the file system of the output has no locks: two runs that start at the same moment are not kept apart"
)


@contextmanager
def only_writer(folder: Path, record: Path) -> Iterator[tuple[str, ...]]:
    """Hold the lock of the existing `folder`; gives a note where it cannot be locked. `record`: the file that names the holder.

    Raises `OutputError` naming the holder while another process writes there.
    """
    descriptor = None if FCNTL is None else os.open(folder, os.O_RDONLY)
    try:
        locked = _locked(descriptor)
        if locked is False or (locked is None and _alive(_read(record))):
            raise OutputError(
                f"{folder} is being written by {_words(_read(record))}; wait until it ends, or name another folder"
                + ("" if locked is False else f" (if it does not run any more, remove {record})")
            )
        yield () if locked else (UNLOCKED,)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def holder() -> Holder:
    """What the record says of this process: the machine, its number, and when it began to write."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _locked(descriptor: int | None) -> bool | None:
    """Whether the lock was taken; None where the file system has none."""
    if descriptor is None:
        return None
    try:
        FCNTL.flock(descriptor, FCNTL.LOCK_EX | FCNTL.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _read(record: Path) -> Holder | None:
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _alive(found: Holder | None) -> bool:
    """Whether a recorded writer may still be at work."""
    if found is None or found.get("host") != socket.gethostname():
        return found is not None
    try:
        os.kill(int(found["pid"]), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, KeyError, TypeError, ValueError):
        return True
    return int(found["pid"]) != os.getpid()


def _words(found: Holder | None) -> str:
    if found is None:
        return "another process"
    return f"process {found.get('pid')} on {found.get('host')} since {found.get('since')}"
