"""The command line end to end: outputs, JSON alone on stdout, exit codes, interruption."""

from __future__ import annotations

import io
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import fracbit as package
from fracbit.cli import main
from texts import byte_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def process(*words: object) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    command = [sys.executable, "-m", "fracbit", *(str(word) for word in words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def fracbit(*words: object) -> subprocess.CompletedProcess[str]:
    """A command in this process, which has torch already; what is not one of our errors is raised."""
    command = ["fracbit", *(str(word) for word in words)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", command)
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def good(*words: object) -> dict[str, Any]:
    """The one JSON object on stdout of a command that succeeds."""
    done = fracbit(*words, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def bad(*words: object) -> str:
    """The message of a command that exits with 2, without a traceback and without output."""
    done = fracbit(*words)
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    assert not done.stdout
    return " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., LlamaForCausalLM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("cli") / "float"
    byte_tokenizer(special=False).save_pretrained(folder)
    tiny_llama(vocab_size=256).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and over it again. " * 8, encoding="utf-8")
    return path


def test_from_a_model_to_a_smaller_one(model: Path, text: Path, tmp_path: Path) -> None:
    made = good("quantize", model, "-o", tmp_path / "q", "--scheme", "nf4/64")
    assert set(made) == {
        "output", "bits_per_weight", "bits_per_parameter", "bytes", "source_bytes", "seconds", "peak_rss_bytes", "share",
        "notes", "bought",
    }  # fmt: skip
    assert 4 < made["bits_per_weight"] < 4.6
    assert made["bytes"] == (tmp_path / "q" / "model.safetensors").stat().st_size
    seen = good("inspect", tmp_path / "q")
    assert seen["bits_per_weight"] == made["bits_per_weight"]
    assert seen["layers"]["model.layers.0.mlp.up_proj"]["scheme"] == "nf4/64"
    assert 0 < seen["layers"]["model.layers.0.mlp.up_proj"]["relative_error"] < 0.02
    lines = fracbit("inspect", tmp_path / "q").stdout
    assert all(name in lines for name in seen["layers"])
    found = good("eval", tmp_path / "q", "--text", text, "--window", 64, "--against", model)
    assert {"perplexity", "nll", "tokens", "protocol"} <= set(found)
    assert found["protocol"]["window"] == 64
    assert found["divergence"]["against"] == str(model)
    written = good("generate", tmp_path / "q", "def main(", "--max-new-tokens", 8)
    assert written["new_tokens"] == 8
    assert written["text"].startswith("def main(")


def test_a_process_prints_one_object_and_says_with_its_exit_code_how_it_went(
    model: Path, tmp_path: Path
) -> None:
    done = process("quantize", model, "-o", tmp_path / "q", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(tmp_path / "q")
    refused = process("quantize", model, "-o", tmp_path / "q")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("fracbit: error: ")
    assert "Traceback" not in refused.stderr


def test_the_version_is_the_packages() -> None:
    assert process("--version").stdout == f"fracbit {package.__version__}\n"


def test_options_of_a_quantizer_reach_the_output(model: Path, text: Path, tmp_path: Path) -> None:
    losses = {}
    for number, word in enumerate(("gptq", "gptq:damping=0.5", "gptq:rounds=3")):
        out = tmp_path / str(number)
        settings = ("--calibration", text, "--set", "calibration.samples=4", "--set", "calibration.length=32")
        good("quantize", model, "-o", out, "--scheme", "int3/32", "--quantizer", word, *settings)
        made = json.loads((out / "fracbit.json").read_text())
        assert made["recipe"]["quantizer"] == word
        losses[word] = sum(layer.get("loss", 0.0) for layer in made["layers"].values())
    assert losses["gptq:rounds=3"] < losses["gptq"] < losses["gptq:damping=0.5"]
    wrong = bad("quantize", model, "-o", tmp_path / "no", "--quantizer", "gptq:dampng=1", *settings)
    assert "quantizer gptq has no key 'dampng'; did you mean 'damping'" in wrong
    assert not (tmp_path / "no").exists()


def test_a_finished_output_is_not_made_again(model: Path, tmp_path: Path) -> None:
    made = fracbit("quantize", model, "-o", tmp_path / "q")
    assert made.returncode == 0
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "q").iterdir()}
    again = fracbit("quantize", model, "-o", tmp_path / "q", "--resume")
    assert again.returncode == 0
    assert "note: already finished: nothing to do" in again.stderr
    assert again.stdout.startswith(f"{tmp_path / 'q'}: 4.")
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "q").iterdir()}


def test_an_export_is_a_checkpoint_that_transformers_loads_alone(
    model: Path, text: Path, tmp_path: Path
) -> None:
    good("quantize", model, "-o", tmp_path / "q", "--scheme", "int4z/32")
    made = good("export", tmp_path / "q", "--to", "float:fp32", "-o", tmp_path / "plain")
    assert made == {
        "output": str(tmp_path / "plain"),
        "format": "float:fp32",
        "bytes": sum(path.stat().st_size for path in (tmp_path / "plain").glob("*.safetensors")),
        "requantized": {},
        "floats": [],
        "divergence": None,
        "warnings": [],
    }
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    stored, plain = (
        good("eval", tmp_path / name, "--text", text, "--window", 64, "--dtype", "float32")["nll"]
        for name in ("q", "plain")
    )
    assert stored == pytest.approx(plain, abs=1e-5)
    assert "not empty" in bad("export", tmp_path / "q", "--to", "float", "-o", tmp_path / "plain")
    assert "did you mean 'float'" in bad("export", tmp_path / "q", "--to", "flaot", "-o", tmp_path / "x")
    assert "is not a fracbit checkpoint" in bad("export", model, "--to", "float", "-o", tmp_path / "x")


def test_quiet_says_nothing_on_stderr(model: Path, text: Path, tmp_path: Path) -> None:
    run = ("quantize", model, "--calibration", text, "--quantizer", "gptq", "--samples", 4, "--length", 16)
    loud = fracbit(*run, "-o", tmp_path / "loud")
    assert "note: --samples 4 is now --set calibration.samples=4" in loud.stderr
    quiet = fracbit(*run, "-o", tmp_path / "quiet", "--quiet")
    assert (quiet.returncode, quiet.stderr) == (0, "")
    assert "bits per weight" in quiet.stdout


def test_perplexity_is_transformers_own(model: Path, text: Path) -> None:
    import torch

    from fracbit.checkpoint.load import load, load_tokenizer

    ids = load_tokenizer(model)(text.read_text(), return_tensors="pt").input_ids[:, :100]
    loaded = load(model)
    with torch.no_grad():
        loss = float(loaded(ids, labels=ids).loss)
    assert good("eval", model, "--text", f"{text}?keep=100", "--window", 100)["nll"] == pytest.approx(
        loss, abs=1e-4
    )


def test_a_recipe_and_flags_over_it(model: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        '[scheme]\ndtype = "nf"\nbits = 3\nblock = 32\n[embeddings]\nbits = 8\n'
    )
    made = good(
        "quantize",
        model,
        tmp_path / "recipe.toml",
        "-o",
        tmp_path / "q",
        "--set",
        "scheme.bits=2",
        "--keep",
        "*.layers.1.*",
    )
    layers = good("inspect", tmp_path / "q")["layers"]
    assert layers["model.layers.0.mlp.up_proj"]["scheme"] == "nf2/32"
    assert layers["model.layers.1.mlp.up_proj"]["scheme"] == "f32"
    assert layers["model.embed_tokens"]["scheme"] == "int8/64"
    assert made["output"] == str(tmp_path / "q")


def test_a_recipe_that_names_its_model(model: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(f"model = '{model}'\n[scheme]\nbits = 3\n")
    assert 3 < good("quantize", tmp_path / "recipe.toml", "-o", tmp_path / "q")["bits_per_weight"] < 4


def test_bad_input(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    assert "no such model" in bad("quantize", tmp_path / "none", "-o", out)
    assert "name one with -o" in bad("quantize", model)
    assert "no model" in bad("quantize", "-o", out)
    assert "from 1 to 8, got 9" in bad("quantize", model, "-o", out, "--scheme", "int9/64")
    assert "did you mean 'kmeans'" in bad("quantize", model, "-o", out, "--scheme", "kmean4/64")
    assert "flat:N" in bad("quantize", model, "-o", out, "--set", "scheme.block=sixty")
    (tmp_path / "r.toml").write_text("sede = 3\n")
    assert "line 1: a recipe has no key 'sede'" in bad("quantize", model, tmp_path / "r.toml", "-o", out)
    (tmp_path / "r.toml").write_text("[scheme]\ndtype = 'nf'\nbitz = 3\n")
    assert "line 3: a scheme has no key 'bitz'" in bad("quantize", model, tmp_path / "r.toml", "-o", out)
    (tmp_path / "r.toml").write_text("scheme = 4\noverrides = 3\n")
    assert "write it as a table, [scheme]" in bad(
        "quantize", model, tmp_path / "r.toml", "-o", out, "--set", "scheme.bits=3"
    )
    assert "write it as a table, [[overrides]]" in bad(
        "quantize", model, tmp_path / "r.toml", "-o", out, "--keep", "x"
    )
    assert "matches no layer" in bad("quantize", model, "-o", out, "--keep", "nothing")
    assert not out.exists()
    out.mkdir()
    (out / "mine").write_text("")
    assert "not empty" in bad("quantize", model, "-o", out)
    assert "no tokens" in bad("generate", model, "")
    assert "128 positions" in bad("generate", model, "def", "--max-new-tokens", 1000, "--json")
    assert "unknown dtype 'float12'" in bad("eval", model, "--text", text, "--dtype", "float12")
    assert "device 'nonsense' cannot be used" in bad("generate", model, "x", "--device", "nonsense")
    assert "not an id of this model" in bad("eval", model, "--text", text, "--bos", 256)
    assert "none.txt" in bad("eval", model, "--text", tmp_path / "none.txt")
    assert "window" in bad("eval", model, "--text", text, "--window", 1)
    assert "window" in bad("eval", model, "--text", text, "--window", 100_000)
    assert bad("eval", model, "--text", text, "--stride", 0)
    (tmp_path / "empty.txt").write_text("")
    assert "empty" in bad("eval", model, "--text", tmp_path / "empty.txt").lower()


@pytest.mark.slow
def test_interrupted_it_stops_cleanly_and_resumes(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    """The model is large enough to be at work for seconds after the plan is on the disk."""
    larger = tiny_llama(hidden_size=128, intermediate_size=384, num_hidden_layers=4)
    larger.save_pretrained(tmp_path / "float")
    plan = tmp_path / "q" / ".fracbit" / "plan.json"
    command = [sys.executable, "-m", "fracbit", "quantize", str(tmp_path / "float"), "-o", str(tmp_path / "q"),
               "--scheme", "kmeans:row4/64", "--set", "search=true", "--set", "run.shard_mb=1"]  # fmt: skip
    # A runner in the background hands down an ignored SIGINT, which Python would keep ignoring.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    deadline = time.monotonic() + 120
    while not plan.exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in said
    assert f"kept in {tmp_path / 'q'}" in said
    onwards = shlex.split(said.partition("go on with: ")[2])
    assert onwards[0] == "fracbit"
    assert onwards[-1] == "--resume"
    assert fracbit(*onwards[1:]).returncode == 0
    assert good("inspect", tmp_path / "q")["bits_per_weight"] > 4


def test_the_bundled_demo(tmp_path: Path) -> None:
    rows = {row["scheme"]: row for row in good("demo", "-o", tmp_path / "demo")["rows"]}
    assert len(rows) >= 7
    float_perplexity = rows["float"]["perplexity"]
    assert rows["int3-64"]["perplexity"] > 1.1 * float_perplexity
    assert rows["int2-64"]["perplexity"] > 2 * float_perplexity
    assert rows["int8-64"]["perplexity"] < 1.01 * float_perplexity
    assert (tmp_path / "demo" / "nf4-64" / "config.json").exists()
    assert len({row["step"] for name, row in rows.items() if name != "float"}) == 1


def test_the_demo_shows_speeds_of_one_kind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A float model that decodes in another way than the quantized ones has no speed beside them."""
    from fracbit.cli import demo

    def row(name: str, step: str, speed: float) -> dict[str, Any]:
        figures = {
            "bits_per_weight": 4.0,
            "bytes": 1000,
            "perplexity": 9.0,
            "tokens_per_second": speed,
            "protocol": "p",
        }
        return {"scheme": name, "step": step, **figures}

    monkeypatch.setattr(demo, "_measure", lambda name, *rest: row(name, "layer by layer", 601))
    monkeypatch.setattr(demo, "_quantize", lambda name, *rest, **more: row(name, "native step", 11_000))
    demo.demo(quiet=True)
    shown = capsys.readouterr().out
    assert "11000" in shown
    assert "601" not in shown
    assert "tokens/s of float is left out: it decodes in another way (layer by layer)" in shown
    monkeypatch.setattr(demo, "_measure", lambda name, *rest: row(name, "native step", 601))
    demo.demo(quiet=True)
    assert "601" in capsys.readouterr().out


def test_on_a_model_nobody_here_trained(shared: Path, tmp_path: Path) -> None:
    """../shared's README: int with zero point, block 64, fp32 scales, first 256 ids of 60 documents; as ratios to float."""
    source, text = shared / "models" / "tales-s", shared / "data" / "tales-evaluation.u16"
    float_perplexity = good("eval", source, "--text", f"{text}?length=512&first=60&keep=256")["perplexity"]
    for bits, expected in [(4, 5.00 / 4.88), (3, 5.65 / 4.88), (2, 21.5 / 4.88)]:
        out = tmp_path / str(bits)
        good("quantize", source, "-o", out, "--scheme", f"int{bits}z/64 s=fp32")
        found = good("eval", out, "--text", f"{text}?length=512&first=60&keep=256")
        assert found["perplexity"] / float_perplexity == pytest.approx(expected, rel=0.03)
