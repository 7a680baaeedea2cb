"""CONTRIBUTING.md: what is new is one new file and one line in its table. Here one of each kind goes through the verbs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import fracbit
from extensions import ALTERNATING, LEDGER, NOTE
from families import tiny_llama
from fracbit.cli import app
from fracbit.numerics import decode
from fracbit.perturbation import perturb
from fracbit.records import tables
from fracbit.records.calibration import Calibration
from fracbit.sweeps.spec import expand, read_sweep
from outputs import manifest
from texts import write_ids

LINES = {
    "DATATYPES": {"squares": "extensions:SQUARES"},
    "QUANTIZERS": {"noted": "extensions:Noted"},
    "COLUMN_RULES": {"leftmost": "extensions:LEFTMOST"},
    "TRANSFORMS": {"zebra": "extensions:ZEBRA"},
    "CORRECTIONS": {"untouched": "extensions:Untouched"},
    "SCORES": {"breadth": "extensions:BREADTH"},
    "PERTURBATIONS": {"alternating": "extensions:ALTERNATING"},
    "FORMATS": {"halves": "extensions:Halves"},
    "ENGINES": {"mirror": "extensions:MIRROR"},
    "TRACKERS": {"ledger": "extensions:ledger"},
}


@pytest.fixture(autouse=True)
def extended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every table with one line more."""
    for table, lines in LINES.items():
        for name, place in lines.items():
            monkeypatch.setitem(getattr(tables, table).entries, name, place)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny_llama(num_hidden_layers=2).save_pretrained(tmp_path / "float")
    write_ids(tmp_path / "ids.u16", 8, 16)
    return tmp_path / "float"


def test_there_is_one_for_every_table() -> None:
    assert set(LINES) == {name for name, table in vars(tables).items() if isinstance(table, tables.Table)}


def test_a_checkpoint_by_nothing_but_extensions(source: Path, tmp_path: Path) -> None:
    plan = Calibration(
        texts=(f"{tmp_path / 'ids.u16'}?length=16",), samples=8, length=16, batch=4, transforms=("zebra",), tweak="untouched",
    )  # fmt: skip
    recipe = fracbit.Recipe(
        model=str(source),
        scheme=fracbit.Scheme("squares", 4, 16),
        quantizer="noted",
        calibration=plan,
        outliers="leftmost:10%",  # type: ignore[arg-type]
    )
    fracbit.quantize(recipe, tmp_path / "q")
    said = manifest(tmp_path / "q")
    blocks = {name: row for name, row in said["layers"].items() if "loss" in row}
    assert len(blocks) == 2 * 7
    assert all(NOTE in row["notes"] for row in blocks.values())
    assert [row["kept"] for row in said["tweaks"]] == ["untouched"] * 2
    packed = fracbit.load(tmp_path / "q").model.layers[1].mlp.gate_proj.packed
    assert packed.columns.tolist() == [0, 1, 2, 3, 4]
    exact = load_file(source / "model.safetensors")["model.layers.1.mlp.gate_proj.weight"]
    wanted = exact[:, :5] * torch.tensor([2.0, 0.5, 2.0, 0.5, 2.0])
    assert torch.allclose(decode(packed)[:, :5], wanted, rtol=2e-3)
    assert fracbit.export(tmp_path / "q", tmp_path / "e", "halves").bytes > 0
    assert {t.dtype for t in load_file(tmp_path / "e" / "halves.safetensors").values()} == {torch.float16}


def test_a_budget_by_a_new_score(source: Path) -> None:
    found = fracbit.score(source, "breadth", granularity="linear")
    assert found.values["model.layers.0.mlp.up_proj"] == 132
    spending = fracbit.Spending(
        average_bits=3.5, score="breadth", solver="order", levels="squares4/16,squares2/16"
    )
    made = fracbit.plan(source, spending)
    first = "model.layers.0.mlp.gate_proj"  # of those with most outputs, the first in the model
    assert made.allocation.schemes[first] == fracbit.Scheme("squares", 4, 16)
    assert len(made.allocation.used()) == 2


def test_new_names_on_the_command_line_and_in_a_grid(source: Path, tmp_path: Path) -> None:
    words = [
        "quantize",
        str(source),
        "-o",
        str(tmp_path / "q"),
        "--scheme",
        "squares3/16",
        "--set",
        "outliers=leftmost:5%",
    ]
    done = CliRunner().invoke(app, [*words, "--quiet"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (tmp_path / "grid.toml").write_text(
        f'models = "{source}"\n[evaluation]\ntext = "ids.u16?length=16"\n[calibration]\ntext = "ids.u16?length=16"\n'
        '[[arm]]\ndtypes = "squares"\nquantizers = "noted"\ntransforms = "zebra"\ncorrections = "untouched"\n'
        'outliers = "leftmost:5%"\n'
    )
    runs = expand(read_sweep(tmp_path / "grid.toml")).runs.values()
    assert sum(run.recipe.quantizer == "noted" for run in runs) == 1


def test_rows_in_a_new_tracker(source: Path, tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text(
        f'models = "{source}"\n[evaluation]\ntext = "ids.u16?length=16"\n[[arm]]\ndtypes = "int"\nbits = 4\nblocks = 16\n'
    )
    LEDGER.clear()
    found = fracbit.sweep(tmp_path / "grid.toml", tmp_path / "s.db", track="ledger:mine", progress=None)
    assert [name for name, _ in LEDGER] == ["mine"] * found.measured
    assert found.measured > 0


def test_a_run_for_a_new_engine(source: Path, tmp_path: Path) -> None:
    made = fracbit.quantize(
        source, tmp_path / "out", spending=fracbit.Spending(engine="mirror"), progress=None
    )
    assert (tmp_path / "out" / "halves.safetensors").is_file()
    found = manifest(Path(made.output))
    assert found["exported"] == "halves"
    assert found["recipe"]["scheme"]["bits"] == 2


def test_a_new_perturbation() -> None:
    assert ALTERNATING.about
    delta = perturb(torch.ones(2, 6), "alternating", 0.5, "row", torch.Generator())
    assert torch.allclose(delta, torch.tensor([0.5, -0.5] * 3).expand(2, 6))


def test_a_misspelt_new_name_is_answered() -> None:
    with pytest.raises(fracbit.errors.RecipeError, match="did you mean 'noted'"):
        tables.QUANTIZERS.check("note")
