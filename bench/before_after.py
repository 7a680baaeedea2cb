"""CPU seconds of everyday commands with another checkout and with this one, in turns: whether a change made them slower.
Makes the sentence on speed below "Measured before and after" in docs/architecture.md (bench/results/before_after.json).

    python bench/before_after.py OLD --work FOLDER [--rounds 2] [--json bench/results/before_after.json]

OLD is a checkout of version 0.1 with its extension built (`pip install -e OLD` in another environment builds it). Both run
with the libraries of this environment. The options differ where version 0.2 renamed them; the work is the same.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from frame import (
    DATA_FREE,
    ROOT,
    SHARED,
    STORIES,
    Row,
    arguments,
    medians,
    run,
    say_machine,
    surroundings,
    table,
    write_json,
)
from gptq_speed import make_model

BLOCKS = 4  # of a Llama of 160M shape
CALIBRATED = """
bits = [2, 3, 4]
offsets = ["zero"]
quantizers = ["gptq"]
"""


@dataclass(frozen=True)
class Task:
    """What both do, in the words of each; `threads` of a process."""

    name: str
    old: Sequence[object]
    new: Sequence[object]
    threads: int = 1


def tasks(work: Path) -> list[Task]:
    """Everything that is compared."""
    model, out, store = work / "model", work / "out", work / "store.db"
    make_model(model, BLOCKS)
    files = {
        "data-free": (DATA_FREE, DATA_FREE),
        "float chain": (CALIBRATED, CALIBRATED + 'chains = ["float"]\n'),
    }
    found = []
    for name, arms in files.items():
        paths = [work / f"{name.replace(' ', '-')}-{side}.toml" for side in ("old", "new")]
        for path, arm in zip(paths, arms, strict=True):
            path.write_text(
                STORIES.format(root=json.dumps(str(SHARED)), models=json.dumps(["models/tales-s"])) + arm
            )
        old, new = (("sweep", path, "--store", store) for path in paths)
        found.append(Task(f"sweep, {name}, tales-s", old, new))
    to = ("quantize", model, "-o", out)
    gptq = ("--quantizer", "gptq", "--calibration", model / "ids.npy")
    sizes = ("--set", "calibration.samples=32", "--set", "calibration.length=512")
    short = ("--bits", "4", "--block", "128")
    found.append(Task("int4/128, 4 blocks of 160M shape", (*to, *short), (*to, "--scheme", "int4/128"), 2))
    old = (*to, *gptq, *short, "--samples", "32", "--length", "512")
    found.append(Task("the same with GPTQ", old, (*to, *gptq, "--scheme", "int4/128", *sizes), 2))
    return [*found, Task("demo", ("demo", "-o", out), ("demo", "-o", out), 2)]


def measure(task: Task, tree: Path, words: Sequence[object], work: Path) -> Row:
    """One process of one side, from an empty output."""
    shutil.rmtree(work / "out", ignore_errors=True)
    for path in work.glob("store.db*"):
        path.unlink()
    environment = surroundings(task.threads) | {"PYTHONPATH": str(tree / "src")}
    ran = run(
        [sys.executable, "-m", "fracbit", *words], log=work / "log", environment=environment, folder=work
    )
    if ran.status:
        raise SystemExit(f"{task.name} failed with {tree}; see {work / 'log'}")
    return {"cpu_seconds": round(ran.cpu_seconds, 2), "seconds": round(ran.seconds, 2)}


def main() -> None:
    parser = arguments(__doc__, work=None, rounds=2, json=None)
    parser.add_argument("old", type=Path)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    say_machine()
    rows = []
    for task in tasks(asked.work):
        for _ in range(asked.rounds):
            for side, tree, words in (("before", asked.old, task.old), ("after", ROOT, task.new)):
                rows.append(
                    {"task": task.name, "side": side, **measure(task, tree.resolve(), words, asked.work)}
                )
    found = medians(rows, ("task", "side"))
    by = {(row["task"], row["side"]): row for row in found}
    lines = [
        (name, *(by[name, each]["cpu_seconds"] for each in ("before", "after")))
        for name, side in by
        if side == "after"
    ]
    table("task | before | after", lines, "CPU seconds, medians")
    write_json(asked.json, {"rows": found})


if __name__ == "__main__":
    main()
