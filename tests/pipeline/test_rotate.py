"""Rotations in calibrated runs: the float model's output stays, what is saved says what it needs, who cannot is told so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import families
from fracbit.checkpoint.load import load
from fracbit.errors import FormatError
from fracbit.models.quant_linear import QuantLinear
from fracbit.pipeline.quantize.run import write_checkpoint
from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Override, Recipe
from fracbit.records.scheme import Scheme
from outputs import Killed, contents, logits, manifest
from texts import write_ids

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "ids.u16"
    write_ids(path, 8, 16, families.VOCABULARY)
    return path


def recipe(source: Path, ids: Path, *transforms: str, keep: str = "", **changes: object) -> Recipe:
    plan = Calibration(texts=(f"{ids}?length=16",), samples=8, length=16, batch=4, transforms=transforms)
    overrides = (Override(layers=keep, keep=True),) if keep else ()
    fields = {"scheme": Scheme("int", 8, "row"), "calibration": plan, "overrides": overrides} | changes
    return Recipe(model=str(source), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama-tied-biased", "qwen2_moe", "gpt2", "falcon-7b", "gemma2", "opt"])
def test_hadamard_inputs_are_saved_and_applied(name: str, ids: Path, tmp_path: Path) -> None:
    """At 8 bits the model hardly moves, so a rotation that was forgotten on one side shows."""
    model = families.model_of(name)
    model.save_pretrained(tmp_path / "float")
    write_checkpoint(recipe(tmp_path / "float", ids, "rotate-mlp", quantizer="gptq"), tmp_path / "q")
    made, wanted = load(tmp_path / "q"), logits(model)
    assert (logits(made) - wanted).abs().max() < 0.05 * float(wanted.abs().max())
    turned = [n for n, module in made.named_modules() if isinstance(module, QuantLinear) and module.rotated]
    assert turned
    assert not any("attn" in n or "gate" in n or "fc1" in n for n in turned)
    for n in turned:
        made.get_submodule(n).rotated = False
    assert (logits(made) - wanted).abs().max() > 0.2 * float(wanted.abs().max())


def test_both_with_factors_and_a_resume(
    tiny_llama: Callable[..., LlamaForCausalLM], ids: Path, tmp_path: Path
) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "float")
    asked = recipe(
        tmp_path / "float", ids, "rotate", "rotate-mlp", "awq", quantizer="gptq", head=Scheme("int", 8)
    )
    notes = write_checkpoint(asked, tmp_path / "whole").notes
    assert any("lm_head is no longer tied to model.embed_tokens" in note for note in notes)

    def die(what: str, done: int, total: int) -> None:
        if "block 2 of" in what and "mlp" in what:
            raise Killed

    with pytest.raises(Killed):
        write_checkpoint(asked, tmp_path / "parts", progress=die)
    write_checkpoint(asked, tmp_path / "parts", resume=True)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    wanted = logits(load(tmp_path / "float"))
    made = load(tmp_path / "whole")
    assert isinstance(made.lm_head, QuantLinear)
    assert (logits(made) - wanted).abs().max() < 0.05 * float(wanted.abs().max())


def test_distillation_starts_from_what_was_rotated(
    tiny_llama: Callable[..., LlamaForCausalLM], ids: Path, tmp_path: Path
) -> None:
    """The student is the model as it is stored: its divergence before training is that of the checkpoint."""
    model = tiny_llama(tie_word_embeddings=True, attention_bias=True)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 10
        for layer in model.model.layers:
            layer.self_attn.v_proj.bias += torch.linspace(-1, 1, 24)
    model.save_pretrained(tmp_path / "float")
    asked = recipe(tmp_path / "float", ids, "rotate", "rotate-mlp", "smooth")
    assert asked.calibration is not None
    plan = asked.calibration.model_copy(update={"distill": 1, "rate": 1e-9, "inputs": "int8/token"})
    write_checkpoint(asked.model_copy(update={"calibration": plan}), tmp_path / "q")
    facts = manifest(tmp_path / "q")["distilled"]
    made = load(tmp_path / "q")
    from fracbit.data import read_calibration

    held = read_calibration(plan.texts, None, 96, samples=8, length=16, seed=0).ids[-1:]
    with torch.no_grad():
        wanted, found = (m(held).logits.log_softmax(-1) for m in (model, made))
    assert facts["before"] == pytest.approx(float((wanted.exp() * (wanted - found)).sum(-1).mean()), rel=0.02)


def test_an_unknown_rotation_is_refused(
    tiny_llama: Callable[..., LlamaForCausalLM], ids: Path, tmp_path: Path
) -> None:
    tiny_llama().save_pretrained(tmp_path / "float")
    write_checkpoint(recipe(tmp_path / "float", ids, "rotate-mlp"), tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    entry = config["quantization_config"]["layers"]["model.layers.0.mlp.down_proj"]
    assert entry["rotation"] == "hadamard"
    entry["rotation"] = "butterfly"
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="butterfly"):
        load(tmp_path / "q")
