"""Help, version and every error that needs no tensor come before torch and transformers are imported.

All lines below run in one process that cannot import either.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from fracbit.cli import app

FORBIDDEN = """
import contextlib, importlib.abc, io, json, sys

class Forbidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers", "lm_eval"):
            raise AssertionError(f"imports {name}")

sys.meta_path.insert(0, Forbidden())
for name in json.loads(sys.argv[1]):
    sys.modules[name] = None  # as if the package were not installed
from fracbit.cli import main

found = []
for line in json.loads(sys.stdin.read()):
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = ["fracbit", *line]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        except AssertionError as error:
            code = str(error)
    found.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""

ABSENT = "./absent"
OUT = ("-o", "new")
# What is asked for, and what the error says; `model` is the bundled one, `full` a folder that is not empty.
ERRORS: dict[str, str] = {
    "quantize bundled": "name one with -o",
    "quantize bundled -o full": "full is not empty",
    "quantize bundled -o full/file.txt": "is a file; name a folder",
    "quantize bundled -o new.gguf": "write --for llama.cpp",
    "quantize bundled -o new --quantizer gtpq": "did you mean 'gptq'",
    "quantize bundled -o new --quantizer gptq": "give --calibration FILE, or builtin",
    "quantize bundled -o new --quantizer gptq --calibration none.txt": "none.txt: no such file",
    "quantize bundled -o new --preset nice": "unknown preset 'nice'",
    "quantize bundled -o new --preset good": "give --calibration FILE, or builtin",
    "quantize bundled -o new --scheme nope": "is not a scheme",
    "quantize bundled -o new --scheme nff4/64": "did you mean 'nf'",
    "quantize bundled -o new --quantizer awq": "it is a transform: --set calibration.transforms=awq",
    "quantize bundled -o new --quantizer AutoRound": "--set calibration.tweak=train",
    "quantize bundled -o new --bits 3.5": "--average-bits 3.5",
    "quantize bundled -o new --dtype q4_k": "write --for llama.cpp",
    "quantize bundled -o new --dtype fp4": "write fp4_e2m1/64",
    "quantize bundled -o new --scheme W4A16": "write --scheme int4z/128, or --for vllm",
    "quantize bundled -o new --set scheme.dtype=nf4": "--scheme nf4 is a whole scheme",
    "quantize bundled -o new --set scheme.axis=output": "did you mean 'out'",
    "quantize bundled -o new --set scheme.block=rows": "did you mean 'row'",
    "quantize bundled -o new --set scheme.scale=fp46": "did you mean 'fp16'",
    "quantize bundled -o new --set calibration.chain=quant --calibration text.txt": "did you mean 'quantized'",
    "eval bundled --text text.txt?documents=lines": "did you mean 'line'",
    "quantize bundled -o new --for nothing": "unknown engine 'nothing'",
    "quantize bundled -o new --for gptqmodel": "which only reads files",
    "quantize bundled -o new --set sede=3": "did you mean 'seed'",
    "quantize bundled -o new --set outliers=activation:0.1": "give --calibration FILE, or builtin",
    "quantize bundled -o new --set calibration.tweak=best --calibration text.txt": "unknown correction 'best'",
    "quantize bundled -o new --average-bits many": "--average-bits",
    "quantize bundled -o new --size 3XB": "is not a size",
    "quantize bundled -o new --allow-float 2": "--allow-float",
    "quantize bundled none.toml -o new": "none.toml cannot be read",
    "plan bundled": "exactly one of --average-bits",
    "plan bundled --average-bits 3 --score nice": "unknown score 'nice'",
    "plan bundled --average-bits 3 --score lim": "score lim reads text",
    "plan bundled --average-bits 3 --levels four": "is not a scheme",
    "plan bundled --average-bits 3 --picture plan.bmp": "plan.bmp is not a picture",
    "plan bundled --average-bits 3 -o none/plan.json": "is not a folder; make it first",
    "score bundled --method nice": "unknown score 'nice'",
    "score bundled --method lim": "score lim reads text",
    "score bundled --granularity layer": "unknown granularity 'layer'",
    "lens bundled --text none.txt": "none.txt: no such file",
    "lens bundled --text text.txt --kinds gausian": "did you mean 'gaussian'",
    "lens bundled --text text.txt --target all": "unknown target 'all'",
    "lens bundled --text text.txt --granularity layer": "unknown granularity 'layer'",
    "lens bundled --text text.txt --intensities strong": "--intensities takes numbers",
    "prune bundled": "nothing to do",
    "prune bundled -o full": "full is not empty",
    "prune bundled -o new --score nice": "unknown score 'nice'",
    "prune bundled -o new --high four": "is not a scheme",
    "eval bundled": "nothing to measure",
    "eval bundled --text none.txt": "none.txt: no such file",
    "eval bundled --text text.txt --dtype float12": "unknown dtype 'float12'",
    "eval bundled --text text.txt --window 1": "--window",
    f"eval bundled --text text.txt --against {ABSENT}": "no such model",
    "generate bundled": "no prompt",
    "generate bundled x --kv-bits 5": "8 or 4, got 5",
    "generate bundled x --temperature -1": "temperature at least 0",
    "generate bundled x --activations int9": "did you mean 'int8'",
    "chat bundled --kv-bits 5": "8 or 4, got 5",
    "bench bundled --new-tokens 0": "at least 1",
    f"bench bundled --against {ABSENT}": "no such model",
    "export bundled --to ggfu -o new": "did you mean 'gguf'",
    "export bundled --to gptq -o full": "full is not empty",
    "export bundled --to gptq -o new.gguf": "export gguf",
    "tweak bundled --calibration none.txt -o new": "none.txt: no such file",
    "tweak bundled --calibration text.txt -o new --method adam": "name it with against",
    "tweak bundled --calibration text.txt -o full": "full is not empty",
    f"refine bundled --calibration text.txt -o new --against {ABSENT}": "no such model",
    "refine bundled --calibration text.txt -o full --against bundled": "full is not empty",
    "prove bundled --for vlm": "did you mean 'vllm'",
    "task cloze text.txt -o new": "use continuation or lambada",
    "task continuation text.txt -o new": "with --model",
    "task lambada none.txt -o new": "none.txt: no such file",
    "sweep none.toml": "none.toml cannot be read",
    "sweep sweep.toml": "dtypes has no 'itn'",
    "sweep sweep.toml --export rows.xlsx": ".parquet or .csv",
    "sweep sweep.toml --track mlfow": "did you mean 'mlflow'",
    "report none.db": "no store none.db",
    "report none.db --watch": "no store none.db",
    "report none.db --export rows.xlsx": ".parquet or .csv",
    "report none.db --track mlfow": "did you mean 'mlflow'",
    "serve bundled --batch 0": "--batch and --timeout must be above 0",
    "serve bundled --kv-bits 5": "8 or 4, got 5",
    "serve bundled --activations int9": "did you mean 'int8'",
    "bench bundled --for llama": "did you mean 'llama.cpp'",
    "bench bundled --for llama.cpp --device cuda": "leave --device cuda out",
}
# Without the packages of all extras.
EXTRAS = (
    "gguf",
    "matplotlib",
    "plotly",
    "sqlalchemy",
    "pyarrow",
    "datasets",
    "ray",
    "lm_eval",
    "starlette",
    "wandb",
)
WITHOUT: dict[str, str] = {
    "quantize bundled -o new --for llama.cpp": "[gguf]",
    "quantize bundled -o new --quantizer gptq --calibration datasets:some": "[datasets]",
    "export bundled --to gguf -o new": "[gguf]",
    "eval bundled --tasks piqa": "[eval]",
    "eval bundled --text rows.parquet": "[datasets]",
    "plan bundled --average-bits 3 --picture plan.png": "[plots]",
    "sweep sweep.toml": "[store]",
    "sweep sweep.toml --ray": "[ray]",
    "report rows.parquet": "[store]",
    "serve bundled": "[serve]",
}
# What a command needs besides a model, for it to look for the model.
NEEDED = {
    "quantize": OUT, "plan": ("--average-bits", "3"), "eval": ("--text", "text.txt"), "generate": ("x",),
    "export": ("--to", "gptq", *OUT), "tweak": ("--calibration", "text.txt", *OUT), "lens": ("--text", "text.txt"),
    "refine": ("--calibration", "text.txt", "--against", "bundled", *OUT), "prune": OUT,
}  # fmt: skip
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
MODELS = [
    name for name, command in COMMANDS.items() if command.params[0].name in ("model", "checkpoint", "folder")
]


def run(lines: list[list[str]], folder: Path, without: tuple[str, ...] = ()) -> list[tuple[Any, str, str]]:
    """Exit code (or what was imported), stdout and stderr of command lines, in a process without torch."""
    (folder / "full").mkdir(parents=True)
    (folder / "full" / "file.txt").write_text("mine")
    (folder / "text.txt").write_text("some text")
    (folder / "rows.parquet").write_text("")
    (folder / "sweep.toml").write_text(
        'models = "bundled"\n[evaluation]\ntext = "text.txt"\n[[arm]]\ndtypes = "itn"\n'
    )
    done = subprocess.run(
        [sys.executable, "-c", FORBIDDEN, json.dumps(without)],
        input=json.dumps(lines), capture_output=True, text=True, check=False, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    left = {path.name for path in folder.iterdir()}
    assert left == {"full", "text.txt", "rows.parquet", "sweep.toml"}  # nothing is written
    return [(code, out, " ".join(err.split())) for code, out, err in json.loads(done.stdout)]


def test_every_error_that_needs_no_tensor(tmp_path: Path) -> None:
    for line, (code, out, err) in zip(
        ERRORS, run([line.split() for line in ERRORS], tmp_path / "x"), strict=True
    ):
        assert code == 2, (line, code, err)
        assert not out, line
        assert ERRORS[line] in err, (line, err)


def test_a_missing_extra_names_its_command(tmp_path: Path) -> None:
    found = run([line.split() for line in WITHOUT], tmp_path / "x", EXTRAS)
    for line, (code, out, err) in zip(WITHOUT, found, strict=True):
        assert (code, out) == (2, ""), (line, code, err)
        assert "which is not installed: pip install" in err, (line, err)
        assert WITHOUT[line] in err, (line, err)


def test_every_command_refuses_a_model_that_is_not_there(tmp_path: Path) -> None:
    assert len(MODELS) >= 14
    found = run([[name, ABSENT, *NEEDED.get(name, ())] for name in MODELS], tmp_path / "x")
    for name, (code, out, err) in zip(MODELS, found, strict=True):
        assert (code, out) == (2, ""), (name, code, err)
        assert "no such model: ./absent is not a folder" in err, (name, err)


def test_help_and_version(tmp_path: Path) -> None:
    lines = [
        ["--version"],
        ["--help"],
        *([name, "--help"] for name in COMMANDS),
        ["quantize", "--set", "help"],
    ]
    for line, (code, out, err) in zip(lines, run(lines, tmp_path / "x"), strict=True):
        assert (code, err) == (0, ""), (line, code, err)
        assert out, line


@pytest.mark.parametrize(("typed", "meant"), [("./modle", "model"), ("modle", "model")])
def test_a_folder_of_nearly_the_name_is_named(
    typed: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fracbit.checkpoint.place import check_model
    from fracbit.errors import SourceError

    (tmp_path / meant).mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=f"no such model.*did you mean '{meant}'"):
        check_model(typed)
