"""Laws over all formats of integers: what a format holds is written without rounding; readers decode equal weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import fracbit
from fracbit.checkpoint.export.exporter import FORMATS, StoredModel, export, exporter_of, fitted, open_stored
from fracbit.checkpoint.format import StoredLayer
from fracbit.checkpoint.opened import open_float
from fracbit.checkpoint.source import read_tensor
from fracbit.cli import app
from fracbit.errors import DataError, FormatError, OutputError, RecipeError
from fracbit.numerics import decode
from fracbit.pipeline.quantize.run import write_checkpoint
from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Override, Recipe
from fracbit.records.scheme import Scheme, parse_scheme
from outputs import contents
from texts import write_ids

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

Maker = Callable[..., "LlamaForCausalLM"]
CODED = [name for name in FORMATS if name != "float"]
HELD = {
    "compressed-tensors": [
        f"int:step{bits}{z}/{block}" for bits in range(2, 9) for z in ("", "z") for block in (16, "row")
    ]
    + [
        "ocp4/16 s=ocp8:tensor",
        "ocp4/32 s=e8m0",
        "ocp8/32 s=e8m0",
        "ocp8/row s=fp32",
        "ocp8/row",
        "ocp8/tensor s=bf16",
    ],
    "gptq": [
        f"int:step{bits}{z}/{block}" for bits in (2, 3, 4, 8) for z in ("", "z") for block in (32, "row")
    ],
    "gptq:v1": ["int:step4/32", "int:step3/64"],
    "awq": ["int:step4z/32", "int:step4/32 s=bf16", "int:step4z/row"],
    "mlx": [
        f"int:step{bits}{f}/{block}" for bits in (2, 3, 4, 5, 6, 8) for f in ("", "f") for block in (32, 64)
    ]
    + ["ocp4/32 s=e8m0", "ocp8/32 s=e8m0"],
    "gguf": [
        "int:step8/32",
        *(f"int:step{bits}{f}/32" for bits in (4, 5) for f in ("", "f")),
        "iq4/32",
        "ocp4/16 s=ocp8:tensor",
        "ocp4/32 s=e8m0",
    ],
}
STORED = {"mlx": "int4f/64", "gguf": "int4f/32"}
"""Integers that become those of a format that has no zero points, by their scales alone; these formats hold tables too."""
EVERY = [(name, scheme) for name, schemes in HELD.items() for scheme in schemes]


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from families import tiny_llama

    folder = tmp_path_factory.mktemp("float")
    tiny_llama(hidden_size=64, intermediate_size=192, num_attention_heads=4, head_dim=16).to(
        torch.bfloat16
    ).save_pretrained(folder)
    return folder


def quantized(floats: Path, folder: Path, scheme: str, **recipe: object) -> Path:
    write_checkpoint(Recipe(model=str(floats), scheme=parse_scheme(scheme), **recipe), folder)  # type: ignore[arg-type]
    return folder


def weights_of_mlx(folder: Path) -> dict[str, torch.Tensor]:
    """As MLX decodes: unsigned codes times scale, plus bias, or small floats times a power of 2; groups along the input."""
    tensors = load_file(folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())["quantization"]
    found = {}
    for name in [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]:
        how = settings.get(name, settings)
        words, scale = (
            tensors[f"{name}.weight"].view(torch.int32).numpy().view("uint8"),
            tensors[f"{name}.scales"].float(),
        )
        width = scale.shape[1] * how["group_size"]
        bits = torch.from_numpy(words)[..., None] >> torch.arange(8, dtype=torch.uint8) & 1  # [out, bytes, 8]
        bits = bits.flatten(1)[:, : width * how["bits"]].view(len(scale), width, how["bits"])
        codes = (bits.float() * 2.0 ** torch.arange(how["bits"])).sum(-1).view(*scale.shape, -1)
        if how["mode"] != "affine":
            small = codes.to(torch.uint8)
            values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
            floats = values[small.long()] if how["bits"] == 4 else small.view(torch.float8_e4m3fn).float()
            found[name] = torch.ldexp(floats, scale[..., None].int() - 127).view(len(scale), -1)
            continue
        found[name] = (codes * scale[..., None] + tensors[f"{name}.biases"].float()[..., None]).view(
            len(scale), -1
        )
    return found


def needs_its_package(name: str) -> None:
    """Skip where the extra of a format is not installed."""
    if name == "gguf":
        pytest.importorskip("gguf", reason="GGUF files need the extra: pip install 'fracbit[gguf]'")


def file_of(folder: Path) -> Path:
    """The one weight file of an export."""
    return next(
        folder / f"model.{kind}" for kind in ("gguf", "safetensors") if (folder / f"model.{kind}").is_file()
    )


def rest_of(folder: Path, stored: StoredModel) -> dict[str, torch.Tensor]:
    """The tensors of an export that stayed float."""
    if file_of(folder).suffix == ".safetensors":
        held = load_file(file_of(folder))
        return {name: held[name] for name in stored.rest}
    source = open_float(file_of(folder)).source
    return {name: read_tensor(source, name) for name in stored.rest}


def weights_of(folder: Path, stored: StoredModel) -> dict[str, torch.Tensor]:
    """The decoded weights of an export by layer, from the reader of its format."""
    opened = open_float(file_of(folder) if file_of(folder).suffix == ".gguf" else folder)
    assert not opened.origins.missing
    assert not opened.origins.unused
    places = {name: opened.origins.tensors[f"{name}.weight"] for name in stored.layers}
    found = {
        name: place.read([read_tensor(opened.source, each) for each in place.names])
        for name, place in places.items()
    }
    if json.loads((folder / "config.json").read_text()).get("quantization"):
        again = weights_of_mlx(folder)  # by other code than the reader
        assert all(torch.equal(again[name].to(each.dtype), each) for name, each in found.items())
    return found


@pytest.mark.parametrize(("name", "scheme"), EVERY, ids=lambda value: str(value))
def test_what_a_format_holds_is_written_without_rounding(
    name: str, scheme: str, floats: Path, tmp_path: Path
) -> None:
    needs_its_package(name)
    done = quantized(floats, tmp_path / "q", scheme, search=True)
    made = export(done, tmp_path / "made", name)
    assert (made.requantized, made.floats, made.notes) == ({}, (), ())
    checked = fracbit.verify(tmp_path / "made", progress=None)
    assert (checked.faults, checked.hashed) == ((), True)
    stored = open_stored(done)
    found = weights_of(tmp_path / "made", stored)
    assert found.keys() == stored.layers.keys()
    for layer, weight in found.items():
        expected = decode(stored.packed(layer))
        assert torch.equal(weight.float(), expected.to(weight.dtype).float()), layer
    kept = load_file(floats / "model.safetensors")
    after = rest_of(tmp_path / "made", stored)
    assert all(torch.equal(after[each].float(), kept[each].float()) for each in stored.rest)
    assert made.bytes == file_of(tmp_path / "made").stat().st_size


def test_every_format_is_held_by_the_law() -> None:
    assert {name.partition(":")[0] for name in HELD} == set(CODED)


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize(
    "scheme",
    [
        "int4z/64",
        "kmeans3/48",
        "nf4/64",
        "int5f/64 s=int8:256",
        "int:step4z/flat:32",
        "int3z/64 out",
        "int:step7/tensor",
        "power4/row",
        "ocp4/64",
        "ocp:e5m28/row",
        "ocp6/32",
        "int:step4f/32 s=int:up6:8",
    ],
)
def test_nearest_forms_are_forms_that_the_format_holds(name: str, scheme: str) -> None:
    """They need no second rounding, keep at least the bits where the format has as many, and say what is different."""
    exporter = exporter_of(name)
    for shape in ((64, 192), (96, 64), (64, 80)):
        for layer in (
            StoredLayer(parse_scheme(scheme), shape),
            StoredLayer(parse_scheme(scheme), shape, outliers=2),
        ):
            near = exporter.nearest(layer)
            assert near.reason
            if isinstance(near.scheme, Scheme):
                again = exporter.nearest(StoredLayer(near.scheme, shape))
                assert (again.scheme, again.reason) == (near.scheme, "")
                assert near.scheme.bits >= layer.scheme.bits or name == "awq"


@pytest.mark.parametrize("name", CODED)
def test_rounding_again_is_refused_until_it_is_allowed_and_counted(
    name: str, floats: Path, tmp_path: Path
) -> None:
    needs_its_package(name)
    keep = Override(layers="*.1.mlp.*", scheme=parse_scheme("kmeans4/64"))
    done = quantized(
        floats,
        tmp_path / "q",
        STORED.get(name, "int4z/64"),
        overrides=(keep,),
        embeddings=Scheme("int", 8, 32),
    )
    with pytest.raises(
        FormatError,
        match=r"(?s)up_proj.*data type is int; the nearest.*int:step4.*data type is kmeans.*--requantize",
    ):
        export(done, tmp_path / "made", name)
    assert not (tmp_path / "made").exists()
    made = export(done, tmp_path / "made", name, requantize=True)
    stored = open_stored(done)
    allowed = fitted(stored, exporter_of(name), name, requantize=True)
    assert set(made.requantized) == set(allowed.layers)
    assert made.floats == (() if name in STORED else ("model.embed_tokens",))
    found = weights_of(tmp_path / "made", allowed)
    for layer, record in made.requantized.items():
        before, after = decode(stored.packed(layer)), found[layer].float()
        loss = float((after - before).square().sum() / before.square().sum())
        assert record.loss == pytest.approx(loss, rel=0.05, abs=1e-5)
        assert record.loss < (1e-6 if ".1.mlp" not in layer else 0.02), (
            "codes stay where only scales are rounded"
        )
    assert f"{len(made.requantized)} layers were rounded again" in made.notes[-1]
    manifest = json.loads((tmp_path / "made" / "fracbit.json").read_text())
    assert set(manifest["requantized"]) == set(made.requantized)


def test_layers_of_different_widths(floats: Path, tmp_path: Path) -> None:
    """What stays float and what differs from most layers is named in the config."""
    overrides = (
        Override(layers="*.0.mlp.down_proj", scheme=parse_scheme("int:step8/64")),
        Override(layers="*.1.mlp.up_proj", keep=True),
    )
    done = quantized(floats, tmp_path / "q", "int:step4/64", overrides=overrides)
    stored = open_stored(done)
    for name in ("compressed-tensors", "gptq", "mlx"):
        export(done, tmp_path / name, name)
        found = weights_of(tmp_path / name, stored)
        assert all(
            torch.equal(weight.float(), decode(stored.packed(layer)).to(weight.dtype).float())
            for layer, weight in found.items()
        )
    settings = {
        name: json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        for name in HELD
        if (tmp_path / name).exists()
    }
    assert "model.layers.1.mlp.up_proj" in settings["compressed-tensors"]["ignore"]
    assert {
        group["weights"]["num_bits"] for group in settings["compressed-tensors"]["config_groups"].values()
    } == {4, 8}
    assert settings["gptq"]["dynamic"][r"+:^model\.layers\.0\.mlp\.down_proj$"] == {
        "bits": 8,
        "group_size": 64,
        "sym": True,
    }
    assert settings["gptq"]["dynamic"][r"-:^model\.layers\.1\.mlp\.up_proj$"] == {}
    assert settings["mlx"]["model.layers.0.mlp.down_proj"]["bits"] == 8
    assert settings["mlx"]["model.layers.1.mlp.up_proj"] is False
    with pytest.raises(FormatError, match="has 8 bits; the nearest that it can hold is int:step4"):
        export(done, tmp_path / "awq", "awq")


def test_inputs_in_8_bits_become_w8a8(floats: Path, tmp_path: Path) -> None:
    done = quantized(floats, tmp_path / "q", "int:step8/row s=bf16")
    config = json.loads((done / "config.json").read_text())
    for entry in config["quantization_config"]["layers"].values():
        entry["inputs"] = {"dtype": "int", "bits": 8, "scope": "token"}
    (done / "config.json").write_text(json.dumps(config))
    export(done, tmp_path / "made", "compressed-tensors")
    tensors = load_file(tmp_path / "made" / "model.safetensors")
    stored = open_stored(done)
    for layer in stored.layers:
        weight = tensors[f"{layer}.weight"].float() * tensors[f"{layer}.weight_scale"].float()
        assert torch.equal(weight, decode(stored.packed(layer)))
    settings = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    assert settings["format"] == "int-quantized"
    assert settings["config_groups"]["group_0"]["input_activations"]["strategy"] == "token"
    for name in ("gptq", "awq", "mlx"):
        with pytest.raises(FormatError, match="inputs are rounded to int8/token while the model runs"):
            export(done, tmp_path / name, name, requantize=True)


@pytest.mark.parametrize("inputs", [None, "ocp8/128"])
def test_fp8_in_blocks_of_rows_and_columns(inputs: str | None, tmp_path: Path) -> None:
    """The weight as it is, a scale for every 128 x 128 of its numbers."""
    done = in_blocks(tmp_path, 256, inputs)
    stored = open_stored(done)
    export(done, tmp_path / "made", "compressed-tensors", progress=None)
    held = load_file(tmp_path / "made" / "model.safetensors")
    config = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    assert (group["weights"]["strategy"], group["weights"]["block_structure"]) == ("block", [128, 128])
    assert group["format"] == "float-quantized"
    given = group["input_activations"]
    assert given is None if inputs is None else (given["strategy"], given["group_size"]) == ("group", 128)
    source = open_float(tmp_path / "made").source
    for name in stored.disk:
        codes, scale = held[f"{name}.weight"], held[f"{name}.weight_scale"]
        assert codes.dtype == torch.float8_e4m3fn
        weight = decode(stored.packed(name))
        spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert torch.equal(codes.float() * spread, weight)
        assert torch.equal(read_tensor(source, f"{name}.weight", torch.float32), weight)


def test_weights_that_no_whole_blocks_cover(tmp_path: Path) -> None:
    done = in_blocks(tmp_path / "weights", 320)
    with pytest.raises(FormatError, match=r"down_proj: its blocks are 128x128 .* ocp8/32 s=e8m0"):
        export(done, tmp_path / "made", "compressed-tensors", progress=None)
    found = export(done, tmp_path / "made", "compressed-tensors", requantize=True, progress=None)
    assert {name.rpartition(".")[2] for name in found.requantized} == {"down_proj", "gate_proj", "up_proj"}
    done = in_blocks(tmp_path / "inputs", 320, "ocp8/128")
    with pytest.raises(FormatError, match="only they go with inputs ocp8/128"):
        export(done, tmp_path / "other", "compressed-tensors", requantize=True, progress=None)


def in_blocks(where: Path, inner: int, inputs: str | None = None) -> Path:
    """A checkpoint of FP8 in blocks of 128 x 128, and of inputs perhaps."""
    from families import tiny_llama

    sizes = {"hidden_size": 128, "intermediate_size": inner, "num_attention_heads": 4, "head_dim": 32}
    tiny_llama(**sizes, num_key_value_heads=4, num_hidden_layers=1).save_pretrained(where / "float")
    text = write_ids(where / "ids.u16", 8, 8)
    how = None if inputs is None else Calibration(texts=(text,), inputs=inputs, samples=4, length=8)
    return quantized(where / "float", where / "q", "ocp8/128x128 s=fp32", calibration=how)


def test_mixtures_get_the_names_of_released_checkpoints(tmp_path: Path) -> None:
    from families import model_of

    model_of("mixtral").save_pretrained(tmp_path / "float")
    done = quantized(tmp_path / "float", tmp_path / "q", "int:step4z/row")
    export(done, tmp_path / "made", "compressed-tensors")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("float", "made"))
    linears = {name.removesuffix(".weight") for name in before} - {
        name.removesuffix(".weight") for name in after
    }
    assert "model.layers.0.block_sparse_moe.experts.0.w1" in linears
    assert all(f"{name}.weight_packed" in after for name in linears)
    rest = {name for name in after if not name.endswith(("_packed", "_scale", "_shape", "_zero_point"))}
    assert rest <= before.keys()


def test_awq_has_no_quantized_head(floats: Path, tmp_path: Path) -> None:
    """VLLM cannot load one."""
    done = quantized(floats, tmp_path / "q", "int:step4z/32", head=parse_scheme("int:step4z/32"))
    with pytest.raises(
        FormatError, match="no quantized output head; keep it float, or export compressed-tensors"
    ):
        export(done, tmp_path / "made", "awq")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", CODED)
def test_a_changed_byte_of_an_export_is_found(name: str, floats: Path, tmp_path: Path) -> None:
    needs_its_package(name)
    scheme = next(scheme for known, schemes in HELD.items() for scheme in schemes if known == name)
    export(quantized(floats, tmp_path / "q", scheme), tmp_path / "made", name)
    path = file_of(tmp_path / "made")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # of the last tensor
    path.write_bytes(data)
    (fault,) = fracbit.verify(tmp_path / "made", progress=None).faults
    assert "has changed since it was written" in fault


def test_layers_of_gpt2_that_become_floats_lie_as_its_modules_store_them(tmp_path: Path) -> None:
    """A square one would load transposed without an error."""
    from families import model_of

    model_of("gpt2").save_pretrained(tmp_path / "float")
    done = quantized(tmp_path / "float", tmp_path / "q", "int:step8z/row")
    made = export(done, tmp_path / "made", "awq", requantize=True)
    stored, after = open_stored(done), load_file(tmp_path / "made" / "model.safetensors")
    turned = [name for name in made.floats if stored.disk[name].kind == "linear"]
    for name in turned:
        found = next(
            each for key, each in after.items() if key.endswith(f"{name.removeprefix('transformer.')}.weight")
        )
        assert torch.allclose(found.float(), decode(stored.packed(name)).T, atol=1e-2)
    with pytest.raises(FormatError, match="mlx-lm joins or turns weights of GPT2LMHeadModel"):
        export(done, tmp_path / "mlx", "mlx", requantize=True)
    assert not (tmp_path / "mlx").exists()


def test_parameters_of_formats(floats: Path, tiny_llama: Maker, tmp_path: Path) -> None:
    done = quantized(floats, tmp_path / "q", "int:step4/32")
    with pytest.raises(RecipeError, match="gptq has no version 'v3'; write gptq, gptq:v1, gptq:v2"):
        fracbit.export(done, tmp_path / "made", "gptq:v3")
    with pytest.raises(RecipeError, match="mlx takes no parameter"):
        fracbit.export(done, tmp_path / "made", "mlx:4")
    positive = tiny_llama(hidden_size=64, intermediate_size=192, num_attention_heads=4, head_dim=16)
    with torch.no_grad():
        positive.model.layers[0].mlp.up_proj.weight.abs_()
    positive.save_pretrained(tmp_path / "positive")
    zero = quantized(tmp_path / "positive", tmp_path / "z", "int:step2z/32")
    with pytest.raises(
        FormatError, match=r"^model\.layers\.0\.mlp\.up_proj: a zero point is 0.*export gptq, its version 2"
    ):
        fracbit.export(zero, tmp_path / "made", "gptq:v1")
    assert not (tmp_path / "made").exists(), "it is seen before anything is written"
    fracbit.export(zero, tmp_path / "made", "gptq:v2")


def test_what_vllm_does_not_see_of_gptq_is_said(floats: Path, tmp_path: Path) -> None:
    """Linears of one fused layer with another scheme than most; others are read by their names."""
    other = parse_scheme("int:step8/32")
    for number, pattern in enumerate(
        ("*.1.self_attn.k_proj", "*.0.self_attn.[qkv]_proj", "*.down_proj", "*_proj")
    ):
        done = quantized(
            floats,
            tmp_path / f"q{number}",
            "int:step4/32",
            overrides=(Override(layers=pattern, scheme=other),),
        )
        made = fracbit.export(done, tmp_path / f"made{number}", "gptq", progress=None)
        assert len(made.notes) == (number < 2)
        if number == 0:
            assert "takes these for int:step4/32, the scheme of most layers" in made.notes[0]
            assert "model.layers.1.self_attn.k_proj; for vLLM export compressed-tensors" in made.notes[0]


@pytest.mark.parametrize("name", ["compressed-tensors", "gguf"])
def test_what_rounding_again_costs_in_predictions(name: str, floats: Path, tmp_path: Path) -> None:
    """The figure is that of `fracbit.evaluate` on the files, read by the reader of the format."""
    needs_its_package(name)
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 90, 200))
    done = quantized(floats, tmp_path / "q", "kmeans3/64", embeddings=Scheme("kmeans", 4, 32))
    how = {"requantize": True, "held_out": tmp_path / "ids.npy", "progress": None}
    made = fracbit.export(done, tmp_path / "made", name, **how)
    assert made.divergence is not None
    file = file_of(tmp_path / "made")
    found = fracbit.evaluate(
        fracbit.load(file if name == "gguf" else file.parent, "float32"),
        tmp_path / "ids.npy",
        against=fracbit.load(done, "float32"),
        progress=None,
    )
    assert found.divergence is not None
    assert found.divergence.kl > 1e-6
    assert made.divergence["kl"] == pytest.approx(found.divergence.kl, rel=0.02)
    assert made.divergence["protocol"]["text"] == str(found.divergence.protocol)
    assert made.divergence["text_sha256"] == found.text_sha256
    note = made.notes[-1]
    assert note.startswith(
        f"predictions of the exported weights are {made.divergence['kl']:.5f} nats per token (mean KL)"
    )
    assert str(found.divergence.protocol) in note
    manifest = json.loads((tmp_path / "made" / "fracbit.json").read_text())
    assert manifest["divergence"] == made.divergence
    ran = CliRunner().invoke(
        app,
        f"export {done} --to {name} --requantize --held-out {tmp_path / 'ids.npy'} --json -o {tmp_path / 'again'}",
    )
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["divergence"] == made.divergence
    assert contents(tmp_path / "again") == contents(tmp_path / "made")


def test_a_held_out_text_needs_something_to_measure(floats: Path, tmp_path: Path) -> None:
    done = quantized(floats, tmp_path / "q", "int:step4/32")
    with pytest.raises(RecipeError, match=r"--held-out\) measures what rounding again costs.*--requantize"):
        fracbit.export(done, tmp_path / "made", "gptq", held_out="bundled:held-out")
    with pytest.raises(DataError, match=r"none\.txt"):
        fracbit.export(done, tmp_path / "made", "gptq", requantize=True, held_out=tmp_path / "none.txt")
    assert not (tmp_path / "made").exists()
    np.save(tmp_path / "ids.npy", np.arange(40))
    made = fracbit.export(done, tmp_path / "made", "gptq", requantize=True, held_out=tmp_path / "ids.npy")
    assert made.divergence is not None
    assert made.divergence["kl"] < 1e-6, "nothing was rounded again"
    with pytest.raises(OutputError, match="not empty"):
        fracbit.export(done, tmp_path / "made", "gptq", requantize=True, held_out=tmp_path / "ids.npy")


def test_the_remedy_says_what_happens(floats: Path, tmp_path: Path) -> None:
    table = quantized(floats, tmp_path / "table", "int:step4/32", embeddings=Scheme("int:step", 8, 32))
    with pytest.raises(FormatError, match=r"\(--requantize\) makes them floats, and says"):
        export(table, tmp_path / "made", "gptq")
    with pytest.raises(FormatError, match=r"\(--requantize\) rounds them again, and says"):
        export(quantized(floats, tmp_path / "q", "nf4/32"), tmp_path / "made", "gptq")
    both = quantized(floats, tmp_path / "both", "nf4/32", embeddings=Scheme("int:step", 8, 32))
    with pytest.raises(
        FormatError, match=r"\(--requantize\) rounds them again or makes them floats, and says"
    ):
        export(both, tmp_path / "made", "gptq")
