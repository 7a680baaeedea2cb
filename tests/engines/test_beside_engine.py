"""`fracbit bench --for ENGINE`: both are run in turns on the same lengths and threads, and the first turn does not count."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import fracbit
from fracbit.bundled import BUNDLED
from fracbit.cli import app
from fracbit.engines.engine import ENGINES
from fracbit.engines.llama_cpp import measure_speed
from fracbit.errors import EngineError, FormatError, RecipeError
from fracbit.pipeline.serve import beside_engine as measured
from fracbit.pipeline.serve.beside_engine import beside_engine
from fracbit.records.generating import Load, Speed

pytest.importorskip("gguf", reason="fracbit[gguf] is not installed")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Path, Load, int]]:
    """What llama.cpp was asked; it answers in place of the program."""
    calls: list[tuple[Path, Load, int]] = []

    def answer(place: Path, export: Path, load: Load, threads: int) -> Speed:
        assert any(export.rglob("*.gguf"))
        calls.append((export, load, threads))
        return Speed(prefill=100.0, decode=10.0 * len(calls))

    engine = replace(ENGINES["llama.cpp"], speed=answer)
    monkeypatch.setattr(measured, "environment", lambda *_: tmp_path / "bin" / "python")
    monkeypatch.setattr(measured, "ENGINES", {"llama.cpp": engine, "mlx": ENGINES["mlx"]})
    return calls


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export in place of GGUF, which knows no tokenizer of small models."""

    def write(checkpoint: str, output: Path, format_: str, **_: object) -> SimpleNamespace:
        assert format_ == "gguf"
        output.mkdir()
        (output / "model.gguf").touch()
        return SimpleNamespace(output=str(output), bytes=1)

    monkeypatch.setattr(measured, "export", write)


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("benched") / "q"
    fracbit.quantize(BUNDLED, folder, "int:step4/32", progress=None)
    return str(folder)


@pytest.mark.usefixtures("exported")
def test_both_take_turns_and_the_first_does_not_count(
    coded: str, asked: list[tuple[Path, Load, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "speed_of", lambda *_: (Speed(50.0, 20.0), None, "a step"))
    found = beside_engine(coded, "llama.cpp", Load(8, 4), turns=3)
    assert [turn.engine.decode for turn in found.turns] == [20.0, 30.0, 40.0]
    assert found.decode == (20 / 30, 0.5, 1.0)
    assert found.prefill == (0.5, 0.5, 0.5)
    assert {(load, threads) for _, load, threads in asked} == {(Load(8, 4), torch.get_num_threads())}
    assert "decode 20.0 beside 30.0: 0.67 times as fast (0.50 to 1.00)" in str(found)
    assert not asked[0][0].exists(), "the export was made for the measurement alone"


@pytest.mark.usefixtures("exported")
def test_on_the_command_line(coded: str, asked: list[tuple[Path, Load, int]]) -> None:
    words = [
        "bench",
        coded,
        "--for",
        "llama.cpp",
        "--turns",
        "2",
        "--prompt-tokens",
        "8",
        "--new-tokens",
        "4",
        "--json",
    ]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    found = json.loads(done.stdout)["engine"]
    assert len(found["turns"]) == 2
    low, middle, high = sorted(found["decode_ratio"])
    assert found["decode_ratio"] == [middle, low, high]


def test_what_cannot_be_compared_is_refused(
    coded: str, asked: list[tuple[Path, Load, int]], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"of llama\.cpp it is"):
        beside_engine(coded, "mlx", Load(8, 4))
    fracbit.quantize(BUNDLED, tmp_path / "q", "nf4/64", progress=None)
    with pytest.raises(FormatError):
        beside_engine(str(tmp_path / "q"), "llama.cpp", Load(8, 4))
    done = CliRunner().invoke(app, ["bench", coded, "--for", "llama.cpp", "--device", "cuda"])
    assert "leave --device cuda out" in str(done.exception)
    done = CliRunner().invoke(app, ["bench", coded, "--for", "llama"])
    assert "did you mean 'llama.cpp'" in str(done.exception)


@pytest.mark.parametrize("said", ["", "{}", "[]", '[{"avg_ts": null}]'])
def test_a_tool_that_fails_is_an_error(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "llama.cpp" / "build" / "bin" / "llama-bench"
    tool.parent.mkdir(parents=True)
    tool.touch()

    def run(*_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(stdout=said, stderr="a\nno such file", returncode=1)

    monkeypatch.setattr("fracbit.engines.llama_cpp.subprocess.run", run)
    with pytest.raises(EngineError, match="no such file"):
        measure_speed(tmp_path, tmp_path / "model.gguf", Load(8, 4), 1)
