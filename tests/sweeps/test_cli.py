"""`fracbit sweep` and `fracbit report` from end to end: exit codes, the JSON, the page."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("sqlalchemy", reason="the store is an extra: fracbit[store]")

from fracbit.cli import app
from fracbit.errors import OutputError, RecipeError

CLI = CliRunner()


def sweep(study: Path, *flags: str) -> tuple[int, dict[str, object]]:
    result = CLI.invoke(
        app, ["sweep", str(study / "grid.toml"), "--store", str(study / "s.db"), "--json", *flags]
    )
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, json.loads(result.stdout)


def test_from_grid_to_page(study: Path) -> None:
    code, planned = sweep(study, "--dry-run")
    assert (code, planned["runs"], planned["done"]) == (0, 13, 0)
    assert isinstance(planned["seconds"], float)
    assert not (study / "s.db").exists()
    code, done = sweep(study)
    assert (code, done["measured"], done["failed"]) == (0, 13, [])
    assert sweep(study)[1]["measured"] == 0
    pytest.importorskip("plotly", reason="the page is an extra: fracbit[report]")
    result = CLI.invoke(app, ["report", str(study / "s.db"), "-o", str(study / "r.html"), "--json"])
    assert json.loads(result.stdout)["rows"] == 13
    assert (study / "r.html").stat().st_size > 1e6


def test_rows_move_to_another_store_by_parquet(study: Path) -> None:
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    rows = study / "rows.parquet"
    assert sweep(study, "--export", str(rows))[1]["measured"] == 13
    (study / "s.db").rename(study / "old.db")
    planned = sweep(study, "--import", str(rows), "--dry-run")[1]
    assert (planned["done"], (study / "s.db").exists()) == (13, False)
    assert sweep(study, "--import", str(rows))[1]["measured"] == 0
    pytest.importorskip("plotly", reason="the page is an extra: fracbit[report]")
    for place in (rows, study / "folder"):
        result = CLI.invoke(app, ["report", str(place), "-o", str(study / "r.html"), "--json"])
        assert json.loads(result.stdout)["rows"] == 13
        (study / "folder").mkdir(exist_ok=True)
        shutil.copy(rows, study / "folder")


def test_failed_runs_are_exit_code_1_and_a_list(study: Path) -> None:
    grid = study / "grid.toml"
    grid.write_text(grid.read_text().replace('["tiny"]', '["broken"]').replace("[2, 3, 4]", "[4]"))
    (study / "broken").mkdir()
    result = CLI.invoke(app, ["sweep", str(grid), "--store", str(study / "s.db")])
    assert result.exit_code == 1
    closing = result.stdout[result.stdout.index("5 of 5 runs failed; --retry-failed") :].splitlines()
    assert len(closing) == 3  # one reason for all five, in the order of the sweep
    assert closing[-1].strip().startswith("broken float, broken int4/16, ")
    code, again = sweep(study)
    assert code == 1
    assert len(again["failed"]) == 5  # type: ignore[arg-type]


def test_points_that_are_left_out_are_named_at_the_end(study: Path) -> None:
    """Not only by --dry-run: a sweep that leaves out what was wanted must not look complete."""
    grid = study / "grid.toml"
    head, _, rest = grid.read_text().partition("[calibration]")
    arm = rest[rest.index("[[arm]]") :].replace('["int", "nf"]', '["int"]').replace("[2, 3, 4]", "[4]")
    grid.write_text(f'{head}{arm}quantizers = ["rtn", "gptq"]\n')
    reason = "needs calibration text: add a [calibration] table"
    code, done = sweep(study)
    assert (code, done["runs"], done["skipped"]) == (0, 3, {reason: 2})
    assert sweep(study, "--dry-run")[1]["skipped"] == {reason: 2}
    result = CLI.invoke(app, ["sweep", str(grid), "--store", str(study / "s.db")])
    assert f"2 points left out: {reason}" in result.stdout


def test_a_device_is_not_for_ray(study: Path) -> None:
    result = CLI.invoke(app, ["sweep", str(study / "grid.toml"), "--ray", "--device", "cuda"])
    assert isinstance(result.exception, RecipeError)
    assert "--gpus" in str(result.exception)


def test_a_text_that_is_nowhere_says_where_it_was_looked_for(study: Path) -> None:
    grid = study / "grid.toml"
    grid.write_text(grid.read_text().replace("ids.u16", "none.u16").replace("[2, 3, 4]", "[4]"))
    code, done = sweep(study)
    assert code == 1
    assert f"not below the root of the sweep either: {study}" in str(done["failed"])


@pytest.mark.parametrize(("flag", "value"), [("--workers", "0"), ("--retries", "-1"), ("--cpus", "-1")])
def test_impossible_workers_are_refused(study: Path, flag: str, value: str) -> None:
    result = CLI.invoke(app, ["sweep", str(study / "grid.toml"), "--ray", flag, value])
    assert isinstance(result.exception, RecipeError)


def test_a_report_of_no_store_makes_none(tmp_path: Path) -> None:
    result = CLI.invoke(app, ["report", str(tmp_path / "none.db")])
    assert isinstance(result.exception, OutputError)
    assert not list(tmp_path.iterdir())
