"""Outputs that are one file, `-o model.gguf`: absent or complete at any moment, and read wherever a folder is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fracbit
from families import tiny_llama
from fracbit.checkpoint.export.exporter import export, exporter_of, open_stored
from fracbit.checkpoint.export.one_file import partial_of
from fracbit.checkpoint.folder import JOURNAL
from fracbit.checkpoint.formats import gguf_record
from fracbit.checkpoint.formats.gguf_record import record_of, unchanged
from fracbit.checkpoint.lock import only_writer
from fracbit.checkpoint.output import Output
from fracbit.cli import app
from fracbit.engines import prove as proving
from fracbit.engines.compared_with import compared_with
from fracbit.engines.prove import proof_of
from fracbit.errors import FormatError, FracbitError, OutputError, RecipeError
from fracbit.pipeline.quantize.run import write_checkpoint
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import parse_scheme
from fracbit.records.spending import Spending
from outputs import Killed, logits

gguf = pytest.importorskip("gguf", reason="GGUF files need the extra: pip install 'fracbit[gguf]'")

FOR = Spending(engine="llama.cpp")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a float model, its checkpoint `q`, which needs rounding again, and `fit`, which does not."""
    base = tmp_path_factory.mktemp("made")
    tiny_llama(hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=16).save_pretrained(
        base / "float"
    )
    for name, scheme in (("q", "kmeans3/32"), ("fit", "int:step4/32")):
        write_checkpoint(Recipe(model=str(base / "float"), scheme=parse_scheme(scheme)), base / name)
    return base


def beside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_file_holds_what_the_folder_does_and_its_record(made: Path, tmp_path: Path) -> None:
    one = export(made / "q", tmp_path / "m.gguf", "gguf", requantize=True, progress=None)
    many = export(made / "q", tmp_path / "folder", "gguf", requantize=True, progress=None)
    assert beside(tmp_path) == ["folder", "m.gguf"]
    assert (one.output, one.bytes) == (str(tmp_path / "m.gguf"), (tmp_path / "m.gguf").stat().st_size)
    assert (one.requantized, one.floats) == (many.requantized, many.floats)
    record = record_of(tmp_path / "m.gguf")
    assert record is not None
    manifest = json.loads((tmp_path / "folder" / "fracbit.json").read_text())
    assert record == {name: each for name, each in manifest.items() if name not in ("files", "tensors")}
    assert len(record["requantized"]) == len(open_stored(made / "q").layers)
    mine, theirs = (gguf.GGUFReader(tmp_path / name) for name in ("m.gguf", "folder/model.gguf"))
    assert [each.name for each in mine.tensors] == [each.name for each in theirs.tensors]
    assert all(np.array_equal(a.data, b.data) for a, b in zip(mine.tensors, theirs.tensors, strict=True))
    assert set(mine.fields) - set(theirs.fields) == {gguf_record.RECORD, gguf_record.HASH}
    assert record_of(tmp_path / "folder" / "model.gguf") is None


def test_it_is_read_where_a_folder_is(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, text = tmp_path / "m.gguf", tmp_path / "ids.npy"
    np.save(text, np.random.default_rng(0).integers(0, 90, (2, 32)))
    export(made / "fit", file, "gguf", progress=None)
    assert torch.allclose(
        logits(fracbit.load(file, "float32")), logits(fracbit.load(made / "fit")), atol=1e-3
    )
    checked = fracbit.verify(file, progress=None)
    assert (checked.faults, checked.hashed, checked.files) == ((), True, 1)
    fracbit.load(file, verify=True)
    assert fracbit.evaluate(file, text, window=16, progress=None).loss is not None
    origin = compared_with(file, record_of(file) or {}, None)
    assert origin.name == str(made / "fit")
    asked: list[Path] = []

    def answered(path: Path, *words: Any, **how: Any) -> Any:
        asked.append(path)
        return {"weights": {}, "versions": {"llama.cpp": "build 0"}}, None

    monkeypatch.setattr(proving, "environment", lambda *words: Path("python"))
    monkeypatch.setattr(proving, "answered", answered)
    found = fracbit.prove(file, text=str(text), length=16)
    assert (found.engine, found.format, asked) == ("llama.cpp", "gguf", [file])
    assert json.loads(proof_of(file).read_text())["export"] == str(file)
    assert proof_of(file).name == "m.gguf.proof.json"
    moved = shutil.copy(file, tmp_path / "moved.gguf")
    alone = compared_with(Path(moved), (record_of(file) or {}) | {"checkpoint": "gone"}, None)
    assert alone.name == "the export as fracbit reads it"
    assert alone.weights


@pytest.mark.parametrize("place", [-1, 150, 600])
def test_a_changed_byte_is_found(place: int, made: Path, tmp_path: Path) -> None:
    """In the tensors, in the hash and in the record."""
    export(made / "fit", tmp_path / "m.gguf", "gguf", progress=None)
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    data[place] ^= 1
    (tmp_path / "m.gguf").write_bytes(data)
    assert unchanged(tmp_path / "m.gguf") is False
    assert fracbit.verify(tmp_path / "m.gguf", progress=None).faults == (
        f"{tmp_path / 'm.gguf'} has changed since it was written",
    )
    with pytest.raises(FormatError, match="has changed since it was written"):
        fracbit.load(tmp_path / "m.gguf", verify=True)


def test_a_file_of_others_says_nothing_of_its_making(made: Path, tmp_path: Path) -> None:
    export(made / "fit", tmp_path / "folder", "gguf", progress=None)
    file = tmp_path / "folder" / "model.gguf"
    assert unchanged(file) is None
    assert not fracbit.verify(file, progress=None).hashed
    with pytest.raises(
        FormatError, match=r"does not say what it was made of.*export again with -o model.gguf"
    ):
        fracbit.prove(file)


@pytest.mark.parametrize("step", ["write_file", "move_out", "flush", "rmtree"])
@pytest.mark.parametrize("engine", [False, True], ids=["export", "quantize"])
def test_a_run_that_is_killed_goes_on(
    step: str, engine: bool, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, whole = tmp_path / "m.gguf", tmp_path / "whole.gguf"

    def run(output: Path, **how: Any) -> Any:
        if engine:
            return fracbit.quantize(made / "float", output, spending=FOR, progress=None, **how)
        return export(made / "fit", output, "gguf", progress=None, **how)

    def killed(*words: Any, **how: Any) -> Any:
        raise Killed

    run(whole)
    with monkeypatch.context() as patch:
        if step == "rmtree":
            patch.setattr(shutil, "rmtree", killed)
        elif step == "flush":  # between the file under its other name and its record
            patch.setattr("fracbit.checkpoint.export.gguf.gguf_file.fill", killed)
        else:
            patch.setattr(Output, step, killed)
        with pytest.raises(Killed):
            run(file)
    assert file.exists() == (step == "rmtree")
    assert not file.exists() or unchanged(file)
    assert partial_of(file).is_dir()
    if not file.exists():
        with pytest.raises(OutputError, match=r"m\.gguf\.partial.*--resume"):
            run(file)
    result = run(file, resume=True)
    assert beside(tmp_path) == ["m.gguf", "whole.gguf"]
    assert result.bytes == file.stat().st_size
    assert not fracbit.verify(file, progress=None).faults
    with pytest.raises(OutputError, match="is finished: there is nothing to resume"):
        run(file, resume=True)
    with pytest.raises(OutputError, match="--overwrite to replace it"):
        run(file)
    before = file.stat().st_mtime_ns
    run(file, overwrite=True)
    assert file.stat().st_mtime_ns > before
    assert beside(tmp_path) == ["m.gguf", "whole.gguf"]


def test_one_writer_at_a_time(made: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    place = partial_of(file)
    (place / JOURNAL).mkdir(parents=True)
    with (
        only_writer(place, place / JOURNAL / "writer.json"),
        pytest.raises(OutputError, match="is being written"),
    ):
        export(made / "fit", file, "gguf", resume=True, progress=None)
    assert not file.exists()


def test_what_is_in_the_way_is_left_alone(made: Path, tmp_path: Path) -> None:
    folder, foreign = tmp_path / "folder.gguf", tmp_path / "foreign.gguf"
    folder.mkdir()
    foreign.write_bytes(b"GGUF of another program")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="is a folder, and the output is one file"):
            export(made / "fit", folder, "gguf", overwrite=overwrite)
        with pytest.raises(OutputError, match="is a folder, and the output is one file"):
            fracbit.quantize(made / "float", folder, spending=FOR, overwrite=overwrite)
    for how in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(OutputError, match="was not made by fracbit, so it is not overwritten"):
            export(made / "fit", foreign, "gguf", **how)  # type: ignore[arg-type]
        with pytest.raises(OutputError, match="was not made by fracbit, so it is not overwritten"):
            fracbit.quantize(made / "float", foreign, spending=FOR, **how)  # type: ignore[arg-type]
    with pytest.raises(OutputError, match="exists; use --overwrite"):
        export(made / "fit", foreign, "gguf")
    theirs = partial_of(tmp_path / "new.gguf")
    theirs.mkdir()
    (theirs / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty and was not made by fracbit"):
        export(made / "fit", tmp_path / "new.gguf", "gguf", overwrite=True)
    assert beside(tmp_path) == ["folder.gguf", "foreign.gguf", "new.gguf.partial"]


def test_a_file_that_comes_meanwhile_is_not_replaced(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "m.gguf"
    monkeypatch.setattr(
        "fracbit.checkpoint.export.exporter.exporter_of",
        lambda asked: Slow(exporter_of(asked), file),
    )
    for overwrite, says in ((False, "use --overwrite to replace it"), (True, "was not made by fracbit")):
        with pytest.raises(OutputError, match=says):
            export(made / "fit", file, "gguf", overwrite=overwrite, progress=None)
        assert file.read_bytes() == b"another's"
        file.unlink()


class Slow:
    """An exporter during whose work another program writes the file."""

    def __init__(self, inner: Any, file: Path) -> None:
        self.inner, self.file = inner, file

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def write(self, *words: Any) -> Any:
        self.file.write_bytes(b"another's")
        return self.inner.write(*words)


def test_other_formats_and_engines_are_refused(made: Path, tmp_path: Path) -> None:
    for format_ in ("mlx", "gptq:v1", "float"):
        with pytest.raises(
            RecipeError, match=rf"m\.gguf ends in \.gguf.*{format_} is asked for; export gguf, or name"
        ):
            export(made / "fit", tmp_path / "m.gguf", format_)
    with pytest.raises(
        RecipeError, match=r"one file of the format gguf.*write --for llama.cpp, or name a folder"
    ):
        fracbit.quantize(made / "float", tmp_path / "m.gguf", spending=Spending(engine="mlx"))
    with pytest.raises(RecipeError, match=r"a checkpoint is asked for; write --for llama.cpp"):
        fracbit.quantize(made / "float", tmp_path / "m.gguf")
    assert not beside(tmp_path)


def test_the_commands(made: Path, tmp_path: Path) -> None:
    """With calibration, after which losses are shown."""
    file, ids = tmp_path / "m.gguf", tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(0, 90, (8, 32)))
    words = [
        "quantize",
        str(made / "float"),
        "--for",
        "llama.cpp",
        "--calibration",
        str(ids),
        "-o",
        str(file),
    ]
    words += ["--set", "calibration.samples=4", "--set", "calibration.length=32", "--quiet"]
    ran = CliRunner().invoke(app, words)
    assert ran.exit_code == 0, ran.output
    assert f"{file}: " in ran.stdout.replace("\n", "")
    for command in ("verify", "inspect"):
        ran = CliRunner().invoke(app, [command, str(file)])
        assert ran.exit_code == 0, ran.output
    found = CliRunner().invoke(app, ["export", str(made / "fit"), "--to", "mlx", "-o", str(file)])
    assert isinstance(found.exception, FracbitError)
    assert os.access(file, os.R_OK)
