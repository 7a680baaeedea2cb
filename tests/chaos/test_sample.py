"""A sample of `make chaos`, and that it sees what it looks for: a trial that dies, hangs, raises or bombs is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux", reason="trials are forked, and their memory is bounded by Linux"
    ),
]
CHEAP = (
    "checkpoint",
    "source",
    "foreign",
    "recipe",
    "store",
    "text",
    "command",
    "native",
    "killed",
    "threads",
)

SEEN = """
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from chaos import trials
from chaos.trials import Broken, Trial
from fracbit.errors import FracbitError

trials.LONGEST = 1.0

def raises(error):
    raise error

acts = {
    "refused": lambda: raises(FracbitError("no")),
    "unharmed": lambda: "unharmed: ",
    "law": lambda: raises(Broken("a law")),
    "raises": lambda: 1 / 0,
    "dies": lambda: os.kill(os.getpid(), 11),
    "hangs": lambda: time.sleep(600),
    "bombs": lambda: bytearray(1 << 36),
    "after": lambda: "unharmed: ",
}
changes = {name: (lambda chance, folder, act=act: (name, act)) for name, act in acts.items()}
found = trials.tried([Trial(name, 0) for name in acts], changes, Path(sys.argv[2]))
print(json.dumps([[each.trial.kind, each.outcome, each.said] for each in found]))
"""


def test_what_breaks_a_trial_is_seen_and_the_next_one_runs(tmp_path: Path) -> None:
    words = [sys.executable, "-c", SEEN, str(ROOT / "tests"), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    seen = {kind: (outcome, said) for kind, outcome, said in json.loads(done.stdout.splitlines()[-1])}
    assert seen["refused"] == ("refused", "no")
    assert seen["unharmed"][0] == seen["after"][0] == "unharmed"
    assert seen["law"] == ("broken", "a law")
    assert "ZeroDivisionError" in seen["raises"][1]
    assert seen["dies"] == ("broken", "the process ended with -11")
    assert "still running" in seen["hangs"][1]
    assert "MemoryError" in seen["bombs"][1]
    assert all(seen[kind][0] == "broken" for kind in ("raises", "dies", "hangs", "bombs"))


def test_a_sample_of_every_kind_breaks_no_law(tmp_path: Path) -> None:
    """Numbers of their own, so that the sample is no repetition of the first turn of `make chaos`."""
    words = [
        "--work",
        str(tmp_path),
        "--minutes",
        "0",
        "--turn",
        "2",
        "--first",
        "1000000",
        "--json",
        str(tmp_path / "found.json"),
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "trust.py"), *words, "--kinds", *CHEAP],
        capture_output=True, text=True, check=False, timeout=280, env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert {kind: sum(counts.values()) for kind, counts in found["kinds"].items()} == dict.fromkeys(CHEAP, 2)
    assert found["broken"] == []
