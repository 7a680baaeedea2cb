"""Every family through the calibrated loop, much switched on: saved, loaded, near the float model, nothing left out."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf

from fracbit.checkpoint.load import load
from fracbit.models.quant_linear import QuantLinear
from fracbit.models.skeleton import quantizable
from fracbit.pipeline.quantize.calibrated import run_calibrated
from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import Scheme

_spec = importlib.util.spec_from_file_location(
    "family_configs", Path(__file__).parents[1] / "models" / "conftest.py"
)
assert _spec is not None
assert _spec.loader is not None
families = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(families)


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "ids.u16"
    np.random.default_rng(0).integers(3, families.VOCABULARY, 24 * 24, dtype=np.uint16).tofile(path)
    return path


CONFIGS = {
    **families.CONFIGS,
    "starcoder2": (hf.Starcoder2Config, families.LLAMA_LIKE),
}  # the last one by its structure


@pytest.mark.parametrize("name", CONFIGS)
def test_a_family_in_the_calibrated_loop(name: str, ids: Path, tmp_path: Path) -> None:
    kind, values = CONFIGS[name]
    model = families.build(kind(**values))
    model.save_pretrained(tmp_path / "float")
    plan = Calibration(
        texts=(f"{ids}?length=24",), samples=16, length=24, transforms=("smooth",), axis="predicted", tweak="auto",
        outliers=0.03,
    )  # fmt: skip
    recipe = Recipe(
        model=str(tmp_path / "float"), scheme=Scheme("nf", 6, 16), quantizer="gptq", calibration=plan
    )
    notes = run_calibrated(recipe, tmp_path / "q").notes
    made, facts = load(tmp_path / "q"), json.loads((tmp_path / "q" / "fracbit.json").read_text())
    packed = {n: module for n, module in made.named_modules() if isinstance(module, QuantLinear)}
    from fracbit.models.experts import split_experts

    split_experts(model)
    assert (
        set(packed) == set(quantizable(model)) == {n for n, row in facts["layers"].items() if "loss" in row}
    )
    assert len(facts["tweaks"]) == values.get("num_hidden_layers", 3)
    x = torch.from_numpy(np.fromfile(ids, dtype=np.uint16).astype(np.int64)).view(-1, 24)[:4]
    with torch.no_grad():
        wanted, found = model(x).logits, made(x).logits
    apart = (found - wanted).square().mean(-1)  # by token: one routed to another expert says nothing
    assert float(apart.median()) < 0.01 * float(wanted.var())
    assert any("expert saw" in note for note in notes) == ("moe" in name or name == "mixtral")
    assert any("did nothing" in note for note in notes) == (name == "starcoder2")
