"""One writer at a time: a second one is refused by name, a dead one holds nothing."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import fracbit
from families import tiny_llama
from fracbit.checkpoint import lock
from fracbit.checkpoint.folder import JOURNAL
from fracbit.checkpoint.output import WRITER, open_output
from fracbit.errors import OutputError
from fracbit.records.scheme import Scheme
from outputs import contents

HOLD = """
import sys, time
from pathlib import Path
from fracbit.checkpoint.output import open_output
with open_output(Path(sys.argv[1]), "another", 0, True, False):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny_llama(num_hidden_layers=2).save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@contextmanager
def holding(folder: Path) -> Iterator[int]:
    """A process that writes into `folder` until it is killed at the end; its number."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process.pid
        finally:
            process.kill()


def test_a_second_writer_is_refused_and_changes_nothing(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "q"
    fracbit.quantize(source, folder, Scheme("int", 4, 16), progress=None)
    with holding(folder) as pid:
        before = contents(folder)
        for resume in (False, True):
            with pytest.raises(
                OutputError, match=f"written by process {pid} on {socket.gethostname()} since"
            ):
                fracbit.quantize(
                    source, folder, Scheme("int", 3, 16), overwrite=True, resume=resume, progress=None
                )
        assert contents(folder) == before
    fracbit.quantize(source, folder, Scheme("int", 3, 16), overwrite=True, progress=None)
    assert fracbit.verify(folder).faults == ()


def test_two_that_start_together_leave_a_sound_checkpoint(source: Path, tmp_path: Path) -> None:
    script = (
        "import sys, fracbit\n"
        "fracbit.quantize(sys.argv[1], sys.argv[2], fracbit.Scheme('int', int(sys.argv[3]), 16), overwrite=True,"
        " shard_bytes=20_000, progress=None)"
    )
    words = [sys.executable, "-c", script, str(source), str(tmp_path / "q")]
    pair = [subprocess.Popen([*words, bits], stderr=subprocess.PIPE, text=True) for bits in ("3", "4")]
    said = [process.communicate()[1] for process in pair]
    assert all(
        process.returncode == 0 or "is being written by" in text
        for process, text in zip(pair, said, strict=True)
    ), said
    assert any(process.returncode == 0 for process in pair)
    assert fracbit.verify(tmp_path / "q").faults == ()


def test_the_record_is_gone_when_the_run_has_ended(source: Path, tmp_path: Path) -> None:
    fracbit.quantize(source, tmp_path / "q", Scheme("int", 4, 16), progress=None)
    assert not (tmp_path / "q" / JOURNAL).exists()


def test_where_folders_cannot_be_locked_the_record_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    assert lock.FCNTL is not None
    monkeypatch.setattr(lock.FCNTL, "flock", unsupported)
    folder = tmp_path / "q"
    record = folder / JOURNAL / WRITER
    record.parent.mkdir(parents=True)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = socket.gethostname()
    for host, pid, refused in ((here, os.getppid(), True), ("elsewhere", 1, True), (here, dead.pid, False)):
        record.write_text(json.dumps({"host": host, "pid": pid, "since": "2026-01-01 00:00:00"}))
        if refused:
            with (
                pytest.raises(OutputError, match=rf"process {pid} on {host} .*remove .*{WRITER}"),
                open_output(folder, "key", 0, overwrite=False, resume=True),
            ):
                pass
        else:
            with open_output(folder, "key", 0, overwrite=False, resume=True) as output:
                assert output.notes == (lock.UNLOCKED,)
                assert json.loads(record.read_text())["pid"] == os.getpid()
