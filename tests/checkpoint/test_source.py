"""Sources: every way in which a folder is not a model is said by name; nothing is unpickled."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

import fracbit
from families import tiny_llama as make_llama
from fracbit.checkpoint.opened import open_float
from fracbit.checkpoint.source import combined_hash, open_source, read_tensor, tensor_hash
from fracbit.errors import SourceError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@pytest.fixture
def folder(tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "m", max_shard_size="100KB")
    return tmp_path / "m"


def test_every_tensor_is_listed_and_read(folder: Path, tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    source = open_source(str(folder))
    state = tiny_llama().state_dict()
    assert set(source.tensors) == set(state)
    assert len({info.file for info in source.tensors.values()}) > 1
    for name, tensor in state.items():
        assert torch.equal(read_tensor(source, name), tensor)
    assert source.bytes == sum(tensor.nbytes for tensor in state.values())


def test_the_hash_sees_contents_and_not_files(
    folder: Path, tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM]
) -> None:
    def whole(path: Path) -> str:
        source = open_source(str(path))
        return combined_hash({name: tensor_hash(read_tensor(source, name)) for name in source.tensors})

    tiny_llama().save_pretrained(tmp_path / "one")
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    assert whole(folder) == whole(tmp_path / "one") != whole(tmp_path / "other")


def refuses(path: Path | str, says: str) -> None:
    with pytest.raises(SourceError, match=says):
        open_source(str(path))


def test_no_such_model(tmp_path: Path) -> None:
    refuses(tmp_path / "none", "no such model")
    refuses("no-such-owner/no-such-model", "no such model.*offline")
    (tmp_path / "file").write_text("x")
    refuses(tmp_path / "file", "is a file")


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return open, (str(tmp_path / "exploded"), "w")  # type: ignore[return-value]

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refuses(tmp_path, "only pickled weights.*pytorch_model.bin")
    assert not (tmp_path / "exploded").exists()


def test_a_folder_without_parts(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    (folder / "config.json").unlink()
    refuses(folder, "no config.json")
    (folder / "config.json").write_text("[1]")
    refuses(folder, "expected a JSON object")
    (folder / "config.json").write_text("{")
    refuses(folder, "is not JSON")
    (folder / "config.json").write_text(config)
    shards = sorted(folder.glob("*.safetensors"))
    shards[0].unlink()
    refuses(folder, shards[0].name)


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_truncated_shard_is_named(folder: Path, kept: int) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: kept if kept >= 0 else len(content) - 1])
    refuses(folder, f"shard {shard.name} is truncated or corrupt")


def test_a_corrupt_header_is_named(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[8:12] = b"\xff\xfe\x00\x01"
    shard.write_bytes(bytes(content))
    refuses(folder, f"shard {shard.name} is truncated or corrupt")


def test_an_index_that_is_not_one(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    refuses(folder, "names no shards")


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32]
)
def test_weights_without_their_scales_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    """Codes whose scales were lost, or whose quantization_config was: read as numbers they are another model."""
    make_llama(num_hidden_layers=1).save_pretrained(tmp_path / "m")
    state = load_file(tmp_path / "m/model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = (state[name] * 10).to(dtype)
    save_file(state, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    for use in (lambda: fracbit.load(tmp_path / "m"), lambda: open_float(tmp_path / "m")):
        with pytest.raises(SourceError, match=name):
            use()


def test_shards_and_links_outside_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    first = next(iter(data["weight_map"]))
    for name in ("../elsewhere.safetensors", "/etc/passwd", "sub/model.safetensors"):
        index.write_text(json.dumps({**data, "weight_map": {**data["weight_map"], first: name}}))
        with pytest.raises(SourceError, match="lies beside the index"):
            open_source(str(folder))
    index.write_text(json.dumps(data))
    secret = tmp_path / "secret"
    secret.write_text("not yours")
    (folder / "notes.txt").symlink_to(secret)
    with pytest.raises(SourceError, match=r"notes\.txt is a link to .*secret, outside"):
        open_source(str(folder))


def test_links_within_the_hubs_cache_are_its_own(folder: Path, tmp_path: Path) -> None:
    repo = tmp_path / "models--a--b"
    snapshot = repo / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for path in folder.iterdir():
        path.rename(repo / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert len(open_source(str(snapshot)).tensors) > 10
