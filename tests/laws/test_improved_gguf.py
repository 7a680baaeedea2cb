"""Laws of `tweak` and `refine` over GGUF files: every type comes back, moves in its own form, and nothing else does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fracbit
from families import build, config_of, tiny_llama
from fracbit.checkpoint.export.exporter import export
from fracbit.checkpoint.export.gguf.block_types import BLOCK_TYPES
from fracbit.checkpoint.formats.gguf_record import record_of
from fracbit.checkpoint.patched import PatchedCopy
from fracbit.errors import FormatError, OutputError, SourceError
from fracbit.numerics import decode
from fracbit.numerics.ranges import quantize_tensor
from outputs import Killed
from texts import write_ids

gguf = pytest.importorskip("gguf", reason="GGUF files need the extra: pip install 'fracbit[gguf]'")

SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "head_dim": 16}
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "head_dim": 64,
    "num_hidden_layers": 1,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_ids(tmp_path_factory.mktemp("text") / "ids.u16", 40, 16)


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float")
    tiny_llama(**SIZES).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(floats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that says nothing of fracbit, as other programs write it."""
    return lone(floats, tmp_path_factory.mktemp("theirs"), "int:step4/32")


def lone(floats: Path, place: Path, scheme: str) -> Path:
    fracbit.quantize(floats, place / "q", scheme, progress=None)
    export(place / "q", place / "made", "gguf", progress=None)
    return (place / "made" / "model.gguf").rename(place / "theirs.gguf")


def how(text: str, **more: Any) -> dict[str, Any]:
    return {"calibration": text, "samples": 16, "length": 16, "progress": None, **more}


def changed(one: Path, other: Path) -> set[str]:
    """The tensors that differ; all other bytes of both files are equal."""
    files = [np.fromfile(path, np.uint8) for path in (one, other)]
    assert len(files[0]) == len(files[1])
    differ, found = files[0] != files[1], set()
    for tensor in gguf.GGUFReader(one).tensors:
        place = slice(int(tensor.data_offset), int(tensor.data_offset) + int(tensor.n_bytes))
        if differ[place].any():
            found.add(tensor.name)
        differ[place] = False
    assert not differ.any(), "header, metadata or padding"
    return found


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_blocks_are_the_packed_weight_that_they_were_made_of(kind: str) -> None:
    """Every byte comes back, and the values are those of llama.cpp's package; blocks of zeros too."""
    block = BLOCK_TYPES[kind]
    weight = torch.randn(6, 512, generator=torch.Generator().manual_seed(0)) / 20
    weight[1], weight[2, :300] = 0, 0
    packed = quantize_tensor(weight, block.scheme, search=True)
    rows = block.rows(packed)
    assert torch.equal(block.rows(block.packed(rows)), rows)
    values = torch.from_numpy(gguf.dequantize(rows.numpy(), gguf.GGMLQuantizationType[kind]))
    assert torch.equal(decode(block.packed(rows)), values)


@pytest.mark.parametrize("kind", [kind for kind, block in BLOCK_TYPES.items() if block.factor is None])
def test_bytes_that_others_wrote_come_back(kind: str) -> None:
    """Steps below 0, steps of 0, every number of a block, any code; a minus before a 0 may go."""
    block, random = BLOCK_TYPES[kind], np.random.default_rng(0)
    rows = random.integers(0, 256, (4, block.row_bytes(512)), np.uint8).reshape(4, -1, block.bytes)
    for place in _halves(kind):
        steps = random.normal(size=rows.shape[:2]).astype(np.float16) / 64
        steps[0], steps[1:] = (
            np.abs(steps[0]),
            steps[1:] if block.scheme.offset == "none" else np.abs(steps[1:]),
        )
        steps[1, 0] = 0
        rows[:, :, place : place + 2] = steps[..., None].view(np.uint8)
    if kind == "MXFP4":
        rows[:, :, 0] = random.integers(60, 180, rows.shape[:2])
    flat = torch.from_numpy(rows.reshape(4, -1))
    packed = block.packed(flat)
    wanted = torch.from_numpy(gguf.dequantize(flat.numpy(), gguf.GGMLQuantizationType[kind]))
    assert torch.equal(decode(packed), wanted)
    assert kind == "MXFP4" or torch.equal(block.rows(packed), flat)


def _halves(kind: str) -> tuple[int, ...]:
    """Where the numbers of fp16 begin in a block."""
    places = {"MXFP4": (), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
    return places.get(kind, (0, 2) if kind in ("Q4_1", "Q5_1") else (0,))


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_refining_moves_blocks_alone(kind: str, floats: Path, text: str, tmp_path: Path) -> None:
    if BLOCK_TYPES[kind].length > 64:
        floats = tmp_path / "float"
        tiny_llama(**WIDE).to(torch.bfloat16).save_pretrained(floats)
    file = lone(floats, tmp_path, str(BLOCK_TYPES[kind].scheme))
    found = fracbit.refine(file, tmp_path / "better.gguf", against=floats, **how(text))
    assert not found.notes
    assert all(layer.after <= layer.before for layer in found.layers.values())
    assert sum(layer.after < layer.before for layer in found.layers.values()) > 0.7 * len(found.layers)
    moved = changed(file, tmp_path / "better.gguf")
    assert all(name.startswith("blk.") and "norm" not in name for name in moved)
    assert len(moved) == sum(layer.after < layer.before for layer in found.layers.values())
    assert not fracbit.verify(tmp_path / "better.gguf", progress=None).faults


def test_the_loss_that_is_told_is_that_of_the_file(
    floats: Path, text: str, theirs: Path, tmp_path: Path
) -> None:
    """Rows of q and k are turned back: what was moved is nearer to the float model than what was there."""
    fracbit.refine(theirs, tmp_path / "better.gguf", against=floats, **how(text))
    kl = []
    for each in (theirs, tmp_path / "better.gguf"):
        found = fracbit.evaluate(each, text, against=floats, window=16, dtype="float32", progress=None)
        assert found.divergence is not None
        kl.append(found.divergence.kl)
    assert kl[1] < 0.9 * kl[0]


LAYERS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
HEADS = LAYERS | {"head_dim": 16, "intermediate_size": 96, "num_key_value_heads": 2}
FAMILIES = {
    "Gemma2Config": HEADS | {"query_pre_attn_scalar": 16},
    "MixtralConfig": HEADS | {"num_local_experts": 3, "num_experts_per_tok": 2},
    "BloomConfig": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "GPT2Config": {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 1024,
        "n_ctx": 1024,
        "vocab_size": 50257,
    },
    "FalconConfig": LAYERS | {"new_decoder_architecture": True, "num_kv_heads": 2},
}
"""Norms without their 1; experts; rows in other orders; weights that lie [in, out]."""


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family: str, text: str, tmp_path: Path) -> None:
    ids = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    build(config_of(family, **(ids | FAMILIES[family]))).to(torch.bfloat16).save_pretrained(
        tmp_path / "float"
    )
    file = lone(tmp_path / "float", tmp_path, "int:step4/32")
    fine = fracbit.refine(file, tmp_path / "refined.gguf", against=tmp_path / "float", **how(text))
    assert all(layer.after < layer.before for layer in fine.layers.values())
    assert not [note for note in fine.notes if "stayed" in note]
    found = fracbit.tweak(
        file, tmp_path / "tweaked.gguf", against=tmp_path / "float", method="closed", **how(text)
    )
    assert all("norm" in name for name in changed(file, tmp_path / "tweaked.gguf"))
    assert any(tweak.kept == "closed" for tweak in found.tweaks)
    fracbit.load(tmp_path / "tweaked.gguf")


@pytest.mark.parametrize("method", ["adam", "auto", "predictions", None])
def test_tweaking_moves_norms_alone(
    method: str | None, floats: Path, text: str, theirs: Path, tmp_path: Path
) -> None:
    given = {} if method is None else {"against": floats, "method": method}
    fracbit.tweak(theirs, tmp_path / "better.gguf", **how(text, **given))
    assert all("norm" in name for name in changed(theirs, tmp_path / "better.gguf"))


@pytest.mark.parametrize("verb", ["tweak", "refine"])
def test_a_killed_run_goes_on_to_the_same_bytes(
    verb: str, floats: Path, text: str, theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, options = (
        getattr(fracbit, verb),
        {"against": floats} | ({"method": "closed"} if verb == "tweak" else {}),
    )
    run(theirs, tmp_path / "one.gguf", **how(text, **options))
    write, steps = PatchedCopy.write, []

    def killed(copy: PatchedCopy, step: str, *rest: Any) -> None:
        if len(steps) == 2:  # the third block's bytes are there, and not its record
            raise Killed
        steps.append(step)
        write(copy, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(PatchedCopy, "write", killed)
        with pytest.raises(Killed):
            run(theirs, tmp_path / "two.gguf", **how(text, **options))
    assert not (tmp_path / "two.gguf").exists()
    with pytest.raises(OutputError, match="--resume"):
        run(theirs, tmp_path / "two.gguf", **how(text, **options))
    run(theirs, tmp_path / "two.gguf", **how(text, resume=True, **options))
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "one.gguf", "one.gguf.fracbit.json", "two.gguf", "two.gguf.fracbit.json",
    ]  # fmt: skip


def test_what_was_done_stands_beside_the_file(floats: Path, text: str, theirs: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.gguf", tmp_path / "two.gguf"
    fracbit.refine(theirs, one, against=floats, **how(text))
    fracbit.tweak(one, two, against=floats, method="closed", **how(text))
    said = json.loads((tmp_path / "two.gguf.fracbit.json").read_text())["improved"]
    assert (said["by"], said["before"]["by"]) == ("tweak", "refine")
    with pytest.raises(OutputError, match="exists"):
        fracbit.refine(theirs, two, against=floats, **how(text))
    fracbit.refine(theirs, two, against=floats, **how(text, overwrite=True))
    assert one.read_bytes() == two.read_bytes()
    with two.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert fracbit.verify(two, progress=None).faults == (f"{two} has changed since it was written",)


def test_files_of_fracbit_and_folders_are_refined_too(floats: Path, text: str, tmp_path: Path) -> None:
    fracbit.quantize(floats, tmp_path / "q", "int:step4/32", progress=None)
    for name in ("own.gguf", "folder"):
        export(tmp_path / "q", tmp_path / name, "gguf", progress=None)
        output = tmp_path / f"better-{name}"
        fracbit.refine(tmp_path / name, output, against=floats, **how(text))
        checked = fracbit.verify(output, progress=None)
        assert (checked.faults, checked.hashed) == ((), True)
    inside = record_of(tmp_path / "better-own.gguf")
    assert inside is not None
    assert (inside["exported"], "requantized" in inside, "checkpoint" in inside) == ("gguf", False, False)
    assert {path.name for path in (tmp_path / "better-folder").iterdir()} >= {
        "model.gguf",
        "fracbit.json",
        "config.json",
    }


def test_bad_input_is_refused_and_nothing_is_written(
    floats: Path, text: str, theirs: Path, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match=r"name a file, such as .*out\.gguf"):
        fracbit.refine(theirs, tmp_path / "out", against=floats, **how(text))
    with pytest.raises(OutputError, match="name a folder"):
        fracbit.refine(floats, tmp_path / "out.gguf", against=floats, **how(text))
    with pytest.raises(OutputError, match="not made by fracbit"):
        fracbit.refine(theirs, theirs, against=floats, **how(text, overwrite=True))
    fracbit.quantize(floats, tmp_path / "q", "int:step4/32", progress=None)
    export(tmp_path / "q", tmp_path / "float.gguf", "gguf", like={}, progress=None)
    with pytest.raises(SourceError, match="plain floats"):
        fracbit.refine(tmp_path / "float.gguf", tmp_path / "out.gguf", against=floats, **how(text))
    strange = tmp_path / "strange.gguf"
    strange.write_bytes(theirs.read_bytes().replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_zz.weight"))
    with pytest.raises((SourceError, FormatError)):
        fracbit.refine(strange, tmp_path / "out.gguf", against=floats, **how(text))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]
