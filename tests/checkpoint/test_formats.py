"""Sources that are quantized already, whatever the format: what a config says, what every command does with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fracbit
from families import model_of, tiny_llama
from fracbit.checkpoint.formats.decoding import PIECE, Decoding, Part, filled
from fracbit.checkpoint.formats.known import SOURCE_FORMATS
from fracbit.checkpoint.opened import open_float
from fracbit.checkpoint.source import TensorInfo, open_source
from fracbit.checkpoint.summary import summarize
from fracbit.checkpoint.verify import verify
from fracbit.errors import SourceError
from fracbit.pipeline.study.prune import prune
from outputs import contents, logits
from rounded import SIZES, Packed, change_tensors, two_folders

SETTINGS = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def pack(name: str, weight: Tensor) -> Packed:
    """One scale for a matrix of at most 128 rows and columns, in fp8."""
    scale = (
        torch.ones(-(-weight.shape[0] // 128), -(-weight.shape[1] // 128)) * weight.float().abs().max() / 448
    )
    codes = (weight.float() / scale.flatten()[0]).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scale}, (codes.float() * scale.flatten()[0]).to(weight.dtype)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    model = tiny_llama(**SIZES, tie_word_embeddings=True)
    return two_folders(model, tmp_path, pack, SETTINGS, dtype=torch.bfloat16)


def plain_model(folder: Path, **config: Any) -> Path:
    tiny_llama(num_hidden_layers=1).save_pretrained(folder)
    entries = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(entries | config))
    return folder


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize(
    "method", ["gguf", "gptq", "awq", "fp8", "compressed-tensors", "bitsandbytes", "hqq"]
)
def test_a_stale_config_over_plain_floats_is_accepted_with_a_note(
    tmp_path: Path, key: str, method: str
) -> None:
    folder = plain_model(tmp_path / "m", **{key: {"quant_method": method}})
    source = open_float(folder).source
    assert any(
        f"quantized ({method}), but all of its weights are plain floats" in note for note in source.notes
    )
    assert not source.decoded
    assert key not in source.config
    made = fracbit.quantize(folder, tmp_path / "out", "int4/64", progress=None)
    assert any("plain floats" in note for note in made.notes)
    assert torch.equal(logits(fracbit.load(folder)), logits(tiny_llama(num_hidden_layers=1)))


def test_floats_that_a_model_rounds_while_it_runs_are_refused(tmp_path: Path) -> None:
    folder = plain_model(tmp_path / "m", quantization_config={"quant_method": "bitnet"})
    with pytest.raises(SourceError, match=r"\(bitnet\), and its model rounds the floats in it while it runs"):
        open_float(folder)


@pytest.mark.parametrize(
    ("method", "ending"), [("quip", "Qidxs"), ("exl3", "trellis"), ("vptq", "centroids.weight")]
)
@pytest.mark.parametrize("named", [True, False])
def test_a_method_that_is_known_and_not_decoded_is_refused_by_name(
    tmp_path: Path, method: str, ending: str, named: bool
) -> None:
    """By its config, or by its tensors where the config says nothing (QuIP#)."""
    folder = plain_model(
        tmp_path / "m", **({"quantization_config": {"quant_method": method}} if named else {})
    )
    name = f"model.layers.0.mlp.up_proj.{ending}"
    change_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(4, 4, dtype=torch.int16)}))
    with pytest.raises(
        SourceError, match=rf"already quantized \({method}: .*start from the float model, or from"
    ):
        open_float(folder)


@pytest.mark.parametrize("method", ["spqr", "higgs"])
def test_a_method_that_is_not_known_is_refused(tmp_path: Path, method: str) -> None:
    folder = plain_model(tmp_path / "m", quantization_config={"quant_method": method})
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(
        SourceError, match=rf"already quantized \({method}\).*fracbit decodes .*gptq.*start from the float"
    ):
        open_float(folder)


def test_our_own_checkpoints_are_no_sources(tmp_path: Path) -> None:
    fracbit.quantize(plain_model(tmp_path / "m"), tmp_path / "out", "int4/64", progress=None)
    with pytest.raises(SourceError, match=r"already quantized \(fracbit\)"):
        open_float(tmp_path / "out")
    assert not open_source(str(tmp_path / "out")).decodings


def test_integers_where_a_weight_is_expected_are_refused(tmp_path: Path) -> None:
    """Also where the name of a tensor says nothing of a weight."""
    folder = plain_model(tmp_path / "m")
    model_of("gpt2").save_pretrained(folder)
    change_tensors(
        folder,
        lambda tensors: tensors.update(
            {"transformer.h.0.mlp.c_fc.bias": tensors["transformer.h.0.mlp.c_fc.bias"].to(torch.int32)}
        ),
    )
    with pytest.raises(SourceError, match=r"c_fc\.bias in I32, and the model has a float weight there"):
        open_float(folder)


def test_a_config_of_one_format_over_codes_of_another(folders: tuple[Path, Path]) -> None:
    path = folders[0] / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(
        SourceError, match=r"already quantized \(gptq\), and model\S+ in F8_E4M3 is not of that format"
    ):
        open_float(folders[0])


def test_a_config_within_the_config_of_the_text_model(folders: tuple[Path, Path]) -> None:
    """Its place in models that also see."""
    path = folders[0] / "config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps(config | {"quantization_config": None, "text_config": {"quantization_config": SETTINGS}})
    )
    source = open_source(str(folders[0]))
    assert source.decoded
    assert source.config["text_config"] == {}


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_loaded_model_is_that_of_the_plain_floats(folders: tuple[Path, Path], dtype: str) -> None:
    first, second = (fracbit.load(folder, dtype=dtype) for folder in folders)
    assert first.dtype == second.dtype
    assert torch.equal(logits(first), logits(second))
    assert first.lm_head.weight is first.model.embed_tokens.weight
    assert "quantization_config" not in first.config.to_dict()


def test_verify_sees_floats_and_inspect_what_is_stored(folders: tuple[Path, Path]) -> None:
    first, second = (verify(folder, progress=None) for folder in folders)
    assert first.faults == ()
    assert (first.tensors, first.bytes) == (second.tensors, second.bytes)
    name = "model.layers.0.mlp.up_proj.weight"
    coded, plain = (summarize(str(folder))["layers"] for folder in folders)
    assert coded.keys() == plain.keys()
    assert coded[name.removesuffix(".weight")]["scheme"].startswith("fp8, ")
    change_tensors(folders[0], lambda tensors: tensors[f"{name}_scale_inv"].fill_(float("inf")))
    assert any(
        f"{name} in " in fault and "not finite" in fault for fault in verify(folders[0], progress=None).faults
    )


def test_an_index_names_the_tensors_on_the_disk(folders: tuple[Path, Path]) -> None:
    coded = folders[0]
    names = list(open_source(str(coded)).on_disk)
    (coded / "model.safetensors").rename(coded / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (coded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert verify(coded, progress=None).faults == ()


def test_a_pruned_model_is_plain(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for folder, out in zip(folders, ("a", "b"), strict=True):
        prune(folder, ["model.layers.0"], tmp_path / out)
    assert not open_source(str(tmp_path / "a")).notes
    assert torch.equal(logits(fracbit.load(tmp_path / "a")), logits(fracbit.load(tmp_path / "b")))


def test_calibration_runs_on_the_decoded_floats(folders: tuple[Path, Path], tmp_path: Path) -> None:
    ids = tmp_path / "ids.u16"
    ids.write_bytes(
        torch.randint(0, 96, (2048,), generator=torch.Generator().manual_seed(0))
        .to(torch.int16)
        .numpy()
        .tobytes()
    )
    for folder, out in zip(folders, ("a", "b"), strict=True):
        recipe = fracbit.Recipe(
            model=str(folder), scheme="int4/64", quantizer="gptq",
            calibration={"texts": [f"{ids}"], "samples": 8, "length": 32},
        )  # fmt: skip
        fracbit.quantize(recipe, tmp_path / out, progress=None)
    first, second = contents(tmp_path / "a"), contents(tmp_path / "b")
    shards = [name for name in first if name.endswith(".safetensors")]
    assert {name: first[name] for name in shards} == {name: second[name] for name in shards}


def test_a_whole_tensor_is_decoded_piece_by_piece() -> None:
    """Every piece begins at a whole step of all parts and holds about a million weights."""
    rows, width, group = 4097, 1024, 96
    seen: list[int] = []

    def decode(parts: dict[str, Tensor]) -> Tensor:
        seen.append(len(parts["codes"]))
        return parts["codes"] * parts["scale"].repeat_interleave(group, 0)[: len(parts["codes"])]

    codes = torch.arange(rows * width, dtype=torch.float32).view(rows, width)
    scale = torch.arange(1, 1 + -(-rows // group), dtype=torch.float32)[:, None]
    parts = {"codes": Part("c", rows=1), "scale": Part("s", rows=group)}
    made = filled(
        Decoding(TensorInfo("", "F32", (rows, width)), parts, decode),
        {"codes": codes, "scale": scale},
        torch.float32,
    )
    assert torch.equal(made, codes * scale.repeat_interleave(group, 0)[:rows])
    assert all(count % group == 0 and count * width <= PIECE for count in seen[:-1])


def test_every_format_leaves_a_float_model_alone(tmp_path: Path) -> None:
    source = open_source(str(plain_model(tmp_path / "m")))
    for name, known in SOURCE_FORMATS.items():
        assert not known.seen(source.tensors), name
        assert not known.decode(source, {}).tensors, name
