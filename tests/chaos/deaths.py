"""Processes that end in the middle: killed at random moments, on a full disk, beside other writers of the same folder.

The law: what is there afterwards is refused or whole, and the same command again gives the bytes of one that nothing hindered.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fracbit
from chaos.mutations import Grounds
from chaos.trials import Broken, Change, command
from fracbit.errors import FracbitError
from outputs import contents

Words = list[str]
FORK = multiprocessing.get_context("fork")
UNHINDERED = 300.0  # seconds of a command
BOUNDED = 90.0  # seconds in which a rank ends after another one died
DISK = 1 << 20  # bytes of the small disk
SLACK = 4 << 10


def pipelines(grounds: Grounds) -> dict[str, Words]:
    """The command line of every pipeline that writes an output, without the output's name."""
    model, ids = str(grounds.float), f"{grounds.ids}?length=32"
    read = ["--calibration", ids]
    for setting in ("samples=4", "length=16", "batch=1"):
        read += ["--set", f"calibration.{setting}"]
    scheme = ["--scheme", "int3z/16", "--quiet"]
    return {
        "rounding": ["quantize", model, *scheme, "--set", "embeddings=int8/16"],
        "gptq": ["quantize", model, *scheme, "--quantizer", "gptq", *read],
        "training": ["quantize", model, *scheme, "--quantizer", "descent", *read, "--set", "calibration.tweak=train:epochs=1"],
        "distillation": ["quantize", model, *scheme, "--set", "embeddings=int8/16", *read, "--set", "calibration.distill=1"],
        "budget": ["quantize", model, "--average-bits", "4.25", "--quiet"],
        "export float": ["export", str(grounds.packed), "--to", "float"],
        "export mlx": ["export", str(grounds.folder / "for-mlx"), "--to", "mlx"],
        "refine": ["refine", str(grounds.foreign["gptq"]), "--against", model, "--calibration", str(grounds.text),
                   "--samples", "2", "--length", "16"],
    }  # fmt: skip


Unhindered = dict[str, tuple[dict[str, str], float]]


def unhindered(grounds: Grounds) -> Unhindered:
    """What each pipeline gives when nothing hinders it, and the seconds that it takes."""
    made: Unhindered = {}
    for name, words in pipelines(grounds).items():
        place, begun = grounds.folder / f"whole {name}", time.monotonic()
        if not place.exists():
            _must(run(words, place))
            (grounds.folder / f"whole {name}.seconds").write_text(str(time.monotonic() - begun))
        made[name] = contents(place), float((grounds.folder / f"whole {name}.seconds").read_text())
    return made


def run(words: Words, out: Path, resume: bool = False, overwrite: bool = False) -> FORK.Process:  # type: ignore[name-defined]
    """A process that runs a command of fracbit."""
    more = [*(["--resume"] if resume else []), *(["--overwrite"] if overwrite else [])]
    process = FORK.Process(target=_run, args=([*words, "-o", str(out), *more],))
    process.start()
    return process


def _run(words: Words) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = command(*words)[0]
        except FracbitError:
            code = 2
    os._exit(code)


def _must(process: FORK.Process, code: int = 0) -> None:  # type: ignore[name-defined]
    process.join(UNHINDERED)
    if process.exitcode is None:
        process.kill()
        raise Broken(f"still running after {UNHINDERED:g} s")
    if process.exitcode != code:
        raise Broken(f"ended with {process.exitcode}")


def again(words: Words, out: Path, expected: dict[str, str]) -> None:
    """Resume: the bytes are those of a run that nothing hindered."""
    loadable(out)
    there = out.exists() and any(out.iterdir())
    finished = (out / "config.json").is_file() and not (out / ".fracbit").exists()
    if not finished:
        _must(run(words, out, resume=there))
    found = contents(out)
    if found != expected:
        other = sorted(
            name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
        )
        raise Broken(f"resumed, {', '.join(other[:3])} differ from an unhindered run")


def loadable(out: Path) -> None:
    """What a hindered run left is refused, or verifies."""
    if not out.exists() or not any(out.iterdir()):
        return
    try:
        faults = fracbit.verify(out, progress=None).faults
    except FracbitError:
        return
    if faults and (out / "fracbit.json").is_file():
        raise Broken(f"what a hindered run left opens, and does not verify: {faults[0]}")


def killed(grounds: Grounds) -> Change:
    """SIGKILL at a random moment, up to three times in one output, then a run to the end."""
    lines, expected = pipelines(grounds), unhindered(grounds)

    def change(chance: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
        name, times = chance.choice(sorted(lines)), chance.choice((1, 1, 2, 3))
        wanted, seconds = expected[name]
        moments = [chance.uniform(0, 1.1) for _ in range(times)]

        def judge() -> str:
            out = folder / "out"
            ended = 0
            for moment in moments:
                there = out.exists() and any(out.iterdir())
                process = run(lines[name], out, resume=there)
                process.join(moment * seconds)
                ended += process.exitcode is None
                process.kill()
                process.join()
                loadable(out)
            again(lines[name], out, wanted)
            return f"unharmed: {ended} kills"

        return f"{name} killed after {', '.join(f'{moment:.2f}' for moment in moments)} of its time", judge

    return change


def killed_ranks(grounds: Grounds) -> Change:
    """SIGKILL of one of two ranks: the other ends too, with exit code 2, and one process or two end the run with its bytes."""
    lines, expected = pipelines(grounds), unhindered(grounds)
    names = ["rounding", "gptq", "budget"]

    def change(chance: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
        name, victim, resuming = chance.choice(names), chance.randrange(2), chance.choice((1, 2))
        wanted, seconds = expected[name]
        moment = chance.uniform(0, 2.2)

        def judge() -> str:
            out = folder / "out"
            ranks = run_ranks(lines[name], out)
            ranks[victim].join(moment * seconds)
            ended = ranks[victim].exitcode is None
            ranks[victim].kill()
            ranks[1 - victim].join(BOUNDED)
            code = ranks[1 - victim].exitcode
            whole = (out / "config.json").exists()
            if code not in ((2, 0) if ended and whole else (2,) if ended else (0,)):
                ranks[1 - victim].kill()
                raise Broken(f"the other rank ended with {code}")
            there = out.exists() and any(out.iterdir())
            if resuming == 2 and not whole:
                for rank in run_ranks(lines[name], out, resume=there):
                    _must(rank)
            again(lines[name], out, wanted)
            return f"unharmed: {int(ended)} kills"

        return f"{name}, rank {victim} killed after {moment:.2f} of its time, resumed by {resuming}", judge

    return change


def run_ranks(words: Words, out: Path, resume: bool = False) -> list[FORK.Process]:  # type: ignore[name-defined]
    """Two ranks that run a command together, as torchrun starts them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    line = [*words, "-o", str(out), *(["--resume"] if resume else [])]
    ranks = [FORK.Process(target=_run_rank, args=(line, number, port)) for number in range(2)]
    for rank in ranks:
        rank.start()
    return ranks


def _run_rank(words: Words, number: int, port: int) -> None:
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "TORCHELASTIC_RUN_ID": "chaos", "FRACBIT_RANK_PATIENCE": "15"}  # fmt: skip
    _run(words)


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[Path]:
    """A disk of so many bytes. Raises `OSError` where none can be mounted."""
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"no small disk can be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


def full_disk(grounds: Grounds) -> Change:
    """A disk that fills up at a random byte; with space again, the run goes on."""
    lines, expected = pipelines(grounds), unhindered(grounds)

    def change(chance: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
        name = chance.choice(sorted(lines))
        wanted, _ = expected[name]
        whole = sum(path.stat().st_size for path in (grounds.folder / f"whole {name}").iterdir())
        free = int(whole * chance.uniform(0.05, 1.15)) + SLACK

        def judge() -> str:
            with small_disk(folder / "disk", (64 << 20) + whole) as disk:
                ballast, out = disk / "ballast", disk / "out"
                process = run(lines[name], out)
                # The run looks at the space before it begins; what is taken away afterwards it cannot know.
                while process.exitcode is None and not (out / ".fracbit").exists():
                    process.join(0.002)
                with contextlib.suppress(OSError):
                    left = shutil.disk_usage(disk).free - free
                    with ballast.open("wb") as file:
                        os.posix_fallocate(file.fileno(), 0, max(left, 1))
                process.join(UNHINDERED)
                code = process.exitcode
                if code not in (0, 2):
                    raise Broken(f"ended with {code}")
                loadable(out)
                ballast.unlink(missing_ok=True)
                if code == 2:
                    again(lines[name], out, wanted)
                elif contents(out) != wanted:
                    raise Broken("ended with 0, and its bytes are others")
            return f"unharmed: ended with {code}"

        return f"{name} with {free} of {whole} bytes free", judge

    return change


def writers(grounds: Grounds) -> Change:
    """Two or three runs into one folder at once: the later are refused or come after the first; the folder is one of theirs."""
    lines, expected = pipelines(grounds), unhindered(grounds)
    names = ["rounding", "gptq", "budget"]

    def change(chance: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
        chosen = [chance.choice(names) for _ in range(chance.choice((2, 3)))]
        pauses = [chance.uniform(0, 0.3) for _ in chosen]

        def judge() -> str:
            out, processes = folder / "out", []
            for name, pause in zip(chosen, pauses, strict=True):
                processes.append(run(lines[name], out, overwrite=True))
                time.sleep(pause)
            for process in processes:
                process.join(UNHINDERED)
            codes = [process.exitcode for process in processes]
            if any(code not in (0, 2) for code in codes) or 0 not in codes:
                raise Broken(f"ended with {codes}")
            faults = fracbit.verify(out, progress=None).faults
            if faults:
                raise Broken(f"the folder does not verify: {faults[0]}")
            if contents(out) not in [expected[name][0] for name in chosen]:
                raise Broken("the folder is none of the runs'")
            return f"unharmed: ended with {codes}"

        return f"{' and '.join(chosen)} at once", judge

    return change


def stopped_store(grounds: Grounds) -> Change:
    """SIGKILL in a sweep: started again, it ends with the rows of one that was never stopped."""
    whole = _rows(grounds.store)

    def change(chance: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
        moments = [chance.uniform(0, 4) for _ in range(chance.choice((1, 2)))]

        def judge() -> str:
            file, store = folder / "sweep.toml", folder / "s.db"
            file.write_text(grounds.sweep)
            for moment in moments:
                process = FORK.Process(target=_run, args=(["sweep", str(file), "--store", str(store)],))
                process.start()
                process.join(moment)
                if process.pid is not None and process.exitcode is None:
                    os.kill(process.pid, signal.SIGKILL)
                process.join()
            last = FORK.Process(target=_run, args=(["sweep", str(file), "--store", str(store)],))
            last.start()
            _must(last)
            if _rows(store) != whole:
                raise Broken("the rows are others than those of a sweep that was not stopped")
            return "unharmed: "

        return f"sweep killed after {', '.join(f'{moment:.1f} s' for moment in moments)}", judge

    return change


def _rows(store: Path) -> dict[str, object]:
    from fracbit.sweeps.store import open_store

    with open_store(str(store)) as opened:
        return {row.key: (row.status, row.nll, row.stored_bits, row.window_nll) for row in opened.rows()}


DEATHS: dict[str, Callable[[Grounds], Change]] = {
    "killed": killed,
    "killed ranks": killed_ranks,
    "full disk": full_disk,
    "writers": writers,
    "killed sweep": stopped_store,
}
