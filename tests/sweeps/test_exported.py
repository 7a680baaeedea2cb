"""Rows for other programs: CSV, Parquet and frames hold what the store holds; trackers get every row once."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("sqlalchemy", reason="the store is an extra: fracbit[store]")

import fracbit
from fracbit.cli import app
from fracbit.errors import OutputError, RecipeError
from fracbit.records.row import Row, failed_row
from fracbit.sweeps.exported import WRITERS, export_rows, frame, read_rows
from fracbit.sweeps.parquet import import_parquet
from fracbit.sweeps.trackers import figures_of, mlflow, parameters_of, tracking, wandb


@pytest.fixture
def rows(study: Path) -> list[Row]:
    grid = study / "grid.toml"
    grid.write_text(grid.read_text().replace("[2, 3, 4]", "[4]"))
    fracbit.sweep(grid, study / "s.db", progress=None)
    done = read_rows(study / "s.db")
    other = done[0].run.model_copy(update={"recipe": done[0].run.recipe.model_copy(update={"seed": 9})})
    return [*done, failed_row(other, "why, and\nhow")]


def test_every_way_holds_every_row(rows: list[Row], tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    pytest.importorskip("pandas", reason="a frame needs pandas")
    for ending in WRITERS:
        export_rows(rows, tmp_path / f"rows{ending}")
    assert import_parquet(tmp_path / "rows.parquet") == rows
    with (tmp_path / "rows.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    table = frame(rows)
    assert list(table["key"]) == [line["key"] for line in lines] == [row.key for row in rows]
    assert list(table.columns) == list(lines[0])
    for line, row in zip(lines, rows, strict=True):
        assert (float(line["nll"]) if line["nll"] else None) == row.nll
        assert json.loads(line["window_nll"]) == list(row.window_nll)
        assert line["error"] == (row.error or "")
    assert frame(tmp_path / "rows.parquet").equals(table)
    export_rows([], tmp_path / "none.csv")
    assert (tmp_path / "none.csv").read_text().strip() == "key"


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_a_name_that_no_disk_can_hold_is_refused(rows: list[Row], ending: str) -> None:
    with pytest.raises(OutputError, match="no name of a file"):
        export_rows(rows, Path("x" * 5000 + ending))


def test_an_ending_that_names_no_format_is_refused_before_work(study: Path) -> None:
    words = [
        "sweep",
        str(study / "grid.toml"),
        "--store",
        str(study / "s.db"),
        "--export",
        str(study / "rows.xlsx"),
    ]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, OutputError)
    assert ".parquet or .csv" in str(done.exception)
    assert not (study / "s.db").exists()
    with pytest.raises(RecipeError, match="did you mean 'mlflow'"), tracking("mlfow"):
        pass


def test_what_a_tracker_is_told_is_finite_and_named(rows: list[Row]) -> None:
    for row in rows:
        told = parameters_of(row)
        assert told["key"] == row.key
        assert all(isinstance(text, str) for text in told.values())
        assert all(isinstance(value, float) for value in figures_of(row).values())
        assert ("nll" in figures_of(row)) == (row.status == "done")


@pytest.mark.filterwarnings("ignore")  # the client's own
def test_rows_in_mlflow(rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="fracbit[mlflow] is not installed")
    pytest.importorskip("alembic", reason="a local database of MLflow needs alembic")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    for _ in range(2):  # a row is added once
        with mlflow("study") as track:
            for row in rows:
                track(row)
    client = MlflowClient()
    found = client.search_runs([client.get_experiment_by_name("study").experiment_id])
    assert sorted(run.data.params["key"] for run in found) == sorted(row.key for row in rows)
    by_key = {run.data.params["key"]: run for run in found}
    for row in rows:
        run = by_key[row.key]
        assert run.data.metrics.get("nll") == row.nll
        assert run.info.status == ("FAILED" if row.status == "failed" else "FINISHED")


@pytest.mark.filterwarnings("ignore")  # the client's own
def test_rows_in_weights_and_biases(rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="fracbit[wandb] is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    with wandb("study") as track:
        for row in rows[:2]:
            track(row)
    kept = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert sorted(name.rpartition("-")[2] for name in kept) == sorted(row.key for row in rows[:2])
