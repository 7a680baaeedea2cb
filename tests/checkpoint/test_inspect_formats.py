"""`inspect` of exports and of other programs' files: layers as they are stored, bits from the stored bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from families import model_of, tiny_llama
from fracbit.checkpoint.export.exporter import export
from fracbit.checkpoint.summary import loss_table, summarize
from fracbit.cli import app
from fracbit.pipeline.quantize.run import write_checkpoint
from fracbit.records.recipe import Override, Recipe
from fracbit.records.scheme import parse_scheme

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
STORED = {
    "compressed-tensors": ("int:step4z/32", "int:step3/row s=bf16", "int:step4z/32", "int:step3/row s=bf16"),
    "gptq": ("int:step4z/32", "int:step3/row s=bf16", "int:step4z/32", "int:step3/row s=bf16"),
    "gptq:v1": ("int:step4/32", "int:step8/64", "int:step4/32", "int:step8/64"),
    "awq": ("int:step4z/32", "int:step4/32", "int:step4z/32", "int:step4z/32"),
    "mlx": ("int:step4f/32", "int:step3/64", "int:step4f/32", "int:step3f/64"),
    "gguf": ("int:step4/32", "int:step8/32", "Q4_0", "Q8_0"),
}
"""By format: the schemes of most layers and of one, and how both are stored."""


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float")
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "head_dim": 16}
    tiny_llama(**sizes).bfloat16().save_pretrained(folder)
    return folder


def quantized(floats: Path, folder: Path, most: str, one: str) -> Path:
    overrides = (Override(layers=DOWN, scheme=parse_scheme(one)),)
    write_checkpoint(Recipe(model=str(floats), scheme=parse_scheme(most), overrides=overrides), folder)
    return folder


@pytest.mark.parametrize("name", STORED)
def test_layers_are_shown_as_they_are_stored(name: str, floats: Path, tmp_path: Path) -> None:
    if name == "gguf":
        pytest.importorskip("gguf", reason="GGUF files need the extra: pip install 'fracbit[gguf]'")
    most, one, shown, other = STORED[name]
    done = quantized(floats, tmp_path / "q", most, one)
    export(done, tmp_path / "made", name, progress=None)
    found, before = summarize(str(tmp_path / "made")), summarize(str(done))
    layers = found["layers"]
    assert (layers[UP]["scheme"], layers[DOWN]["scheme"]) == (shown, other)
    assert layers["model.embed_tokens"]["scheme"] == "bf16"
    assert layers.keys() == before["layers"].keys()
    assert {each: layer["shape"] for each, layer in layers.items()} == {
        each: layer["shape"] for each, layer in before["layers"].items()
    }
    coded = {each: layer for each, layer in layers.items() if layer["scheme"] in (shown, other)}
    assert len(coded) == 3 * 7
    assert all(
        layer["relative_error"] == before["layers"][each]["relative_error"] for each, layer in coded.items()
    )
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in coded.values())
    assert found["bits_per_weight"] == 8 * sum(layer["bytes"] for layer in coded.values()) / weights
    assert found["share_of_blocks"] == before["share_of_blocks"] == 1
    assert found["share_of_parameters"] == before["share_of_parameters"]
    if name != "gguf":
        tensors = load_file(tmp_path / "made" / "model.safetensors")
        assert found["bytes"] == sum(each.nbytes for each in tensors.values())
        own = sum(
            each.nbytes for key, each in tensors.items() if key.startswith(f"{UP}.") and "shape" not in key
        )
        assert layers[UP]["bytes"] == own
    else:
        assert layers[UP]["bits_per_weight"] == 4.5
        size = (tmp_path / "made" / "model.gguf").stat().st_size
        assert 0 < size - found["bytes"] < 8192
        export(done, tmp_path / "one.gguf", "gguf", progress=None)
        for file in (tmp_path / "one.gguf", tmp_path / "made" / "model.gguf"):
            assert summarize(str(file))["layers"] == layers
        assert loss_table(str(tmp_path / "one.gguf")) == loss_table(str(done))


def test_what_was_rounded_again_has_no_known_error(floats: Path, tmp_path: Path) -> None:
    done = quantized(floats, tmp_path / "q", "int:step4z/32", "kmeans3/32")
    export(done, tmp_path / "made", "compressed-tensors", requantize=True, progress=None)
    layers = summarize(str(tmp_path / "made"))["layers"]
    assert layers[DOWN]["relative_error"] is None
    assert layers[UP]["relative_error"] is not None


def test_experts_of_a_mixture_are_counted_one_by_one(tmp_path: Path) -> None:
    model_of("mixtral").save_pretrained(tmp_path / "float")
    write_checkpoint(
        Recipe(model=str(tmp_path / "float"), scheme=parse_scheme("int:step4z/row")), tmp_path / "q"
    )
    export(tmp_path / "q", tmp_path / "made", "compressed-tensors", progress=None)
    layers = summarize(str(tmp_path / "made"))["layers"]
    assert layers["model.layers.0.block_sparse_moe.experts.0.w1"]["scheme"] == "int:step4z/row"


def test_the_command(floats: Path, tmp_path: Path) -> None:
    done = quantized(floats, tmp_path / "q", "int:step4z/32", "int:step4z/32")
    export(done, tmp_path / "made", "gptq", progress=None)
    ran = CliRunner().invoke(app, ["inspect", str(tmp_path / "made")])
    assert ran.exit_code == 0, ran.output
    assert "GPTQ version 2, 4 bits" in ran.output
    assert "int:step4z/32" in ran.output
    told = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path / "made"), "--json"]).stdout)
    assert told["format"] == "GPTQ version 2, 4 bits"
    assert "not quantized" in CliRunner().invoke(app, ["inspect", str(floats)]).output
