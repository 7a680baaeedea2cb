"""Sweeps end with every row, whatever dies or fails on the way, and measure nothing twice."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sqlalchemy", reason="the store is an extra: fracbit[store]")

import fracbit
from fracbit.errors import RecipeError, SourceError
from fracbit.records.row import Row, Run
from fracbit.sweeps.in_process import InProcess
from fracbit.sweeps.runner import Outcome, check_complete, run_sweep
from fracbit.sweeps.spec import expand, read_sweep
from fracbit.sweeps.store import open_store

DRIVER = """
import sys
from pathlib import Path
from fracbit.sweeps.spec import expand, read_sweep
from fracbit.sweeps.in_process import InProcess
from fracbit.sweeps.runner import run_sweep
from fracbit.sweeps.store import open_store
root = Path(sys.argv[1])
with open_store(str(root / "s.db")) as store:
    runs = expand(read_sweep(root / "grid.toml")).runs
    run_sweep(store, runs, InProcess(root), lambda *_: print("row", flush=True))
"""

# The same driver with an engine that needs no torch: sleeping instead of measuring.
LIGHT_DRIVER = """
import json, sys, time
from fracbit.records.row import Row, Run
from fracbit.sweeps.runner import run_sweep
from fracbit.sweeps.store import open_store
class Sleep:
    def measure(self, queue, runs, claim):
        while (taken := queue.take(0)) is not None:
            if claim(taken[1]):
                time.sleep(0.05)
                yield Row(key=taken[1], run=runs[taken[1]], status="done")
runs = {key: Run.model_validate(run) for key, run in json.loads(sys.stdin.readline()).items()}
with open_store(sys.argv[1]) as store:
    print("open", flush=True)
    print(run_sweep(store, runs, Sleep(), lambda *_: print("row", flush=True)).measured, flush=True)
"""


def sweep(study: Path, **options: bool) -> Outcome:
    with open_store(str(study / "s.db")) as store:
        return run_sweep(store, runs_of(study), InProcess(study), **options)  # type: ignore[arg-type]


def runs_of(study: Path) -> dict[str, Run]:
    return expand(read_sweep(study / "grid.toml")).runs


def rows_of(study: Path) -> list[Row]:
    with open_store(str(study / "s.db")) as store:
        return store.rows()


@contextmanager
def process(code: str, *arguments: str) -> "Iterator[subprocess.Popen[str]]":
    """A Python process that does not outlive the test."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=pipe, stdout=pipe, text=True
    ) as started:
        try:
            yield started
        finally:
            started.kill()


@contextmanager
def light_driver(study: Path, where: str = "") -> "Iterator[subprocess.Popen[str]]":
    with process(LIGHT_DRIVER, where or str(study / "s.db")) as started:
        assert started.stdin is not None
        started.stdin.write(
            json.dumps({key: run.model_dump(mode="json") for key, run in runs_of(study).items()}) + "\n"
        )
        started.stdin.flush()
        yield started


def line(started: "subprocess.Popen[str]") -> str:
    assert started.stdout is not None
    return started.stdout.readline().strip()


def test_a_sweep_measures_every_run_once(study: Path) -> None:
    seen: list[tuple[int, int]] = []
    with open_store(str(study / "s.db")) as store:
        outcome = run_sweep(
            store, runs_of(study), InProcess(study), lambda _, done, total: seen.append((done, total))
        )
    assert (outcome.total, outcome.measured, outcome.failed) == (13, 13, ())
    assert seen == [(done, 13) for done in range(1, 14)]
    assert check_complete(outcome) == ""
    again = sweep(study)
    assert again.measured == 0
    assert {row.key for row in rows_of(study)} == set(runs_of(study))


def test_the_verb_takes_a_device_and_says_what_it_left_out(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both as the command does; beside an engine, which has a device of its own, a device is refused."""
    grid = study / "grid.toml"
    grid.write_text(grid.read_text() + "seeds = [0, 1]\n")
    devices = []
    measure = InProcess.measure

    def noted(engine: InProcess, *rest: Any) -> Iterator[Row]:
        devices.append((engine.root, engine.device, engine.keep_going))
        return measure(engine, *rest)

    monkeypatch.setattr(InProcess, "measure", noted)
    outcome = fracbit.sweep(grid, study / "s.db", device="cpu", progress=None)
    assert (outcome.total, outcome.measured) == (13, 13)
    assert outcome.skipped == {"another seed of a run that draws nothing at random": 12}
    grid.write_text(grid.read_text().replace("[2, 3, 4]", "[5]"))
    with pytest.raises(SourceError, match="'nowhere' cannot be used here"):
        fracbit.sweep(grid, study / "s.db", device="nowhere", progress=None)
    assert fracbit.sweep(grid, study / "s.db", device="cpu:0", keep_going=True, progress=None).measured == 4
    assert devices == [(study, "cpu", False), (study, "cpu:0", True)]
    for given in ({"device": "cuda"}, {"keep_going": True}):
        with pytest.raises(RecipeError, match="give them to the engine"):
            fracbit.sweep(grid, study / "s.db", engine=InProcess(study), **given)  # type: ignore[arg-type]


def test_a_larger_grid_measures_only_what_is_new(study: Path) -> None:
    sweep(study)
    grid = study / "grid.toml"
    grid.write_text(grid.read_text().replace("[2, 3, 4]", "[2, 3, 4, 5]"))
    assert sweep(study).measured == 4


def test_a_model_that_fails_is_a_row_and_the_sweep_goes_on(study: Path) -> None:
    (study / "broken").mkdir()
    (study / "broken" / "config.json").write_text("{}")
    grid = study / "grid.toml"
    grid.write_text(grid.read_text().replace('["tiny"]', '["broken", "tiny"]'))
    outcome = sweep(study)
    assert outcome.measured == 26
    assert len(outcome.failed) == 13
    assert {row.run.recipe.model for row in outcome.failed} == {"broken"}
    assert "13 of 26 runs failed" in check_complete(outcome)
    assert sweep(study).measured == 0
    assert sweep(study, retry_failed=True).measured == 13


def test_a_killed_driver_loses_at_most_the_run_in_flight(study: Path) -> None:
    with process(DRIVER, str(study)) as driver:
        assert [line(driver) for _ in range(3)] == ["row"] * 3
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    before = {row.key: row for row in rows_of(study)}
    assert len(before) >= 3
    outcome = sweep(study)
    assert outcome.measured == 13 - len(before)
    after = {row.key: row for row in rows_of(study)}
    assert all(after[key] == row for key, row in before.items())
    with open_store(str(study / "s.db")) as store:
        assert store.claimed() == set()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_two_sweeps_at_once_share_the_work(study: Path, kind: str, request: pytest.FixtureRequest) -> None:
    where = str(study / "s.db") if kind == "sqlite" else request.getfixturevalue("postgresql")
    with light_driver(study, where) as one, light_driver(study, where) as other:
        outputs = [driver.communicate(timeout=120)[0] for driver in (one, other)]
        assert [driver.returncode for driver in (one, other)] == [0, 0]
    assert sum(int(output.split()[-1]) for output in outputs) == 13
    with open_store(where) as store:
        assert {row.key for row in store.rows()} == set(runs_of(study))


CLAIM = """
import sys, time
from fracbit.sweeps.store import open_store
store = open_store(sys.argv[1]); store.join(); store.claim(sys.argv[2]); print("claimed", flush=True); time.sleep(60)
"""


def test_a_sweep_waits_for_the_runs_of_another_and_takes_them_over_when_it_dies(study: Path) -> None:
    key = next(iter(runs_of(study)))
    with process(CLAIM, str(study / "s.db"), key) as other:
        assert line(other) == "claimed"
        with light_driver(study) as driver:
            assert [line(driver) for _ in range(13)] == ["open", *["row"] * 12]
            other.kill()
            other.wait()
            output, _ = driver.communicate(timeout=60)
    assert output.split() == ["row", "13"]
