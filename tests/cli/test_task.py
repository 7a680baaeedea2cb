"""`fracbit task` writes what `fracbit eval --tasks` asks; bad input says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fracbit.cli import app
from fracbit.errors import DataError

CLI = CliRunner()


def call(*words: object) -> dict[str, object]:
    result = CLI.invoke(app, [*map(str, words), "--json"])
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def refused(*words: object) -> str:
    result = CLI.invoke(app, [*map(str, words)])
    assert isinstance(result.exception, DataError), result.exception
    return str(result.exception)


@pytest.mark.filterwarnings("ignore")  # the harness and what it brings warn about one another
def test_a_task_file_is_written_and_asked(shared: Path, tmp_path: Path) -> None:
    model, ids = shared / "models" / "tales-xs", shared / "data" / "tales-evaluation.u16"
    source = f"{ids}?length=512&first=20"
    made = call("task", "continuation", source, "--model", model, "-o", tmp_path, "--items", 20)
    assert made == {"task": "continuation", "output": str(tmp_path / "continuation.yaml")}
    assert len((tmp_path / "continuation.jsonl").read_text().splitlines()) == 20
    pytest.importorskip("lm_eval", reason="zero-shot is an extra: fracbit[eval]")
    found = call(
        "eval", model, "--tasks", made["output"], "--limit", 16, "--text", f"{ids}?length=64&first=2"
    )
    (score,) = found["zero_shot"]["scores"]  # type: ignore[index]
    assert (score["task"], score["items"]) == ("continuation", 16)
    assert score["metrics"]["acc"] > 0.25
    assert found["perplexity"] > 1  # type: ignore[operator]
    shown = CLI.invoke(app, ["eval", str(model), "--tasks", str(made["output"]), "--limit", "2"])
    assert "continuation: 2 questions" in shown.stdout
    assert "acc " in shown.stdout


def test_passages_become_a_task(tmp_path: Path) -> None:
    (tmp_path / "passages.jsonl").write_text('{"text": "the last word"}\n')
    made = call("task", "lambada", tmp_path / "passages.jsonl", "-o", tmp_path / "out")
    assert made["task"] == "lambada_local"


def test_bad_input(tmp_path: Path) -> None:
    assert "use continuation or lambada" in refused("task", "cloze", "x", "-o", tmp_path)
    assert "with --model" in refused("task", "continuation", "x", "-o", tmp_path)
    assert "--text for perplexity, --tasks for accuracy" in refused("eval", "bundled")
