"""What must never happen, tried at random: signals, tracebacks, hangs, other weights than were written. `make chaos` runs it.

    python bench/trust.py --work FOLDER --minutes 10 [--kinds checkpoint "full disk"] [--json bench/results/trust.json]

Makes the table of docs/trust.md. Kinds take turns until the minutes are over; it ends with 1 where a trial broke a law. A trial
is a kind and a number, which make the same change each time: `--kinds source --first 17 --one` repeats one. The laws stand in
tests/chaos.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests")]
# Read once, when torch and transformers are imported. A thread more would not survive the forks.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}

from frame import arguments, say_machine, table, write_json  # noqa: E402

from chaos.deaths import DEATHS  # noqa: E402
from chaos.mutations import KINDS, Grounds  # noqa: E402
from chaos.serving import USES  # noqa: E402
from chaos.trials import Trial, Verdict, preload, tried  # noqa: E402

TURN = {
    "checkpoint": 20, "source": 12, "foreign": 20, "recipe": 6, "sweep": 2, "store": 6, "text": 12, "command": 16, "native": 20,
    "killed": 6, "killed ranks": 2, "full disk": 2, "writers": 2, "killed sweep": 1, "threads": 1, "prompts": 1,
    "server": 1,
}  # fmt: skip
"""Trials of each kind in a turn."""
EVERY = {**KINDS, **DEATHS, **USES}


def report(verdicts: list[Verdict], minutes: float) -> dict[str, object]:
    """Counts of each kind, and what broke."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    ends: dict[str, Counter[str]] = defaultdict(Counter)
    for each in verdicts:
        counts[each.trial.kind][each.outcome] += 1
        if each.outcome == "unharmed" and each.said:
            ends[each.trial.kind][each.said] += 1
    broken = [
        {"kind": each.trial.kind, "number": each.trial.number, "change": each.change, "said": each.said}
        for each in verdicts
        if each.outcome == "broken"
    ]
    kinds = {kind: dict(found) for kind, found in counts.items()}
    return {
        "minutes": round(minutes, 1),
        "kinds": kinds,
        "ends": {kind: dict(found) for kind, found in ends.items()},
        "broken": broken,
    }


def main() -> None:
    parser = arguments(__doc__, work=None, minutes=10.0, json=None)
    parser.add_argument("--kinds", nargs="+", default=list(TURN), choices=list(TURN))
    parser.add_argument("--first", type=int, default=0, help="number of the first trial of each kind")
    parser.add_argument("--turn", type=int, help="trials of each kind in a turn, instead of those of TURN")
    parser.add_argument(
        "--one", action="store_true", help="run the first trial of each kind alone, and say what it saw"
    )
    given = parser.parse_args()
    say_machine()
    given.work.mkdir(parents=True, exist_ok=True)
    given.work = given.work.resolve()
    preload()
    grounds = Grounds(given.work / "grounds")
    grounds.folder.mkdir(exist_ok=True)
    changes = {kind: EVERY[kind](grounds) for kind in given.kinds}
    begun, verdicts = time.monotonic(), list[Verdict]()
    sizes = {kind: 1 if given.one else given.turn or TURN[kind] for kind in given.kinds}
    for turn in itertools.count():
        trials = [
            Trial(kind, given.first + turn * size + number)
            for kind, size in sizes.items()
            for number in range(size)
        ]
        for verdict in tried(trials, changes, given.work / "trials"):
            verdicts.append(verdict)
            if verdict.outcome == "broken" or given.one:
                print(
                    f"{verdict.trial.kind} {verdict.trial.number}: {verdict.change}: {verdict.outcome}: {verdict.said}",
                    flush=True,
                )
        minutes = (time.monotonic() - begun) / 60
        write_json(given.json, report(verdicts, minutes))
        if given.one or minutes > given.minutes:
            break
    found = report(verdicts, minutes)
    rows = [[kind, sum(each.values()), *(each.get(outcome, 0) for outcome in ("refused", "unharmed", "broken"))]
            for kind, each in found["kinds"].items()]  # type: ignore[attr-defined]  # fmt: skip
    table("kind | trials | refused | unharmed | broken", rows)
    sys.exit(1 if found["broken"] else 0)


if __name__ == "__main__":
    main()
