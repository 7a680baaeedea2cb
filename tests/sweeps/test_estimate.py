"""Estimates come from stored rows, else from other models' rows or a probe scaled by parameters, else are unknown."""

from pathlib import Path
from shutil import copytree

import pytest

from fracbit.records.row import Row
from fracbit.sweeps.estimate import Probe, cheapest, estimate, estimate_sweep, parameters_of
from fracbit.sweeps.spec import Expansion, expand, read_sweep


def expansion_of(study: Path) -> Expansion:
    grid = study / "grid.toml"
    grid.write_text(grid.read_text().replace('["tiny"]', '["tiny", "away/model"]'))
    return expand(read_sweep(grid))


def rows_of(expansion: Expansion, count: int) -> list[Row]:
    chosen = list(expansion.runs.items())[2 : 2 + count]
    return [Row(key=key, run=run, status="done", parameters=1000, seconds=2.0) for key, run in chosen]


def test_parameters_are_read_from_the_file(study: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(study / "tiny")
    assert parameters_of("tiny", study) == sum(parameter.numel() for parameter in model.parameters())
    assert parameters_of("away/model", study) is None
    assert parameters_of("bundled", study) == 252_080


def test_a_folder_called_bundled_comes_first(study: Path, tmp_path: Path) -> None:
    copytree(study / "tiny", tmp_path / "bundled")
    assert parameters_of("bundled", tmp_path) == parameters_of("tiny", study)


def test_nothing_is_known_without_rows_or_sizes(study: Path) -> None:
    found = estimate(expansion_of(study), [], {"tiny": None, "away/model": None})
    assert (found.runs, found.done, found.seconds) == (26, 0, None)
    assert found.disk_bytes > 0


def test_own_rows_come_first_then_those_of_others_by_size(study: Path) -> None:
    expansion = expansion_of(study)
    found = estimate(expansion, rows_of(expansion, 3), {"tiny": 1000, "away/model": 5000}, Probe(1000, 99.0))
    tiny, away = found.models
    assert (tiny.done, tiny.seconds) == (3, pytest.approx(2.0 * 10))
    assert away.seconds == pytest.approx(2.0 * 5 * 13)
    assert found.seconds == pytest.approx(20 + 130)


def test_rows_judged_otherwise_tell_nothing(study: Path) -> None:
    expansion = expansion_of(study)
    rows = rows_of(expansion, 3)
    other = rows[0].run.evaluation.model_copy(update={"tasks": ("cloze.yaml",)})
    rows = [row.model_copy(update={"run": row.run.model_copy(update={"evaluation": other})}) for row in rows]
    assert estimate(expansion, rows, {"tiny": 1000}).seconds is None


def test_a_probe_stands_in_for_rows(study: Path) -> None:
    expansion = expansion_of(study)
    run = cheapest(expansion, {"tiny": 1000, "away/model": None})
    assert run is not None
    assert run.quantized
    assert run.recipe.model == "tiny"
    found = estimate(expansion, [], {"tiny": 1000, "away/model": None}, Probe(1000, 0.5))
    assert [model.seconds for model in found.models] == [pytest.approx(0.5 * 13), None]


def test_a_sweep_is_estimated_from_its_store_or_from_one_run(study: Path) -> None:
    pytest.importorskip("sqlalchemy", reason="the store is an extra: fracbit[store]")
    expansion = expand(read_sweep(study / "grid.toml"))
    place = study / "s.db"
    found = estimate_sweep(expansion, str(place), study)
    assert found.models[0].basis == "one run measured now, by parameters"
    assert found.seconds is not None
    assert not place.exists(), "an estimate makes no store"
    known = rows_of(expansion, 3)
    assert estimate_sweep(expansion, str(place), study, known=known).seconds == pytest.approx(2.0 * 10)
    from fracbit.sweeps.store import open_store

    with open_store(str(place)) as store:
        store.add(known)
    assert estimate_sweep(expansion, str(place), study).done == 3


def test_a_run_that_fails_tells_no_time_but_why(study: Path) -> None:
    (study / "tiny" / "config.json").write_text("{}")
    found = estimate_sweep(expand(read_sweep(study / "grid.toml")), str(study / "s.db"), study)
    assert found.seconds is None
    assert found.models[0].basis.startswith("unknown: the run measured for the estimate failed: ")


def test_a_finished_grid_takes_no_time(study: Path) -> None:
    expansion = expansion_of(study)
    rows = [Row(key=key, run=run, status="done") for key, run in expansion.runs.items()]
    found = estimate(expansion, rows, {})
    assert (found.seconds, found.disk_bytes) == (0, 0)
