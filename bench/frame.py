"""What all benches share: options, models with their texts, turns and medians, processes, and how results are written.

Every result says where it was measured: processor, instruction set, threads, versions, commit and command line (`machine`).
At the top this file imports the standard library alone, since scripts in a peer's environment (bench/peers) import it too.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distributions
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("FRACBIT_SHARED", ROOT.parent / "shared")).absolute()
ENVIRONMENTS = Path.home() / ".cache" / "fracbit" / "bench"
RESULTS = ROOT / "bench" / "results"
INFO = Path("/proc/cpuinfo")
UNFINISHED = 75
"""Exit status of a study that ran out of its minutes: the same command goes on."""
Row = dict[str, Any]
STORIES = """
root = {root}
models = {models}
[evaluation]
text = "data/tales-evaluation.u16?length=512&first=60&keep=256"
window = 256
[calibration]
text = "data/tales-calibration.u16?length=512&keep=256"
samples = 32
length = 256
[[arm]]
"""
"""The head of a sweep file, up to its arm, for benches of the sweep itself."""
DATA_FREE = """
dtypes = ["int", "float", "nf", "dynamic", "power:1/2", "quantile"]
bits = [3, 4, 5, 6]
blocks = [64, 128]
"""

OPTIONS: dict[str, dict[str, Any]] = {
    "models": {"nargs": "+", "help": "`bundled`, models of the shared folder (FRACBIT_SHARED), or folders"},
    "json": {"type": Path, "help": "write the result here"},
    "folder": {"type": Path, "help": "of the CSV files"},
    "work": {"type": Path, "required": True, "help": "folder for models and checkpoints; nothing in it is made again"},
    "peers": {"nargs": "*", "help": "libraries to measure beside fracbit"},
    "environments": {"type": Path, "help": "folder of the peers' environments; one that is missing is installed"},
    "rounds": {"type": int, "help": "how often everything is measured, in turn"},
    "threads": {"type": int, "help": "of torch and of fracbit's kernels"},
    "shapes": {"nargs": "+", "type": lambda text: tuple(map(int, text.split("x"))), "metavar": "OUTxIN", "help": "of weights"},
    "minutes": {"type": float, "help": f"begin nothing new after so long, and exit with {UNFINISHED}"},
}  # fmt: skip


def arguments(
    doc: str, choices: Mapping[str, Collection[str]] | None = None, **defaults: object
) -> argparse.ArgumentParser:
    """A parser with the named ones of the options that benches share, each with its default; of some, what may be chosen."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        allowed = (choices or {}).get(name)
        parser.add_argument(f"--{name}", default=default, choices=allowed, **OPTIONS[name])
    return parser


@dataclass(frozen=True)
class Bed:
    """A model to measure on: its folder, a text to calibrate on, and another to judge by."""

    name: str
    folder: Path
    calibration: str
    evaluation: str

    @property
    def vocabulary(self) -> int:
        """How many ids the model knows."""
        return int(json.loads((self.folder / "config.json").read_text())["vocab_size"])


def bed(model: str, length: int, judged: str = "") -> Bed:
    """`bundled`, a model of the shared folder with the first `length` ids of each story, or any other folder.

    `judged` is an option of the stories to judge by, such as `&first=120`.
    """
    from fracbit.bundled import bundled_model

    shared = SHARED / "models" / model
    if model != "bundled" and shared.is_dir():
        seen, unseen = (
            f"{SHARED}/data/tales-{part}.u16?length=512" for part in ("calibration", "evaluation")
        )
        return Bed(model, shared, f"{seen}&keep={length}", f"{unseen}&keep={length}{judged}")
    folder = bundled_model() if model == "bundled" else Path(model)
    if not folder.is_dir():
        raise SystemExit(f"there is no {shared} and no folder {model}: set FRACBIT_SHARED, or name a folder")
    return Bed(model if model == "bundled" else folder.name, folder, "bundled:train", "bundled:held-out")


def in_turns(calls: Mapping[str, Sequence[Callable[[], object]]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, the kinds taking turns over their copies; a first round warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, copies in calls.items():
            for call in copies:
                started = time.perf_counter()
                call()
                if number:
                    seconds[name].append(time.perf_counter() - started)
    return seconds


def medians(rows: Iterable[Row], by: Sequence[str], spread: str = "") -> list[Row]:
    """One row for all that agree in `by`: the median of every number; of `spread` also `least` and `most`."""
    same: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        same.setdefault(tuple(row[name] for name in by), []).append(row)
    found = []
    for some in same.values():
        figures = [key for key, value in some[0].items() if isinstance(value, (int, float)) and key not in by]
        middle = some[0] | {key: statistics.median(row[key] for row in some) for key in figures}
        every = [row[spread] for row in some] if spread else []
        found.append(middle | ({"least": min(every), "most": max(every)} if spread else {}))
    return found


@dataclass(frozen=True)
class Ran:
    """A process that has ended, as the kernel accounts it with the children that it waited for.

    A peak below this process's own resident size is not seen: the kernel counts from before the command took its place.
    """

    status: int
    printed: str
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int


def run(
    command: Sequence[object], *, given: str = "", log: Path | None = None, environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Ran:  # fmt: skip
    """Run a command with `given` as its input. With `log`, what it prints and its errors go to the end of that file."""
    words, started = [str(word) for word in command], time.perf_counter()
    with open(log or os.devnull, "a") as file:
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=file if log else subprocess.PIPE, stderr=file if log else None,
            text=True, env=environment, cwd=folder,
        )  # fmt: skip
        assert process.stdin is not None
        with process.stdin as stdin:
            stdin.write(given)
        printed = process.stdout.read() if process.stdout else ""
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds, cpu = time.perf_counter() - started, used.ru_utime + used.ru_stime
    return Ran(process.returncode, printed, seconds, cpu, used.ru_maxrss * 1024)


def fracbit(*words: object, log: Path | None = None, threads: int | None = None) -> tuple[Any, Ran]:
    """`fracbit WORDS --json` in a process of its own: what it printed (nothing with `log`), and the process."""
    ran = run([sys.executable, "-m", "fracbit", *words, "--json"], log=log, environment=surroundings(threads))
    if ran.status:
        raise SystemExit(f"fracbit {words[0]} failed" + (f"; see {log}" if log else ""))
    return json.loads(ran.printed or "null"), ran


def surroundings(threads: int | None = None) -> dict[str, str]:
    """The environment variables of a process that may take so many threads (None: as many as this one)."""
    count = {} if threads is None else {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return dict(os.environ) | count


def machine() -> Row:
    """Where and with what this process measures: the part of every result that says what its figures hold for."""
    import torch

    from fracbit.kernels.cpu import NATIVE

    named = re.search(r"model name\s*: (.*)", INFO.read_text()) if INFO.exists() else None
    return {
        "processor": named[1] if named else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "instruction_set": NATIVE.instruction_set() if NATIVE else "torch's: no native module",
        "instruction_set_of_torch": torch.backends.cpu.get_cpu_capability(),
        "versions": {"python": platform.python_version()} | versions("fracbit", "torch", "transformers"),
        "commit": _commit(),
        "command": shlex.join(["python", *map(_said, sys.argv)]),
    }


def _said(word: str) -> str:
    """A word of the command line; paths as seen from the repository, those outside it as `FOLDER`."""
    option, sign, value = word.partition("=") if word.startswith("--") else ("", "", word)
    path = Path(value)
    if value == sys.argv[0] or path.is_absolute() or path.parts[:1] == ("..",):
        path = Path(os.path.relpath(path, ROOT))
        return option + sign + ("FOLDER" if path.parts[:1] == ("..",) else str(path))
    return word


def versions(*packages: str) -> dict[str, str]:
    """The installed ones of these packages, each with its version."""
    return {each.name: each.version for each in distributions() if each.name in packages}


@cache
def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def say_machine() -> None:
    """One line before what is printed: processor, instruction set and threads."""
    print("{processor}, {instruction_set}, {threads} threads\n".format(**machine()), flush=True)


def write_json(path: Path | None, result: Mapping[str, object]) -> None:
    """Write a result with the facts of the machine; nothing where no path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**result, "machine": machine()}, indent=1) + "\n")


def table(head: str | Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> None:
    """Print a Markdown table; `head` names the columns, in one string with ` | ` between them or one by one."""
    names = head.split(" | ") if isinstance(head, str) else head
    print((f"## {title}\n\n" if title else "") + _line(names) + "\n|" + "---|" * len(names))
    for row in rows:
        print(_line(row), flush=True)
    print()


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


Parts = list[tuple[str, Callable[..., Iterable[Row]], Mapping[str, Collection[object]]]]
"""What a study measures: a CSV file, `rows(study, **key)`, and the values of each key; every combination is a part."""


def in_pieces(studies: Iterable[Any], parts: Parts, folder: Path, minutes: float) -> None:
    """Measure of each study (by its `name`) what the files do not hold yet, so that an interrupted part alone is done again.

    Past so many minutes nothing new begins, and the process ends with `UNFINISHED`.
    """
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    every = [(folder / file, rows, dict(zip(keys, values, strict=True)))
             for file, rows, keys in parts for values in product(*keys.values())]  # fmt: skip
    for study, (path, rows, part) in ((study, one) for study in studies for one in every):
        key = {"model": study.name, **part}
        if any(all(row[name] == str(value) for name, value in key.items()) for row in read_csv(path)):
            continue
        begun = time.monotonic()
        if begun - started > 60 * minutes:
            raise SystemExit(UNFINISHED)
        _add(path, [key | row for row in rows(study, **part)])
        print(path.name, *key.values(), f"{time.monotonic() - begun:.0f} s", flush=True)


def _add(path: Path, rows: Sequence[Row]) -> None:
    """Rows at the end of a file; `machines.json` beside it says where the last ones of a file and model were measured."""
    known = read_csv(path)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list((known or rows)[0]))
        if not known:
            writer.writeheader()
        writer.writerows(rows)
    notes = path.with_name("machines.json")
    machines = json.loads(notes.read_text()) if notes.exists() else {}
    machines.setdefault(path.name, {})[rows[0]["model"]] = machine()
    notes.write_text(json.dumps(machines, indent=1) + "\n")
