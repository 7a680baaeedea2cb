"""Laws of every export format of the table: it holds every layer or says what to do instead, and writes what it announced."""

from __future__ import annotations

from pathlib import Path

import pytest

import fracbit
from fracbit.checkpoint.export.exporter import FORMATS, StoredModel, export, exporter_of, fitted, open_stored
from fracbit.errors import FormatError
from fracbit.records.scheme import Scheme
from golden.recipes import CHECKPOINTS
from outputs import contents

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints"
HEADERS = 20_000  # bytes of names and shapes in safetensors files, which no format announces


def takes(name: str, stored: StoredModel) -> bool:
    """Whether a format takes a model, whatever its layers; GGUF also asks for families and tokenizers."""
    try:
        exporter_of(name).check(stored.model, stored.source.folder)
    except FormatError:
        return name == "gguf"
    return True


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_checkpoint_is_held_or_refused(name: str, checkpoint: str, tmp_path: Path) -> None:
    source, before = GOLDEN / checkpoint, contents(GOLDEN / checkpoint)
    stored = open_stored(source)
    if not takes(name, stored):
        for requantize in (False, True):
            with pytest.raises(FormatError, match=type(stored.model).__name__):
                export(source, tmp_path / "out", name, requantize=requantize)
        assert not (tmp_path / "out").exists()
        return
    near = [exporter_of(name).nearest(layer) for layer in stored.layers.values()]
    reasons = {each.reason for each in near} - {""}
    if reasons:
        with pytest.raises(FormatError) as refused:
            export(source, tmp_path / "out", name)
        assert any(reason in str(refused.value) for reason in reasons)
        assert not (tmp_path / "out").exists()
    if (
        all(each.scheme is not None for each in near) and name != "gguf"
    ):  # which also asks for families and tokenizers
        blocks = {each.scheme.block for each in near if isinstance(each.scheme, Scheme)}
        if name == "awq" and len(blocks) > 1:
            with pytest.raises(FormatError, match="one size of groups for all layers"):
                export(source, tmp_path / "out", name, requantize=True)
            assert not (tmp_path / "out").exists()
            return
        done = export(source, tmp_path / "out", name, requantize=True)
        allowed = fitted(stored, exporter_of(name), name, requantize=True)
        assert 0 < done.bytes <= exporter_of(name).size(allowed) + HEADERS
        again = export(source, tmp_path / "again", name, requantize=True)
        assert again.bytes == done.bytes
        assert contents(tmp_path / "again") == contents(tmp_path / "out")
        assert bool(done.requantized or done.floats) == bool(reasons)
        assert not fracbit.verify(tmp_path / "out", progress=None).faults
    assert contents(source) == before


def test_every_format_writes_one_of_them() -> None:
    """As it is, or rounded again."""
    for name in FORMATS:
        layers = [open_stored(GOLDEN / checkpoint).layers.values() for checkpoint in CHECKPOINTS]
        assert any(all(exporter_of(name).nearest(layer).scheme for layer in each) for each in layers), name
