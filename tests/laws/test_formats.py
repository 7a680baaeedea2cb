"""Laws of every export format of the table: it holds every layer or says what to do instead, and writes what it announced."""

from __future__ import annotations

from pathlib import Path

import pytest

from fracbit.checkpoint.export.exporter import FORMATS, export, exporter_of, open_stored
from fracbit.errors import FormatError
from golden.recipes import CHECKPOINTS
from outputs import contents

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints"
HEADERS = 20_000  # bytes of names and shapes in safetensors files, which no format announces


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_checkpoint_is_held_or_refused(name: str, checkpoint: str, tmp_path: Path) -> None:
    source, before = GOLDEN / checkpoint, contents(GOLDEN / checkpoint)
    stored = open_stored(source)
    faults = {exporter_of(name).fault(layer) for layer in stored.layers.values()} - {""}
    if faults:
        with pytest.raises(FormatError) as refused:
            export(source, tmp_path / "out", name)
        assert any(fault in str(refused.value) for fault in faults)
        assert not (tmp_path / "out").exists()
    else:
        done = export(source, tmp_path / "out", name)
        assert 0 < done.bytes <= exporter_of(name).size(stored) + HEADERS
        again = export(source, tmp_path / "again", name)
        assert again.bytes == done.bytes
        assert contents(tmp_path / "again") == contents(tmp_path / "out")
    assert contents(source) == before


def test_every_format_holds_one_of_them() -> None:
    for name in FORMATS:
        layers = [open_stored(GOLDEN / checkpoint).layers.values() for checkpoint in CHECKPOINTS]
        assert any(not any(exporter_of(name).fault(layer) for layer in each) for each in layers), name
