"""Sweeps end with every row, whatever dies or fails on the way, and measure nothing twice."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("sqlalchemy", reason="the store is an extra: fracbit[store]")

from fracbit.records.row import Row
from fracbit.sweep.grid import Expansion, expand, read_grid
from fracbit.sweep.runner import InProcess, Outcome, check_complete, run_sweep
from fracbit.sweep.store import open_store

DRIVER = """
import sys
from pathlib import Path
from fracbit.sweep.grid import expand, read_grid
from fracbit.sweep.runner import InProcess, run_sweep
from fracbit.sweep.store import open_store
root = Path(sys.argv[1])
with open_store(str(root / "s.db")) as store:
    print("open", flush=True)
    outcome = run_sweep(store, expand(read_grid(root / "grid.toml")), InProcess(root), lambda *_: print("row", flush=True))
    print(outcome.measured, flush=True)
"""


def sweep(study: Path, **options: bool) -> Outcome:
    with open_store(str(study / "s.db")) as store:
        return run_sweep(store, expansion_of(study), InProcess(study), **options)  # type: ignore[arg-type]


def expansion_of(study: Path) -> Expansion:
    return expand(read_grid(study / "grid.toml"))


def rows_of(study: Path) -> list[Row]:
    with open_store(str(study / "s.db")) as store:
        return store.rows()


@contextmanager
def process(code: str, *arguments: str) -> "Iterator[subprocess.Popen[str]]":
    """A Python process that does not outlive the test."""
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True) as started:
        try:
            yield started
        finally:
            started.kill()


def line(started: "subprocess.Popen[str]") -> str:
    assert started.stdout is not None
    return started.stdout.readline().strip()


def test_a_sweep_measures_every_run_once(study: Path) -> None:
    seen: list[tuple[int, int]] = []
    with open_store(str(study / "s.db")) as store:
        outcome = run_sweep(store, expansion_of(study), InProcess(study), lambda _, done, total: seen.append((done, total)))
    assert (outcome.total, outcome.measured, outcome.failed) == (13, 13, ())
    assert seen == [(done, 13) for done in range(1, 14)]
    assert check_complete(outcome) == ""
    again = sweep(study)
    assert again.measured == 0
    assert {row.key for row in rows_of(study)} == set(expansion_of(study).runs)


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
        assert [line(driver) for _ in range(4)] == ["open", "row", "row", "row"]
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


def test_two_sweeps_at_once_share_the_work(study: Path) -> None:
    with process(DRIVER, str(study)) as one, process(DRIVER, str(study)) as other:
        outputs = [driver.communicate(timeout=120)[0] for driver in (one, other)]
        assert [driver.returncode for driver in (one, other)] == [0, 0]
    assert sum(int(output.split()[-1]) for output in outputs) == 13
    assert len(rows_of(study)) == 13


CLAIM = """
import sys, time
from fracbit.sweep.store import open_store
store = open_store(sys.argv[1]); store.join(); store.claim(sys.argv[2]); print("claimed", flush=True); time.sleep(60)
"""


def test_a_sweep_waits_for_the_runs_of_another_and_takes_them_over_when_it_dies(study: Path) -> None:
    key = next(iter(expansion_of(study).runs))
    with process(CLAIM, str(study / "s.db"), key) as other:
        assert line(other) == "claimed"
        with process(DRIVER, str(study)) as driver:
            assert [line(driver) for _ in range(13)] == ["open", *["row"] * 12]
            other.kill()
            other.wait()
            output, _ = driver.communicate(timeout=60)
    assert output.split() == ["row", "13"]
