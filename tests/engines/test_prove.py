"""The proof of an export, with an engine that needs nothing beyond this environment: transformers without fracbit."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fracbit
from fracbit.checkpoint.export.exporter import export
from fracbit.checkpoint.folder import MANIFEST
from fracbit.cli import app
from fracbit.engines import environments
from fracbit.engines import prove as proving
from fracbit.engines.compared_with import compared_with
from fracbit.engines.engine import ENGINES, RUNNERS, ServingEngine
from fracbit.engines.environments import DONE, MAKING, made
from fracbit.engines.prove import PROOF, EnginePredictions, compared, weight_hash
from fracbit.errors import EngineError, FormatError, RecipeError
from fracbit.pipeline.quantize.run import write_checkpoint
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import parse_scheme
from fracbit.records.tables import FORMATS

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

Maker = Callable[..., "LlamaForCausalLM"]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every engine's environment is this one."""
    monkeypatch.setattr(proving, "environment", lambda *words: Path(sys.executable))


@pytest.fixture
def exported(tiny_llama: Maker, tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "float")
    write_checkpoint(Recipe(model=str(tmp_path / "float"), scheme=parse_scheme("int4z/32")), tmp_path / "q")
    export(tmp_path / "q", tmp_path / "made", "float:fp32")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 90, (8, 32)))
    return tmp_path / "made"


def settings(exported: Path) -> dict[str, Any]:
    return {"text": str(exported.parent / "ids.npy"), "samples": 2, "length": 24, "greedy": 8}


def test_an_export_is_proved_and_a_changed_one_is_not(exported: Path) -> None:
    found = fracbit.prove(exported, **settings(exported))
    assert (found.engine, found.format, found.dtype) == ("transformers", "float:fp32", "float32")
    assert found.difference is not None
    assert found.difference.tokens == 2 * 23
    assert found.difference.largest < 1e-4
    assert found.difference.kl < 1e-8
    assert (found.difference.agreement, found.difference.greedy) == (1, 1)
    assert found.versions.keys() == {"transformers", "torch"}
    assert json.loads((exported / PROOF).read_text())["difference"]["kl"] == found.difference.kl
    assert not fracbit.verify(exported).faults, "the proof is not among the files that are hashed"
    tensors = load_file(exported / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1.5
    save_file(tensors, exported / "model.safetensors", metadata={"format": "pt"})
    assert fracbit.prove(exported, **settings(exported)).difference.mean > 1e-3


def test_the_command(exported: Path) -> None:
    words = ["--for", "transformers", "--text", str(exported.parent / "ids.npy"), "--length", "24"]
    ran = CliRunner().invoke(app, ["prove", str(exported), *words])
    assert ran.exit_code == 0, ran.output
    assert "transformers (transformers" in ran.output
    assert "greedy tokens equal 100.00%" in ran.output


def test_what_was_rounded_again_is_compared_with_what_it_became(tiny_llama: Maker, tmp_path: Path) -> None:
    """Such an export differs from its checkpoint; the engine is right all the same."""
    tiny_llama(hidden_size=64).save_pretrained(tmp_path / "float")
    write_checkpoint(Recipe(model=str(tmp_path / "float"), scheme=parse_scheme("kmeans3/32")), tmp_path / "q")
    export(tmp_path / "q", tmp_path / "coded", "compressed-tensors", requantize=True)
    manifest = json.loads((tmp_path / "coded" / MANIFEST).read_text())
    ids = torch.arange(24).view(1, 24)
    made = compared_with(tmp_path / "coded", manifest, None)
    with made.model() as model, torch.no_grad():
        again = model(ids).logits
        theirs = fracbit.load(tmp_path / "coded", torch.float32)(
            ids
        ).logits  # decoded by the reader of the format
        before = fracbit.load(tmp_path / "q", torch.float32)(ids).logits
    assert torch.allclose(again, theirs, atol=1e-3)
    assert not torch.allclose(again, before, atol=1e-3)
    (tmp_path / "q").rename(tmp_path / "moved")
    alone = compared_with(tmp_path / "coded", manifest, None)
    assert alone.name == "the export as fracbit reads it"
    assert alone.weights.keys() == made.weights.keys()
    with alone.model() as model, torch.no_grad():
        assert torch.equal(model(ids).logits, theirs)
    named = compared_with(tmp_path / "coded", manifest, tmp_path / "moved")
    assert all(
        weight_hash(named.weights[name]()) == weight_hash(each()) for name, each in alone.weights.items()
    )


def test_an_export_whose_layers_became_floats_is_compared_with_these(
    tiny_llama: Maker, tmp_path: Path
) -> None:
    """They are in the type of the source, which loses more than the checkpoint's grid did."""
    tiny_llama(hidden_size=64, intermediate_size=96).bfloat16().save_pretrained(tmp_path / "float")
    recipe = Recipe(
        model=str(tmp_path / "float"),
        scheme=parse_scheme("int:step4/32 s=bf16"),
        embeddings=parse_scheme("nf4/32 s=fp32"),
    )
    write_checkpoint(recipe, tmp_path / "q")
    made = export(tmp_path / "q", tmp_path / "coded", "compressed-tensors", requantize=True)
    assert (made.requantized, made.floats) == ({}, ("model.embed_tokens",))
    origin = compared_with(tmp_path / "coded", json.loads((tmp_path / "coded" / MANIFEST).read_text()), None)
    theirs = load_file(tmp_path / "coded" / "model.safetensors")["model.embed_tokens.weight"].float()
    with origin.model() as model:
        assert torch.equal(model.get_input_embeddings().weight, theirs)


def test_difference_of_known_predictions(tiny_llama: Maker) -> None:
    model, ids = tiny_llama(), torch.arange(12).view(1, 12)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
        whole = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)[
            :, 12:
        ]
    same = compared(model, EnginePredictions(ids, logits, greedy=whole))
    assert same.kl == pytest.approx(0, abs=1e-6)
    wrong = whole.clone()
    wrong[0, 2] += 1
    assert compared(model, EnginePredictions(ids, logits[:, 5:], 5)).greedy is None
    logs = logits.double().log_softmax(-1)
    rare = torch.where(
        logs < logs.amax(-1, keepdim=True) - 0.3, torch.nan, logs
    )  # an engine that tells no more
    assert bool(rare.isnan().any())
    assert compared(model, EnginePredictions(ids, rare)).kl == pytest.approx(0, abs=1e-6)
    assert compared(model, EnginePredictions(ids, logits[:, 5:], 5)).kl == pytest.approx(0, abs=1e-6)
    assert compared(model, EnginePredictions(ids, logits, greedy=wrong)).greedy == 0.5, (
        "tokens after the first difference do not count"
    )
    flat = compared(model, EnginePredictions(ids, torch.zeros_like(logits), greedy=whole))
    own = logits.log_softmax(-1)
    wanted = (own.exp() * (own + np.log(own.shape[-1]))).sum(-1)
    assert flat.kl == pytest.approx(float(wanted.mean()), rel=1e-4)
    assert flat.kl_largest == pytest.approx(float(wanted.max()), rel=1e-4)


def test_hashes_of_both_sides_are_the_same() -> None:
    spec = importlib.util.spec_from_file_location("answer", RUNNERS / "answer.py")
    assert spec is not None
    assert spec.loader is not None
    answer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(answer)
    weight = torch.randn(7, 5)
    weight[0, 0] = -0.0
    assert answer.hashed(weight.numpy()) == weight_hash(weight)
    assert weight_hash(weight.bfloat16()) == weight_hash(weight.bfloat16().float())
    weight[0, 0] = 0.0
    assert answer.hashed(weight.numpy()) == weight_hash(weight)
    weight[6, 4] += 1e-3
    assert answer.hashed(weight.numpy()) == weight_hash(weight) != weight_hash(weight + 1)


@pytest.mark.parametrize("name", ENGINES.names)
def test_every_engine_has_its_runner_and_its_formats(name: str) -> None:
    engine = ENGINES[name]
    assert (RUNNERS / engine.runner).is_file()
    assert engine.formats
    assert set(engine.formats) <= set(FORMATS.names)
    assert engine.title
    assert engine.installs


def test_wrong_inputs_are_answered(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = settings(exported)
    with pytest.raises(RecipeError, match="unknown engine 'transformer'; did you mean 'transformers'"):
        fracbit.prove(exported, "transformer", **how)
    with pytest.raises(EngineError, match=r"mlx does not run the format float:fp32.*transformers"):
        fracbit.prove(exported, "mlx", **how)
    with pytest.raises(FormatError, match="is a fracbit checkpoint and no export"):
        fracbit.prove(exported.parent / "q", **how)
    with pytest.raises(FormatError, match=r"is no export of fracbit; make one with `fracbit export"):
        fracbit.prove(exported.parent / "float", **how)
    (exported.parent / "q").rename(exported.parent / "moved")
    with pytest.raises(EngineError, match=r"q is not there; name the checkpoint.*or leave --against out"):
        fracbit.prove(exported, against=exported.parent / "q", **how)
    assert fracbit.prove(exported, against=exported.parent / "moved", **how).against.endswith("moved")
    manifest = json.loads((exported / MANIFEST).read_text())
    (exported / MANIFEST).write_text(json.dumps(manifest | {"recipe_key": "another"}))
    with pytest.raises(EngineError, match="is not the checkpoint that the export was made from"):
        fracbit.prove(exported, against=exported.parent / "moved", **how)
    (exported / MANIFEST).write_text(json.dumps(manifest | {"exported": "exl9"}))
    with pytest.raises(EngineError, match="no engine runs the format exl9"):
        fracbit.prove(exported, **how)
    (exported / MANIFEST).write_text("{")
    with pytest.raises(FormatError, match=r"fracbit\.json is not JSON"):
        fracbit.prove(exported, **how)
    (exported / MANIFEST).write_text(json.dumps(manifest))
    broken = replace(ENGINES["transformers"], runner="run_mlx.py")
    monkeypatch.setattr(proving, "_engine", lambda engine, asked: ("transformers", broken))
    with pytest.raises(EngineError, match=r"does not run .*made \(exit status 1\): .*mlx"):
        fracbit.prove(exported, against=exported.parent / "moved", **how)


def test_an_environment_that_cannot_be_made(tmp_path: Path) -> None:
    said: list[str] = []
    engine = ServingEngine("nothing", ("float",), (("--no-index", "no-such-package-at-all"),), "run_mlx.py")
    with pytest.raises(
        EngineError,
        match=r"(?s)cannot be made, `pip install .*no-such-package-at-all` failed: .*--environments",
    ):
        made(tmp_path / "nothing", engine.installs, announce=said.append)
    assert len(said) == 1
    assert not (tmp_path / "nothing" / DONE).exists(), "the next run tries again"


def test_an_environment_that_was_not_finished_is_made_from_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, seen = tmp_path / "engine", []

    def create(folder: Path, with_pip: bool) -> None:
        seen.append(sorted(path.name for path in folder.iterdir()))
        (folder / "bin").mkdir()

    def build(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(environments.venv, "create", create)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            made(place, (), build=build)
        assert (place / "half").is_file()
    made(place, (), build=lambda folder: None)
    assert seen == [[MAKING]] * 3, "each began in an empty folder"
    assert sorted(path.name for path in place.iterdir()) == [DONE, "bin"]
    made(place, (), build=build)
    monkeypatch.setattr(environments, "_pip", lambda *words: None)
    made(place, (("another",),))
    assert seen == [[MAKING]] * 4, "other packages: from nothing, too"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(EngineError, match="holds something that is no environment; move it"):
        made(tmp_path / "mine", ())
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match="is a file; remove it"):
        made(tmp_path / "file", ())
    assert (tmp_path / "mine" / "thesis.txt").is_file()
