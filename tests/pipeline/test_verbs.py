"""The verbs: a plan is carried out whole, text is written once, words are schemes, results print in a few lines."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import fracbit
from families import tiny_llama
from fracbit.bundled import bundled_model
from fracbit.checkpoint import source as checkpoint_source
from fracbit.cli import app
from fracbit.data import samples as calibration_data
from fracbit.errors import DataError, RecipeError, SourceError
from fracbit.pipeline.plan.pruning import prune_by_score
from fracbit.pipeline.study.lens_report import lens_report
from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Recipe, make_recipe, read_toml
from fracbit.records.scheme import Scheme
from fracbit.records.scores import Losses
from fracbit.records.spending import Spending
from outputs import contents, manifest
from texts import SENTENCE, byte_tokenizer, write_ids

LEVELS = "int2z/64,int4z/64"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a byte tokenizer in float32 and in bfloat16, a text, and two files of ids."""
    folder = tmp_path_factory.mktemp("verbs")
    for name, dtype in (("float", torch.float32), ("half", torch.bfloat16)):
        byte_tokenizer(special=False).save_pretrained(folder / name)
        tiny_llama(vocab_size=256, num_hidden_layers=2).to(dtype).save_pretrained(folder / name)
    (folder / "text.txt").write_text(SENTENCE * 30, encoding="utf-8")
    write_ids(folder / "seen.u16", 20, 32)
    write_ids(folder / "unseen.u16", 20, 32, seed=1)
    return folder


def command(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def ids(files: Path, name: str) -> str:
    return f"{files / name}.u16?length=32"


# --- a plan and the run that carries it out ---


def test_a_plan_in_toml_is_the_whole_recipe(files: Path, tmp_path: Path) -> None:
    """Quantizer, calibration, search, head and seed are carried out, not the schemes alone."""
    settings = [
        "quantizer=gptq", f"calibration.texts={ids(files, 'seen')}", "calibration.samples=4", "calibration.length=32",
        "search=true", "seed=3", "head=int8/64", "outliers=cost:0.05", f"spending.levels={LEVELS}",
    ]  # fmt: skip
    words = [word for setting in settings for word in ("--set", setting)]
    path = tmp_path / "plan.toml"
    done = command("plan", files / "float", "--average-bits", "5", "--keep", "*.0.mlp.*", *words, "-o", path)
    assert done.exit_code == 0
    recipe = make_recipe(read_toml(path), path)
    assert (recipe.quantizer, recipe.search, recipe.seed) == ("gptq", True, 3)
    assert recipe.calibration == Calibration(texts=(ids(files, "seen"),), samples=4, length=32)
    assert (str(recipe.head), str(recipe.outliers)) == ("int8/64", "cost:0.05")
    assert path.read_text().startswith("# not compared with a uniform scheme")
    assert command("quantize", path, "-o", tmp_path / "q").exit_code == 0
    words += ["--average-bits", "5", "--keep", "*.0.mlp.*"]
    assert command("quantize", files / "float", "-o", tmp_path / "direct", *words).exit_code == 0
    assert manifest(tmp_path / "q")["texts"] == manifest(tmp_path / "direct")["texts"]
    first, second = (contents(tmp_path / name) for name in ("q", "direct"))
    weights = [name for name in first if name.endswith(".safetensors")]
    assert weights and all(first[name] == second[name] for name in weights)


def test_a_plan_knows_the_recipe_that_carries_it_out(files: Path, tmp_path: Path) -> None:
    made = fracbit.plan(files / "float", Spending(average_bits=3.5, levels=LEVELS))
    result = fracbit.quantize(made.recipe, tmp_path / "q", progress=None)
    assert made.reached == f"{result.bits_per_weight:.4f} bits per weight"
    assert made.predicted_loss == made.chosen.predicted_loss


def test_a_plan_in_json_says_what_it_leaves_out(files: Path, tmp_path: Path) -> None:
    words = ("plan", files / "float", "--average-bits", "3.5", "--set", "search=true", "--set", "seed=1")
    told = command(*words, "-o", tmp_path / "plan.json").stderr
    assert "holds the schemes alone, without search, seed; -o plan.toml is the whole recipe" in told
    assert "holds the schemes alone" not in command(*words, "-o", tmp_path / "plan.toml").stderr


def test_a_scheme_beside_a_budget_is_refused_by_all(files: Path, tmp_path: Path) -> None:
    budget = Spending(average_bits=3.5)
    recipe = Recipe(model=str(files / "float"), scheme=Scheme(bits=3))
    says = "the scheme int3/64, and a budget chooses every layer's scheme"
    for refused in (
        lambda: fracbit.plan(recipe, budget),
        lambda: fracbit.quantize(recipe, tmp_path, spending=budget),
    ):
        with pytest.raises(RecipeError, match=says):
            refused()
    for name in ("plan", "quantize"):
        with pytest.raises(RecipeError, match=says):
            command(
                name,
                files / "float",
                "-o",
                tmp_path / "x.toml",
                "--average-bits",
                3.5,
                "--set",
                "scheme.bits=3",
            )


def test_samples_of_a_budgets_texts_are_its_own_setting(files: Path, tmp_path: Path) -> None:
    """A held-out text of 640 ids is too short for 32 samples of 256 ids; every command takes the same key."""
    texts = {"held_out": ids(files, "unseen"), "text": ids(files, "seen"), "score": "lim"}
    words = ("--average-bits", "3.5", *(w for k, v in texts.items() for w in ("--set", f"spending.{k}={v}")))
    with pytest.raises(DataError, match=r"ask for at most \d+ samples .*spending\.samples"):
        command("quantize", files / "float", "-o", tmp_path / "q", *words)
    sizes = ("--set", "spending.samples=4", "--set", "spending.length=32")
    assert command("quantize", files / "float", "-o", tmp_path / "q", *words, *sizes).exit_code == 0
    done = command("plan", files / "float", *words, "--samples", "4", "--length=32", "--json")
    assert "--samples 4 is now --set spending.samples=4" in done.stderr
    planned = json.loads(done.stdout)
    made = fracbit.plan(files / "float", Spending(average_bits=3.5, samples=4, length=32, **texts))
    assert planned["held_out"]["tokens"] == 4 * 31
    assert planned["candidates"][0]["predicted_loss"] == made.chosen.predicted_loss
    scored = fracbit.score(
        files / "float",
        "lim",
        levels=made.problem.levels,
        granularity="linear",
        text=texts["text"],
        samples=4,
        length=32,
    )
    assert isinstance(scored, Losses)
    assert scored.rows == made.losses.rows


# --- text that the model writes ---


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How often files are opened, skeletons built, models loaded and texts written."""
    counts = dict.fromkeys(("headers", "skeletons", "loads", "texts"), 0)

    def count(what: str, function: Callable[..., object]) -> Callable[..., object]:
        def counting(*args: object, **kwargs: object) -> object:
            counts[what] += 1
            return function(*args, **kwargs)

        return counting

    with monkeypatch.context() as patch:
        for holder, name, what in (
            (checkpoint_source, "_header", "headers"),
            (AutoModelForCausalLM, "from_config", "skeletons"),
            (AutoModelForCausalLM, "from_pretrained", "loads"),
            (calibration_data, "generate_calibration", "texts"),
        ):
            patch.setattr(holder, name, count(what, getattr(holder, name)))
        yield counts


def generated(model: Path) -> Recipe:
    return Recipe(
        model=str(model),
        quantizer="gptq",
        calibration=Calibration(texts=("generated",), samples=6, length=24),
    )


@pytest.mark.parametrize(("name", "loads"), [("float", 1), ("half", 2)])
def test_a_score_and_the_run_after_it_read_one_generated_text(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, loads: int
) -> None:
    """The text is written once, by the model as it is stored; scores read float32, which may be another model in memory."""
    recipe, spending = generated(files / name), Spending(average_bits=3.5, levels=LEVELS, score="lim")
    with counted(monkeypatch) as counts:
        fracbit.quantize(recipe, tmp_path / "q", spending=spending, progress=None)
    assert counts == {"headers": 1, "skeletons": 1, "loads": loads, "texts": 1}
    planned = fracbit.plan(recipe, spending, progress=None)
    with counted(monkeypatch) as counts:
        fracbit.quantize(planned.recipe, tmp_path / "again", progress=None)
    assert counts == {"headers": 1, "skeletons": 1, "loads": 1, "texts": 1}
    first, again = (manifest(tmp_path / folder) for folder in ("q", "again"))
    assert first["texts"] == again["texts"]
    assert first["layers"] == again["layers"]


def test_a_file_called_generated_is_a_file(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    (files / "generated.txt").write_text((files / "text.txt").read_text())
    assert (
        fracbit.evaluate(files / "float", "generated.txt").nll
        == fracbit.evaluate(files / "float", "text.txt").nll
    )
    for text in ("generated", "generated@0.5"):
        with pytest.raises(DataError, match="generated text is for calibration"):
            fracbit.evaluate(files / "float", text)


# --- words in Python ---


def test_a_word_is_a_scheme(files: Path, tmp_path: Path) -> None:
    one = fracbit.quantize(files / "float", tmp_path / "one", "nf4/64", progress=None)
    two = fracbit.quantize(files / "float", tmp_path / "two", Scheme("nf", 4, 64), progress=None)
    assert one.bits_per_weight == two.bits_per_weight
    assert manifest(tmp_path / "one")["layers"] == manifest(tmp_path / "two")["layers"]
    words = fracbit.score(files / "float", "weight-error", levels=("int2z/64", Scheme("nf")), low=Scheme())
    assert isinstance(words, Losses)
    assert words.schemes == (Scheme(bits=2, offset="zero"), Scheme("nf"))


def test_bundled_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert fracbit.quantize("bundled", "q", "int4/64", progress=None).source_bytes > 0
    assert fracbit.plan("bundled", Spending(average_bits=3.5)).problem.weights.layers
    assert fracbit.score("bundled", "zd").values
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "bundled")
    assert checkpoint_source.find_folder("bundled") == Path("bundled")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert checkpoint_source.find_folder("bundled") == bundled_model()
    with pytest.raises(SourceError, match="or bundled"):
        checkpoint_source.find_folder("./bundled")


OWN = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own-llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_models_own_code_runs_where_it_is_trusted(tmp_path: Path) -> None:
    model = tmp_path / "own"
    tiny_llama(num_hidden_layers=3).save_pretrained(model)
    (model / "own.py").write_text(OWN)
    config = json.loads((model / "config.json").read_text()) | {
        "model_type": "own-llama", "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    text = write_ids(tmp_path / "ids.u16", 16, 24)
    size = {"samples": 4, "length": 24}
    verbs: dict[str, Callable[[bool], object]] = {
        "score": lambda trust: fracbit.score(model, "lim", text=text, trust_remote_code=trust, **size),
        "prune": lambda trust: prune_by_score(
            model, tmp_path / "pruned", score="zd", trust_remote_code=trust, overwrite=True
        ),
        "lens": lambda trust: lens_report(
            model,
            text,
            kinds=["gaussian"],
            intensities=[0.1],
            target="weights",
            trust_remote_code=trust,
            **size,
        ),
    }
    for name, verb in verbs.items():
        with pytest.raises(SourceError, match="--trust-remote-code"):
            verb(False)
        assert verb(True) is not None, name
    trusted = fracbit.Recipe(model=str(model), trust_remote_code=True)
    fracbit.quantize(trusted, tmp_path / "trusted", progress=None)
    assert json.loads((tmp_path / "trusted" / "fracbit.json").read_text())["source"]["code"] == ["own.py"]
    assert (tmp_path / "trusted" / "own.py").is_file()
    (tmp_path / "known").mkdir()
    tiny_llama().save_pretrained(tmp_path / "known")
    (tmp_path / "known" / "evil.py").write_text("raise SystemExit")
    known = json.loads((tmp_path / "known" / "config.json").read_text()) | {
        "auto_map": {"AutoConfig": "evil.X"}
    }
    (tmp_path / "known" / "config.json").write_text(json.dumps(known))
    fracbit.quantize(tmp_path / "known", tmp_path / "plain", progress=None)
    assert not (tmp_path / "plain" / "evil.py").exists()
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    for words in (
        ("score", model, "--method", "zd"),
        ("prune", model, "--score", "zd", "-o", tmp_path / "p"),
    ):
        assert command(*words, "--trust-remote-code", "--json").exit_code == 0
    assert "--trust-remote-code" in command("lens", "--help").stdout


# --- what is printed ---


def test_a_plan_prints_in_a_few_lines(files: Path) -> None:
    text = {"text": ids(files, "seen"), "held_out": ids(files, "unseen"), "samples": 4, "length": 32}
    for terms in (
        {"average_bits": 3.5},
        {"size": 127_000},
        {"average_bits": 3.5, "score": "gram-error", **text},
    ):
        made = fracbit.plan(files / "float", Spending(levels=LEVELS, **terms))
        shown = str(made).splitlines()
        assert shown[0] == f"{files / 'float'}: asked for {made.budget}, reached {made.reached}"
        assert made.reached.endswith("bits per weight")
        assert sum(int(part.split(" x ")[0]) for part in shown[1].removeprefix("schemes: ").split(", ")) == 14
        assert shown[2].startswith("predicted loss: ")
        assert shown[-len(made.notes) :] == [f"note: {note}" for note in made.notes]
        assert len(repr(made)) < 2000
        assert "LlamaForCausalLM" not in repr(made) + repr(made.problem)


def test_an_evaluation_prints_in_a_few_lines(files: Path) -> None:
    found = fracbit.evaluate(
        files / "float", files / "text.txt", against=files / "half", window=32, progress=None
    )
    assert str(found).splitlines() == list(found.figures)
    perplexity, protocol, divergence = found.figures
    assert perplexity.startswith(f"perplexity {found.perplexity:.4f} ({found.nll:.5f} nats per token)")
    assert "1349 tokens scored" not in perplexity and "tokens scored, window 32" in protocol
    assert divergence.startswith(f"from {files / 'half'}: KL ")
    assert len(repr(found)) < 2000 and "window_nll" not in repr(found)


def test_the_package_lists_its_verbs_before_they_are_imported() -> None:
    program = "import sys, fracbit; print(*dir(fracbit)); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(fracbit.__all__) <= set(done.stdout.split())
