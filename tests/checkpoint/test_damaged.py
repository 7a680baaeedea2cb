"""A checkpoint that is not what was written does not load: tensors that are missing, foreign, cut or of another type, and
values that no quantizer makes. Bits that still make sense are found by their hashes.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import fracbit
from families import model_of, tiny_llama
from fracbit.errors import FormatError, FracbitError, SourceError
from fracbit.records.recipe import Override, Recipe
from fracbit.records.scheme import Scheme
from outputs import manifest

Tensors = dict[str, Tensor]
UP = "model.layers.0.mlp.up_proj"
"""`int3z` with columns in 16 bits; the other layers have a fitted table, double quantization, and a float offset."""
LOADERS: dict[str, Callable[[Path], PreTrainedModel]] = {
    "fracbit": fracbit.load,
    "transformers": AutoModelForCausalLM.from_pretrained,
    "device map": lambda folder: AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with every part that a packed tensor can have, an embedding table, and layers that stay float."""
    base = tmp_path_factory.mktemp("damaged")
    tiny_llama(num_hidden_layers=2, tie_word_embeddings=True).save_pretrained(base / "float")
    schemes = {
        "*.up_proj": Scheme("int", 3, 16, offset="zero"),
        "*.down_proj": Scheme("kmeans:row", 2, "row"),
        "*.q_proj": Scheme("nf", 4, 16, scale=Scheme("int", 8, 16)),
        "*.k_proj": Scheme("int", 5, "tensor", offset="float", scale="fp32"),
    }
    overrides = tuple(Override(layers=name, scheme=scheme) for name, scheme in schemes.items())
    recipe = Recipe(
        model=str(base / "float"), scheme=Scheme("int", 4, 16), embeddings=Scheme("int", 8, 16), outliers="random:0.1",
        overrides=(*overrides, Override(layers="*.v_proj", keep=True)),
    )  # fmt: skip
    fracbit.quantize(recipe, base / "q", progress=None)
    return base / "q"


def tensors_of(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def damaged(stored: Path, folder: Path, change: Callable[[Tensors], object]) -> Path:
    """A copy of the checkpoint with its tensors changed."""
    shutil.copytree(stored, folder)
    tensors = tensors_of(folder)
    change(tensors)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_checkpoint_has_every_part(stored: Path) -> None:
    parts = {name.rpartition(".")[2] for name in tensors_of(stored)}
    assert {
        "weight",
        "weight_scales",
        "weight_offsets",
        "weight_table",
        "weight_columns",
        "weight_outliers",
    } <= parts
    assert "weight_scales_codes" in parts
    assert fracbit.verify(stored).faults == ()
    for load in LOADERS.values():
        load(stored)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_missing_tensor_is_named(stored: Path, tmp_path: Path, loader: str) -> None:
    for index, name in enumerate(tensors_of(stored)):
        folder = damaged(stored, tmp_path / str(index), lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(FormatError, match=name):
            LOADERS[loader](folder)


def test_a_missing_tensor_of_a_saved_copy_is_named(stored: Path, tmp_path: Path) -> None:
    """A copy that `save_pretrained` made has no manifest: what the model needs is known all the same."""
    fracbit.load(stored).save_pretrained(tmp_path / "copy")
    fracbit.load(tmp_path / "copy")
    for index, name in enumerate(tensors_of(tmp_path / "copy")):
        folder = damaged(
            tmp_path / "copy", tmp_path / str(index), lambda tensors, name=name: tensors.pop(name)
        )
        with pytest.raises(FormatError, match=name):
            AutoModelForCausalLM.from_pretrained(folder)


def test_a_missing_tensor_is_named_when_layers_are_offloaded_to_the_disk(
    stored: Path, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    parts = ("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    where = {**dict.fromkeys(parts, "cpu"), "model.layers.0": "disk"}
    for index, name in enumerate(
        [f"{UP}.weight_scales", "model.layers.0.input_layernorm.weight", "model.norm.weight"]
    ):
        folder = damaged(stored, tmp_path / str(index), lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(FormatError, match=name):
            AutoModelForCausalLM.from_pretrained(folder, device_map=where, offload_folder=tmp_path / "disk")


@pytest.mark.parametrize("family", ["gpt2", "qwen2_moe"])
def test_a_missing_tensor_is_named_in_other_families(tmp_path: Path, family: str) -> None:
    model_of(family).save_pretrained(tmp_path / "float")
    fracbit.quantize(tmp_path / "float", tmp_path / "q", Scheme("int", 4, 16), progress=None)
    fracbit.load(tmp_path / "q")
    names = list(tensors_of(tmp_path / "q"))
    for index in range(0, len(names), max(1, len(names) // 8)):
        name = names[index]
        folder = damaged(tmp_path / "q", tmp_path / str(index), lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(FormatError, match=name):
            fracbit.load(folder)


def test_a_float_model_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    tiny_llama(num_hidden_layers=2).save_pretrained(tmp_path / "float")
    folder = damaged(tmp_path / "float", tmp_path / "cut", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(SourceError, match=r"lacks a tensor .*model\.norm\.weight"):
        fracbit.load(folder)


def test_a_foreign_tensor_is_named(stored: Path, tmp_path: Path) -> None:
    folder = damaged(stored, tmp_path / "q", lambda tensors: tensors.update({"model.extra": torch.zeros(3)}))
    with pytest.raises(FormatError, match=r"model\.extra.*does not list"):
        fracbit.load(folder)


def test_a_cut_tensor_and_one_of_another_type_are_named(stored: Path, tmp_path: Path) -> None:
    for index, (name, tensor) in enumerate(tensors_of(stored).items()):
        folder = damaged(
            stored,
            tmp_path / f"{index}-cut",
            lambda t, name=name, tensor=tensor: t.update({name: tensor[:-1]}),
        )
        with pytest.raises(FormatError, match=name):
            fracbit.load(folder)
        if ".weight_" in name:
            other = tensor.to(torch.float64)
            folder = damaged(
                stored, tmp_path / f"{index}-type", lambda t, name=name, other=other: t.update({name: other})
            )
            with pytest.raises(FormatError, match=f"{name} is F64"):
                fracbit.load(folder)


BROKEN: dict[str, tuple[str, Callable[[Tensor], object], str]] = {
    "a scale that is not a number": (f"{UP}.weight_scales", lambda x: x[0].fill_(torch.nan), "scales holds"),
    "an infinite scale": ("model.layers.1.self_attn.k_proj.weight_scales", lambda x: x.fill_(torch.inf), "scales holds"),
    "a negative scale": (f"{UP}.weight_scales", lambda x: x[0].neg_(), "negative"),
    "a table that is not a number": (
        "model.layers.0.mlp.down_proj.weight_table", lambda x: x[0].fill_(torch.nan), "table holds",
    ),
    "a code without a value": ("model.layers.0.mlp.gate_proj.weight", lambda x: x[3:4].fill_(0xFF), "no value"),
    "a code of a scale without a value": (
        "model.layers.0.self_attn.q_proj.weight_scales_codes", lambda x: x[:, :1].fill_(0xFF), "no value",
    ),
    "columns that are not in order": (f"{UP}.weight_columns", lambda x: x.copy_(x.flip(0)), "ascending"),
    "a column that there is not": (f"{UP}.weight_columns", lambda x: x[-1:].fill_(400), "ascending"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_values_that_no_quantizer_makes_do_not_load(stored: Path, tmp_path: Path, what: str) -> None:
    name, change, says = BROKEN[what]
    folder = damaged(stored, tmp_path / "q", lambda tensors: change(tensors[name]))
    layer = name.rpartition(".")[0]
    for load in LOADERS.values():
        with pytest.raises(FormatError, match=f"{layer}.*{says}"):
            load(folder)
    (folder / "fracbit.json").unlink()  # without hashes, verify looks at the values as well
    assert any(says in fault and layer in fault for fault in fracbit.verify(folder).faults)


def test_every_changed_bit_is_found_by_its_hash(stored: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for index, name in enumerate(tensors_of(stored)):

        def flip(tensors: Tensors, name: str = name) -> None:
            raw = tensors[name].contiguous().view(-1).view(torch.uint8)
            place = int(torch.randint(len(raw), (), generator=generator))
            raw[place] ^= 1 << int(torch.randint(8, (), generator=generator))
            tensors[name] = raw.view(tensors[name].dtype).view(tensors[name].shape)

        folder = damaged(stored, tmp_path / str(index), flip)
        assert fracbit.verify(folder).faults == (
            f"{name} in model.safetensors has changed since it was written",
        )
        with pytest.raises(FracbitError, match=name):
            fracbit.load(folder, verify=True)


def test_a_changed_header_is_found(stored: Path, tmp_path: Path) -> None:
    shutil.copytree(stored, tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    whole = file.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    for place in (*range(8, 48), *range(48, end, 29)):
        if whole[place] == ord(" "):
            continue  # filling behind the header
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with contextlib.suppress(FracbitError):
            assert fracbit.verify(tmp_path / "q", progress=None).faults, place


def test_the_other_files_are_hashed_too(stored: Path, tmp_path: Path) -> None:
    shutil.copytree(stored, tmp_path / "q")
    listed = manifest(stored)["files"]
    assert set(listed) == {path.name for path in stored.iterdir()} - {"model.safetensors", "fracbit.json"}
    (tmp_path / "q/README.md").write_text("another card")
    (tmp_path / "q/generation_config.json").unlink()
    assert set(fracbit.verify(tmp_path / "q").faults) == {
        "README.md has changed since it was written", "generation_config.json is missing",
    }  # fmt: skip


def test_a_float_source_is_checked_against_its_index_and_for_values_that_are_not_finite(
    tmp_path: Path,
) -> None:
    tiny_llama(num_hidden_layers=2).save_pretrained(tmp_path / "float", max_shard_size="20KB")
    found = fracbit.verify(tmp_path / "float")
    assert (found.faults, found.hashed) == ((), False)
    index = tmp_path / "float/model.safetensors.index.json"
    data = json.loads(index.read_text())
    other = data["weight_map"]["lm_head.weight"]
    victim = next(name for name, file in sorted(data["weight_map"].items()) if file != other)
    shard = tmp_path / "float" / other
    tensors = load_file(shard)
    broken = sorted(tensors)[0]
    tensors[broken].view(-1)[0] = torch.nan
    save_file({**tensors, "stray": torch.ones(2)}, shard, metadata={"format": "pt"})
    data["weight_map"][victim] = other
    index.write_text(json.dumps(data))
    faults = fracbit.verify(tmp_path / "float").faults
    assert len(faults) == 3
    assert any(victim in fault and other in fault for fault in faults)
    assert any("stray" in fault and "nothing of it" in fault for fault in faults)
    assert any(broken in fault and "not finite" in fault for fault in faults)


def test_a_manifest_leads_to_no_file_outside(stored: Path, tmp_path: Path) -> None:
    shutil.copytree(stored, tmp_path / "q")
    listed = manifest(stored)
    listed["files"]["../secret"] = "0" * 64
    (tmp_path / "q/fracbit.json").write_text(json.dumps(listed))
    assert fracbit.verify(tmp_path / "q").faults == ("../secret is listed, and lies outside of the folder",)
