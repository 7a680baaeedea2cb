"""Grids: expansion, exclusions, illegal points, errors that name their line."""

from pathlib import Path

import pytest

from fracbit.errors import RecipeError
from fracbit.records.outliers import read_outliers
from fracbit.records.row import Run, label, run_key
from fracbit.records.tables import COLUMN_RULES
from fracbit.sweeps.spec import Expansion, expand, read_sweep

HEAD = 'models = ["a", "b"]\n[evaluation]\ntext = "t.txt"\n'


def expanded(tmp_path: Path, text: str) -> Expansion:
    path = tmp_path / "grid.toml"
    path.write_text(HEAD + text)
    return expand(read_sweep(path))


def refused(tmp_path: Path, text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        expanded(tmp_path, text)
    return str(caught.value)


def test_the_product_of_all_lists_and_a_baseline_per_model(tmp_path: Path) -> None:
    found = expanded(tmp_path, '[[arm]]\ndtypes = ["int", "nf"]\nbits = [3, 4]\nblocks = [64, "row"]\n')
    assert len(found.runs) == 2 * (1 + 2 * 2 * 2)
    assert found.models == ("a", "b")
    assert not found.skipped
    assert {label(run) for run in found.runs.values() if not run.quantized} == {"a float", "b float"}


def test_keys_name_runs(tmp_path: Path) -> None:
    runs = expanded(tmp_path, "[[arm]]\nbits = [2, 3]\n").runs
    assert all(run_key(run) == key for key, run in runs.items())
    assert run_key(Run.model_validate_json(next(iter(runs.values())).model_dump_json())) == next(iter(runs))


def test_a_single_value_needs_no_list(tmp_path: Path) -> None:
    runs = expanded(tmp_path, '[[arm]]\nbits = 3\ndtypes = "nf"\n').runs
    assert "a nf3/64" in {str(run) for run in runs.values()}


def test_exclusions_match_all_of_their_keys(tmp_path: Path) -> None:
    text = '[[arm]]\ndtypes = ["int", "nf"]\nbits = [3, 4]\n[[arm.exclude]]\ndtype = "nf"\nbits = [4]\n'
    text += '[[exclude]]\nmodel = "b"\n'
    found = expanded(tmp_path, text)
    assert {str(run) for run in found.runs.values()} == {
        "a float",
        "b float",
        "a int3/64",
        "a int4/64",
        "a nf3/64",
    }
    assert found.skipped == {"excluded by the sweep": 5}


def test_points_that_no_scheme_expresses_are_counted_with_their_reason(tmp_path: Path) -> None:
    found = expanded(tmp_path, '[[arm]]\nbits = [1, 2]\noffsets = ["none", "zero"]\n')
    assert sum(found.skipped.values()) == 2
    assert any("1-bit int" in reason for reason in found.skipped)


def test_runs_of_two_arms_are_one(tmp_path: Path) -> None:
    found = expanded(tmp_path, "[[arm]]\nbits = [3, 4]\n[[arm]]\nbits = [4, 5]\n")
    assert len(found.runs) == 2 * 4
    assert found.skipped == {"named by an earlier arm": 2}


def test_activation_chosen_columns_need_calibration_text(tmp_path: Path) -> None:
    arm = '[[arm]]\noutliers = ["proxy:2%", "activation:0.02"]\n'
    found = expanded(tmp_path, arm)
    assert any("[calibration]" in reason for reason in found.skipped)
    complete = expanded(tmp_path, '[calibration]\ntext = "c.txt"\n' + arm)
    seen = {str(run.recipe.outliers): run.recipe.calibration is not None for run in complete.runs.values()}
    assert seen == {"None": False, "proxy:0.02": False, "activation:0.02": True}


def test_whatever_column_rule_reads_energy_needs_calibration_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only the one called activation."""
    for name, attribute in (("loudest", "ACTIVATION"), ("activation-free", "COST")):
        monkeypatch.setitem(COLUMN_RULES.entries, name, f"fracbit.quantizers.columns:{attribute}")  # type: ignore[arg-type]
    arm = '[[arm]]\noutliers = ["loudest:0.02", "activation-free:0.02"]\n'
    runs = expanded(tmp_path, '[calibration]\ntext = "c.txt"\n' + arm).runs.values()
    seen = {str(run.recipe.outliers): run.recipe.calibration is not None for run in runs if run.quantized}
    assert seen == {"loudest:0.02": True, "activation-free:0.02": False}


def test_seeds_are_one_run_where_nothing_is_drawn(tmp_path: Path) -> None:
    found = expanded(tmp_path, '[[arm]]\nseeds = [0, 1, 2]\noutliers = ["none", "proxy:2%", "random:2%"]\n')
    assert [run.recipe.seed for run in found.runs.values() if run.quantized] == 2 * [0, 0, 0, 1, 2]
    assert found.skipped == {"another seed of a run that draws nothing at random": 2 * 4}
    drawn = expanded(
        tmp_path, '[calibration]\ntext = "c.txt"\n[[arm]]\nquantizers = "gptq"\nseeds = [1, 2]\n'
    )
    assert [run.recipe.seed for run in drawn.runs.values() if run.quantized] == 2 * [1, 2]
    alone = expanded(tmp_path, "[[arm]]\nseeds = 3\n[[arm]]\n")
    assert {run.recipe.seed for run in alone.runs.values()} == {0}
    assert alone.skipped == {"named by an earlier arm": 2}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[arm]]\nbits = 4\n[[arm]]\nbist = 3\n", "line 7: [[arm]] has no key 'bist'; did you mean 'bits'"),
        ('[[arm]]\ndtypes = ["int", "nff"]\n', "line 5: dtypes has no 'nff'; did you mean 'nf'"),
        ('[[arm]]\nbits = 4\nquantizers = "rnt"\n', "line 6: quantizers has no 'rnt'"),
        (
            '[[arm]]\nquantizers = "gptq:rounds=-1"\n',
            "line 5: rounds is '-1'; it should be greater than or equal to 0",
        ),
        ('[[arm]]\nquantizers = "rtn:damping=1"\n', "line 5: quantizer rtn has no key 'damping'"),
        ("[[arm]]\nbits = [4, 9]\n", "line 5: bits must be an integer from 1 to 8"),
        ("[[arm]]\nblocks = [0]\n", "line 5: unknown block 0"),
        ('[[arm]]\nbits = "four"\n', "line 5: arm.0.bits.0"),
        ('[[arm]]\noutliers = "proxy:2"\n', "line 5: outliers 'proxy:2'"),
        ("[[arm]]\n[[arm.exclude]]\nbit = 3\n", "line 6: [[exclude]] has no key 'bit'"),
        ("[[arm]]\n[extra]\nx = 1\n", "line 5: a sweep has no key 'extra'"),
        ("", "arm: Field required"),
        ("[[arm]\n", "is not TOML"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refused(tmp_path, text)


def test_an_unknown_key_of_a_table_names_its_own_line(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text('models = "a"\n[evaluation]\ntext = "x"\nwindows = 4\n[[arm]]\n')
    with pytest.raises(RecipeError, match=r"line 4.*no key 'windows'; did you mean 'window'"):
        read_sweep(path)


def test_a_grid_without_runs_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text('models = "a"\nbaseline = false\n[evaluation]\ntext = "x"\n[[arm]]\nbits = 1\n')
    with pytest.raises(RecipeError, match="no runs"):
        expand(read_sweep(path))


def test_a_missing_file_is_an_error() -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        read_sweep(Path("/nowhere/grid.toml"))


@pytest.mark.parametrize("text", ["proxy", "proxy:0", "proxy:1.0", "proxy:100%", "most:0.1", ""])
def test_outliers_that_cannot_be_read(text: str) -> None:
    with pytest.raises(RecipeError, match=r"outliers|unknown column rule"):
        read_outliers(text)


def test_outliers_are_a_choice_and_a_share() -> None:
    assert read_outliers("none") is None
    assert str(read_outliers("random:2%")) == "random:0.02"
