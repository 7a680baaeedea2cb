"""The Ray engine: the same rows as in this process; killed workers are replaced."""

# ruff: noqa: E402 - an extra is asked for before it is imported

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("sqlalchemy", reason="the store is an extra: fracbit[store]")
ray = pytest.importorskip("ray", reason="Ray is an extra: fracbit[ray]")

from fracbit.errors import RecipeError
from fracbit.records.row import Row
from fracbit.sweeps import workbench
from fracbit.sweeps.in_process import InProcess
from fracbit.sweeps.ray_engine import Bench, OnRay
from fracbit.sweeps.runner import run_sweep
from fracbit.sweeps.spec import expand, read_sweep
from fracbit.sweeps.store import open_store

pytestmark = [
    pytest.mark.slow,
    # Ray leaves sockets and processes to the interpreter's end.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One local cluster for all tests; an engine joins what is there."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def worker_pids() -> list[int]:
    """Processes of this machine that are actors of ours."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if name.startswith(b"ray::Bench"):
            found.append(int(folder.name))
    return found


def test_rows_equal_those_of_this_process_though_workers_are_killed(study: Path) -> None:
    runs = expand(read_sweep(study / "grid.toml")).runs
    killed: list[int] = []

    def kill_one(row: Row, done: int, total: int) -> None:
        if not killed:
            killed.append(worker_pids()[0])
            os.kill(killed[0], signal.SIGKILL)

    with open_store(str(study / "ray.db")) as store:
        outcome = run_sweep(store, runs, OnRay(study, workers=2), kill_one)
        on_ray = {row.key: row for row in store.rows()}
    assert killed
    assert (outcome.measured, outcome.failed) == (13, ())
    with open_store(str(study / "s.db")) as store:
        run_sweep(store, runs, InProcess(study))
        here = {row.key: row for row in store.rows()}
    assert {key: row.nll for key, row in on_ray.items()} == pytest.approx(
        {key: row.nll for key, row in here.items()}, abs=1e-5
    )
    assert {key: row.stored_bits for key, row in on_ray.items()} == {
        key: row.stored_bits for key, row in here.items()
    }


DRIVER = """
import sys
from pathlib import Path
from fracbit.sweeps.spec import expand, read_sweep
from fracbit.sweeps.ray_engine import OnRay
from fracbit.sweeps.runner import run_sweep
from fracbit.sweeps.store import open_store
root = Path(sys.argv[1])
with open_store(str(root / "s.db")) as store:
    runs = expand(read_sweep(root / "grid.toml")).runs
    run_sweep(store, runs, OnRay(root, sys.argv[2], workers=1), lambda *_: print("row", flush=True))
"""


def test_a_killed_driver_loses_at_most_the_runs_in_flight(study: Path) -> None:
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", DRIVER, str(study), address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert [driver.stdout.readline() for _ in range(3)] == ["row\n"] * 3
        os.kill(driver.pid, signal.SIGKILL)
    with open_store(str(study / "s.db")) as store:
        before = {row.key: row for row in store.rows()}
        assert len(before) >= 3
        outcome = run_sweep(store, expand(read_sweep(study / "grid.toml")).runs, OnRay(study, workers=1))
        assert (outcome.measured, outcome.failed) == (13 - len(before), ())
        after = {row.key: row for row in store.rows()}
    assert len(after) == 13
    assert all(after[key] == row for key, row in before.items())


def test_a_worker_loads_a_model_once(study: Path) -> None:
    runs = [run.model_dump_json() for run in expand(read_sweep(study / "grid.toml")).runs.values()]
    worker = Bench(str(study), "cpu", 1)
    assert Row.model_validate_json(worker.measure(runs[0])).status == "done"
    first = worker.bench
    assert Row.model_validate_json(worker.measure(runs[1])).status == "done"
    assert worker.bench is first
    shutil.copytree(study / "tiny", study / "other")
    worker.measure(runs[1].replace('"tiny"', '"other"'))
    assert worker.bench is not first


def test_a_bug_in_loading_is_kept_going_after(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("no such thing")

    monkeypatch.setattr(workbench, "load_float", broken)
    (run, *_) = [run.model_dump_json() for run in expand(read_sweep(study / "grid.toml")).runs.values()]
    with pytest.raises(KeyError):
        Bench(str(study), "cpu", 1).measure(run)
    row = Row.model_validate_json(Bench(str(study), "cpu", 1, keep_going=True).measure(run))
    assert (row.status, row.error) == ("failed", "a bug of fracbit: KeyError: 'no such thing'")


def test_a_run_whose_worker_always_dies_is_a_failed_row(study: Path) -> None:
    grid = study / "grid.toml"
    one = (
        grid.read_text()
        .replace("[2, 3, 4]", "[2]")
        .replace('["int", "nf"]', '["int"]')
        .replace('[16, "flat:16"]', "[16]")
    )
    model = study / "tiny" / "config.json"
    # A model whose own code ends the process, as the kernel's killer does to one that is too large.
    (study / "tiny" / "deadly.py").write_text(
        "import os\nfrom transformers import LlamaConfig\nclass Deadly(LlamaConfig):\n"
        "    def __init__(self, **fields):\n        super().__init__(**fields)\n        os._exit(9)\n"
    )
    own_code = '"model_type": "deadly", "auto_map": {"AutoConfig": "deadly.Deadly"}'
    model.write_text(model.read_text().replace('"model_type": "llama"', own_code))
    grid.write_text("baseline = false\n" + one)
    trusted = read_sweep(grid).model_copy(update={"trust_remote_code": True})
    with open_store(str(study / "ray.db")) as store:
        outcome = run_sweep(store, expand(trusted).runs, OnRay(study, workers=1, retries=1))
    assert len(outcome.failed) == outcome.total == 1
    assert all("its worker died 2 times" in (row.error or "") for row in outcome.failed)


def test_a_task_that_no_node_holds_is_refused(study: Path) -> None:
    runs = expand(read_sweep(study / "grid.toml")).runs
    with (
        open_store(str(study / "s.db")) as store,
        pytest.raises(RecipeError, match="a worker needs 64 CPUs"),
    ):
        run_sweep(store, runs, OnRay(study, cpus=64))
