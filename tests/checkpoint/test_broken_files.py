"""Files of strangers that are broken: an error that names the file and the field, and nothing is written."""

from __future__ import annotations

import ast
import contextlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fracbit
from families import tiny_llama
from fracbit.checkpoint.format import read_layers
from fracbit.checkpoint.summary import summarize
from fracbit.data import encode, read_documents
from fracbit.data.encode import render_chat
from fracbit.errors import (
    DataError,
    FormatError,
    FracbitError,
    OutputError,
    RecipeError,
    SourceError,
    blamed_on,
)
from fracbit.records.files import DEEPEST, read_json
from fracbit.records.recipe import read_toml
from fracbit.records.scheme import Scheme
from source import MODULES, relative, tree
from texts import byte_tokenizer

Change = Callable[[dict[str, Any]], object]
JSON_READERS = {
    "records/files.py": "the one reader of files",
    "records/extras.py": "what pip wrote",
    "kernels/op.py": "a string that fracbit made",
    "checkpoint/source.py": "the header of a file that safetensors has read",
    "checkpoint/lock.py": "a record that may be half-written counts as none",
    "checkpoint/formats/torchao.py": "metadata in the header of a safetensors file, whose errors name their tensor",
    "checkpoint/formats/gguf.py": "the text of a config that transformers made",
    "sweeps/parquet.py": "cells of a table, whose errors name their row",
    "engines/llama_cpp.py": "what llama-bench printed",
    "pipeline/serve/openai.py": "the body of a request, which is answered with status 400",
    "engines/prove.py": "what a runner of ours wrote",
    "engines/runners/run_compressed_tensors.py": "runs where fracbit is not installed",
    "engines/vllm_plugin/ops.py": "a string that fracbit made",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("source") / "float"
    tiny_llama(num_hidden_layers=2).save_pretrained(place)
    return place


CONFIGS: dict[str, tuple[Change, str]] = {
    "a wrong type": (lambda c: c.update(attention_bias="yes"), "config.json.*attention_bias"),
    "heads that do not divide": (lambda c: c.update(num_attention_heads=7), "num_attention_heads"),
    "no model type": (
        lambda c: c.pop("model_type"),
        "not a model that transformers knows.*model_type = None",
    ),
    "no heads": (lambda c: c.update(num_attention_heads=0), "num_attention_heads = 0"),
    "an unknown function": (lambda c: c.update(hidden_act="jump"), "hidden_act = jump"),
    "a kind of positions that is a list": (
        lambda c: c.update(rope_parameters={"rope_type": []}),
        "rope_parameters|config",
    ),
    "classes that are lists": (lambda c: c.update(architectures=[["x"]]), "architectures"),
    "too many layers": (lambda c: c.update(num_hidden_layers=20_000), "num_hidden_layers = 20000.*tensors"),
    "another width": (lambda c: c.update(hidden_size=52), r"\[.*48.*\].*compare config.json"),
    "no size of a head": (lambda c: c.update(num_attention_heads=8), r"_proj\.weight"),
    "a whole that is a list": (lambda c: c.clear(), "config"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_broken_config_names_its_field_and_nothing_is_written(
    source: Path, tmp_path: Path, what: str
) -> None:
    change, says = CONFIGS[what]
    place = shutil.copytree(source, tmp_path / "float")
    config = json.loads((place / "config.json").read_text())
    change(config)
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=says):
        fracbit.quantize(place, tmp_path / "out", Scheme("int", 4, 16), progress=None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.layers.0.self_attn.o_proj.weight", lambda tensor: torch.cat([tensor, tensor])),
        ("model.layers.1.self_attn.k_proj.weight", lambda tensor: tensor.T),
        ("model.norm.weight", lambda tensor: tensor[:-1]),
        ("model.embed_tokens.weight", lambda tensor: tensor[None]),
    ],
)
def test_a_float_tensor_of_another_shape_is_named(
    source: Path, tmp_path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """It was quantized, into a checkpoint that did not load."""
    place = shutil.copytree(source, tmp_path / "float")
    tensors = load_file(place / "model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=name):
        fracbit.quantize(place, tmp_path / "out", Scheme("int", 4, 16), progress=None)
    assert not (tmp_path / "out").exists()


def test_a_broken_tokenizer_is_the_files_fault(source: Path, tmp_path: Path) -> None:
    place = shutil.copytree(source, tmp_path / "float")
    byte_tokenizer().save_pretrained(place)
    (place / "ids.txt").write_text("text")
    for field, value in (("padding", "x"), ("model", {}), ("added_tokens", 3)):
        tokenizer = json.loads((place / "tokenizer.json").read_text())
        (place / "tokenizer.json").write_text(json.dumps(tokenizer | {field: value}))
        with pytest.raises(SourceError, match="has no tokenizer that transformers can read"):
            fracbit.evaluate(place, place / "ids.txt", progress=None)
        (place / "tokenizer.json").write_text(json.dumps(tokenizer))


SCHEME = {"dtype": "int", "bits": 4, "block": 16}
ENTRY = {"scheme": 0, "shape": [4, 16]}
LAYERS: dict[str, tuple[Any, str]] = {
    "no list of schemes": ({"schemes": None, "layers": {}}, "schemes = None"),
    "layers that are a list": ({"schemes": [], "layers": []}, r"layers = \[\]"),
    "a scheme that is a number": ({"schemes": [3], "layers": {}}, "schemes, number 0 is 3"),
    "a scheme that cannot be": ({"schemes": [{"dtype": "int", "bits": 99}], "layers": {}}, "number 0"),
    "an entry that is a list": ({"schemes": [SCHEME], "layers": {"a": [1]}}, "layer a"),
    "a scheme that is not there": ({"schemes": [], "layers": {"a": ENTRY}}, "layer a"),
    "a scheme before the first": ({"schemes": [SCHEME], "layers": {"a": ENTRY | {"scheme": -1}}}, "layer a.*scheme is -1"),
    "a shape of nothing": ({"schemes": [SCHEME], "layers": {"a": ENTRY | {"shape": [0, 4]}}}, "layer a.*shape is 0"),
    "a shape of words": ({"schemes": [SCHEME], "layers": {"a": ENTRY | {"shape": "4x"}}}, "layer a"),
    "a huge shape": ({"schemes": [SCHEME], "layers": {"a": ENTRY | {"shape": [2**40, 4]}}}, "layer a.*from 1 to"),
    "columns without end": ({"schemes": [SCHEME], "layers": {"a": ENTRY | {"outliers": 17}}}, "layer a.*17 of 16 columns"),
    "columns of another type": ({"schemes": [SCHEME], "layers": {"a": ENTRY | {"outlier_dtype": "x"}}}, "layer a.*'x'"),
}  # fmt: skip


@pytest.mark.parametrize("what", LAYERS)
def test_a_broken_quantization_config_names_the_layer(what: str) -> None:
    config, says = LAYERS[what]
    with pytest.raises(FormatError, match=says):
        read_layers({"format_version": 1, **config})


@pytest.mark.parametrize("levels", [DEEPEST + 5, 100_000])
def test_deep_json_and_toml_are_refused(tmp_path: Path, levels: int) -> None:
    (tmp_path / "a.json").write_text('{"a": ' + "[" * levels + "]" * levels + "}")
    with pytest.raises(FormatError, match=r"a\.json.*nested"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.toml").write_text("a = " + "[" * levels + "]" * levels)
    with pytest.raises(RecipeError, match=r"a\.toml.*nested"):
        read_toml(tmp_path / "a.toml")
    (tmp_path / "b.toml").write_text('model = "a\\u0000b"')
    with pytest.raises(RecipeError, match="NUL"):
        read_toml(tmp_path / "b.toml")


def test_files_of_json_have_one_reader() -> None:
    """So that what is broken in one of them is found in one way. The others read what fracbit or a library made."""
    found = {
        relative(path)
        for path in MODULES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.loads", "json.load")
    }
    assert found == JSON_READERS.keys()


ASKED = re.compile(r"\.(exists|is_file|is_dir)\(\)$")


def test_names_of_users_are_asked_for_in_one_way() -> None:
    """`Path(text).exists()` raises OSError for a name that is too long; `named_path` says so in a sentence."""
    found = [
        f"{relative(path)}: {ast.unparse(node)}"
        for path in MODULES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and ASKED.search(ast.unparse(node))
        if isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value).startswith("Path(")
    ]
    assert found == []


def test_others_errors_are_told_and_bugs_of_fracbit_keep_their_traceback() -> None:
    with pytest.raises(SourceError, match=r"^the file: TypeError"):  # noqa: SIM117
        with blamed_on("the file", SourceError):
            np.dtype("no type")
    with pytest.raises(SourceError, match=r"^another$"), blamed_on("the file", FormatError):
        raise SourceError("another")
    namespace = {"__name__": "fracbit.something"}
    exec("def bug(): return 1 / 0", namespace)
    with pytest.raises(ZeroDivisionError), blamed_on("the file", SourceError):
        namespace["bug"]()  # type: ignore[operator]
    with pytest.raises(SourceError, match="ZeroDivisionError"), blamed_on("x", SourceError, parsing=True):
        namespace["bug"]()  # type: ignore[operator]


def test_ids_are_not_read_whole_and_claims_are_checked(tmp_path: Path) -> None:
    big = tmp_path / "big.u16"
    with big.open("wb") as file:
        file.truncate(64 << 20)  # a hole: it takes no room on the disk
    source = f"{big}?length=512&first=2"
    assert [len(each) for each in read_documents(source, None, 96).documents] == [512, 512]
    claims = tmp_path / "claims.npy"
    np.save(claims, np.arange(4))
    header = claims.read_bytes().replace(b"'shape': (4,)", b"'shape': (9999999999999,)")[:128]
    claims.write_bytes(header + b"\n" + bytes(32))
    with pytest.raises(DataError, match=r"claims\.npy"):
        read_documents(str(claims), None, 96)


def test_a_template_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "LONGEST", 0.5)
    loops = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
    with pytest.raises(DataError, match=r"has not ended after 0\.5 s"):
        render_chat([{"role": "user", "content": "a"}], byte_tokenizer(template=loops), "a file")
    broken = byte_tokenizer(template="{{ messages[0].content + 3 }}")
    with pytest.raises(DataError, match="the chat template refuses"):
        render_chat([{"role": "user", "content": "a"}], broken, "a file")


@pytest.mark.parametrize(
    "where",
    ["postgresql://user:secret@host:notaport/name", "sqlite://nowhere/x", "/dev/null/x.db", "x" * 5000],
)
def test_a_store_that_cannot_be_is_refused_without_its_password(where: str) -> None:
    from fracbit.sweeps.store import open_store

    with pytest.raises(FracbitError) as refused:
        open_store(where)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("name", ["x" * 5000, "/" + "a/" * 3000, "a\0b"])
def test_an_output_that_no_disk_can_hold_is_refused(source: Path, name: str) -> None:
    with pytest.raises(OutputError, match="no name of a file"):
        fracbit.quantize(source, name, Scheme("int", 4, 16), progress=None)
    with pytest.raises(SourceError):
        fracbit.load(name)
    with pytest.raises(DataError):
        read_documents(f"{name}?length=4", None, 96)


def test_a_broken_manifest_and_parquet_file_are_named(source: Path, tmp_path: Path) -> None:
    fracbit.quantize(source, tmp_path / "q", Scheme("int", 4, 16), progress=None)
    manifest = json.loads((tmp_path / "q" / "fracbit.json").read_text())
    for layer in manifest["layers"].values():
        layer["loss"] = "x"
    (tmp_path / "q" / "fracbit.json").write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match=r"fracbit\.json of .* cannot be read"):
        summarize(str(tmp_path / "q"))
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table({"text": ["once", "more"]})
    parquet.write_table(table, tmp_path / "d.parquet")
    whole = bytearray((tmp_path / "d.parquet").read_bytes())
    for place in range(4, len(whole), 7):
        broken = whole.copy()
        broken[place] ^= 0xFF
        (tmp_path / "d.parquet").write_bytes(broken)
        with contextlib.suppress(DataError):
            read_documents(str(tmp_path / "d.parquet"), None, 96)


def test_half_of_a_pair_of_code_points_is_kept(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "float")
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "float" / "config.json").write_text(json.dumps({**config, "said": "\ud800é"}))
    fracbit.quantize(tmp_path / "float", tmp_path / "q", Scheme("int", 4, 16), progress=None)
    assert json.loads((tmp_path / "q" / "config.json").read_text())["said"] == "\ud800é"
    assert fracbit.verify(tmp_path / "q", progress=None).faults == ()
