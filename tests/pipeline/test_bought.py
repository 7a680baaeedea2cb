"""What a run bought: its checkpoint beside the float model, walked in the memory of a block, is what whole models give."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from typer.testing import CliRunner

import families
import fracbit
from fracbit.checkpoint.load import load
from fracbit.checkpoint.opened import open_float
from fracbit.cli import app
from fracbit.models.experts import split_experts
from fracbit.pipeline.improve import bought as compared
from fracbit.pipeline.improve.bought import bought
from fracbit.pipeline.quantize.run import write_checkpoint
from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Recipe
from fracbit.records.run import Bought
from texts import byte_tokenizer, write_ids

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("texts") / "ids.u16"
    write_ids(path, 24, 24, families.VOCABULARY)
    return f"{path}?length=24"


def whole(recipe: Recipe, folder: Path, ids: str) -> tuple[float, float, float]:
    """Losses of the float and of the quantized model, and the divergence, from both models in memory."""
    samples = compared._samples(open_float(recipe.model), ids).ids  # [samples, tokens]
    logs = []
    for place in (recipe.model, folder):
        model = load(place, "float32")
        split_experts(model)
        with torch.no_grad():
            logs.append(torch.log_softmax(model(samples).logits[:, :-1].float(), dim=-1))
    right, found = logs
    nll = [float(-each.gather(2, samples[:, 1:, None]).mean()) for each in logs]
    return nll[0], nll[1], float((right.exp() * (right - found)).sum(-1).mean())


@pytest.mark.parametrize("name", [*families.CONFIGS, "starcoder2"])
def test_it_is_what_whole_models_give(name: str, ids: str, tmp_path: Path) -> None:
    families.model_of(name).save_pretrained(tmp_path / "float")
    recipe = Recipe(model=str(tmp_path / "float"), scheme="int3z/16", embeddings="int6/16")
    write_checkpoint(recipe, tmp_path / "q")
    found = bought(recipe, tmp_path / "q", 0.0, ids)
    assert isinstance(found, Bought), found
    expected = whole(recipe, tmp_path / "q", ids)
    assert (found.float_nll, found.nll, found.kl) == pytest.approx(expected, rel=5e-3, abs=1e-5)


SETTINGS: dict[str, dict[str, Any]] = {
    "columns": {"outliers": "cost:0.05"},
    "inputs": {"calibration": {"inputs": "int8/token"}},
    "rotated": {"calibration": {"transforms": ("rotate", "rotate-mlp")}},
    "moved norms": {"calibration": {"tweak": "closed", "transforms": ("smooth",)}},
    "head": {"head": "int8/16"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_whatever_the_run_did(name: str, ids: str, tmp_path: Path) -> None:
    families.model_of("llama").save_pretrained(tmp_path / "float")
    given = dict(SETTINGS[name])
    if "calibration" in given:
        given["calibration"] = Calibration(texts=(ids,), samples=8, length=16, **given["calibration"])
    recipe = Recipe(model=str(tmp_path / "float"), scheme="int4z/16", **given)
    write_checkpoint(recipe, tmp_path / "q")
    found = bought(recipe, tmp_path / "q", 0.0, ids)
    assert isinstance(found, Bought), found
    expected = whole(recipe, tmp_path / "q", ids)
    assert (found.float_nll, found.nll, found.kl) == pytest.approx(expected, rel=5e-3, abs=1e-5)


def test_a_run_ends_with_it(tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> None:
    folder, out = tmp_path / "float", tmp_path / "q"
    tiny_llama(vocab_size=256).save_pretrained(folder)
    byte_tokenizer(special=False).save_pretrained(folder)
    run = ["quantize", str(folder), "--scheme", "nf4/64"]
    shown = CliRunner().invoke(app, [*run, "-o", str(out)])
    assert shown.exit_code == 0, shown.output
    assert "tokens of builtin:held-out: perplexity" in shown.stdout
    assert f"next: fracbit generate {out}" in shown.stderr
    again = CliRunner().invoke(app, [*run, "-o", str(out), "--resume"])
    assert "builtin" not in again.stdout
    made = json.loads(CliRunner().invoke(app, [*run, "-o", str(tmp_path / "j"), "--json"]).stdout)
    assert made["bought"]["text"] == "builtin:held-out"
    assert 0 < made["bought"]["kl"] < 0.1
    off = [*run, "-o", str(tmp_path / "k"), "--json", "--set", "run.compare=false"]
    assert json.loads(CliRunner().invoke(app, off).stdout)["bought"] is None
    served = CliRunner().invoke(
        app, [*run[:2], "-o", str(tmp_path / "e"), "--for", "vllm-cpu", "--scheme", "int4z/16"]
    )
    assert served.exit_code == 0, served.output
    assert f"next: fracbit prove {tmp_path / 'e'}" in served.stderr


def test_why_there_is_none_is_a_note(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llama(vocab_size=256).save_pretrained(tmp_path / "float")
    made = fracbit.quantize(tmp_path / "float", tmp_path / "a", compare=True, progress=None)
    assert made.bought is None
    assert any("not compared with the float model: builtin:held-out is text" in note for note in made.notes)
    byte_tokenizer(special=False).save_pretrained(tmp_path / "float")
    monkeypatch.setattr(compared, "PATIENCE", 0.0)
    made = fracbit.quantize(tmp_path / "float", tmp_path / "b", compare=True, progress=None)
    assert made.bought is None
    assert any("not compared with the float model, which would take" in note for note in made.notes)
    assert fracbit.quantize(tmp_path / "float", tmp_path / "c", progress=None).bought is None


def test_a_broken_model_is_told_from_a_good_one() -> None:
    good = Bought("t", 100, float_nll=3.0, nll=3.2, kl=0.1, agreement=0.8)
    assert good.warning() == ()
    for nll in (4.5, math.inf, math.nan):
        bad = Bought("t", 100, float_nll=3.0, nll=nll, kl=nll, agreement=0.0)
        assert "this model is broken" in bad.warning()[0]
        assert str(bad)
