"""`fracbit generate`, `chat` and `bench` as commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fracbit.cli import app
from fracbit.errors import DataError, RecipeError, SchemeError

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def model(shared: Path) -> str:
    return str(shared / "models" / "tales-s")


@pytest.fixture(scope="module")
def talker(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(shared / "models" / "tales-s", folder)
    folder.chmod(0o755)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


def test_generate_a_batch(model: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("The cat\n\nA bird\n")
    words = [
        "generate",
        model,
        "--prompt",
        "Once",
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--max-new-tokens",
        "6",
    ]
    found = json.loads(
        CliRunner().invoke(app, [*words, "--json", "--kv-bits", "4"], catch_exceptions=False).stdout
    )
    assert [text.split()[0] for text in found["texts"]] == ["Once", "The", "A"]
    assert found["cache_bytes"] > 0


def test_generate_streams(model: str) -> None:
    done = CliRunner().invoke(
        app, ["generate", model, "Once upon", "--max-new-tokens", "6", "--activations", "int8"]
    )
    assert done.exit_code == 0
    assert done.stdout.startswith("Once upon") and done.stdout.endswith("\n")
    assert "tokens/s" in done.stderr


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--activations", "int3"], RecipeError),
        (["--kv-bits", "5"], SchemeError),
        (["--temperature", "-1"], DataError),
    ],
)
def test_generate_refuses(model: str, words: list[str], error: type[Exception]) -> None:
    assert isinstance(CliRunner().invoke(app, ["generate", model, "Once", *words]).exception, error)


def test_a_seed_that_torch_cannot_hold_is_a_usage_error(model: str) -> None:
    for command in ("generate", "chat"):
        done = CliRunner().invoke(app, [command, model, "--seed", str(2**63)])
        assert done.exit_code == 2
        assert "'--seed'" in done.stderr


def test_generate_without_a_prompt(model: str) -> None:
    assert isinstance(CliRunner().invoke(app, ["generate", model]).exception, DataError)


def test_chat_from_a_pipe(talker: str) -> None:
    done = CliRunner().invoke(
        app, ["chat", talker, "--max-new-tokens", "5"], input="Hello\n\nAgain\n/exit\nNever\n"
    )
    assert done.exit_code == 0, done.exception
    assert done.stderr.count("tokens/s") == 2


def test_chat_needs_a_template(model: str) -> None:
    done = CliRunner().invoke(app, ["chat", model], input="Hello\n")
    assert isinstance(done.exception, DataError)
    assert "chat template" in str(done.exception)


def test_bench_beside_the_float_model(model: str) -> None:
    words = ["bench", model, "--against", model, "--prompt-tokens", "8", "--new-tokens", "3", "--json"]
    found = json.loads(CliRunner().invoke(app, words, catch_exceptions=False).stdout)
    assert found["decode_tokens_per_second"] > 0
    assert found["against"]["file_bytes"] == found["file_bytes"]
