"""Judging a model on its own calibration text is noticed, by `fracbit eval` and by a contest; so is not knowing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fracbit.cli import app
from fracbit.data import read_documents
from fracbit.pipeline.study.overlap import calibration_sources, overlap_notes

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@pytest.fixture(scope="module")
def files(tiny_llama: Callable[..., LlamaForCausalLM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its calibration ids, and evaluation ids of which 2 of 6 documents stand in them."""
    folder = tmp_path_factory.mktemp("overlap")
    tiny_llama().save_pretrained(folder / "float")
    rows = np.random.default_rng(0).integers(3, 96, (14, 96), dtype=np.uint16)
    rows[:10].tofile(folder / "seen.u16")
    rows[8:].tofile(folder / "other.u16")
    rows[10:].tofile(folder / "fresh.u16")
    more = np.random.default_rng(1).integers(3, 96, (86, 96), dtype=np.uint16)
    np.concatenate([rows[10:], more]).tofile(folder / "held.u16")
    return folder


def ran(*words: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, [str(word) for word in words] + ["--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def test_a_checkpoint_remembers_what_it_was_calibrated_with(files: Path, tmp_path: Path) -> None:
    seen = f"{files / 'seen.u16'}?length=96"
    ran(
        "quantize", files / "float", "-o", files / "q", "--quantizer", "gptq", "--calibration", seen,
        "--set", "calibration.samples=8", "--set", "calibration.length=96",
    )  # fmt: skip
    assert [source["source"] for source in calibration_sources(files / "q")] == [seen]
    told = ran("eval", files / "q", "--text", f"{files / 'other.u16'}?length=96")["notes"]
    assert told == [
        f"2 of 6 documents of {files / 'other.u16'}?length=96 are also in the calibration text {seen}: "
        "figures on them are too good"
    ]
    assert ran("eval", files / "q", "--text", f"{files / 'fresh.u16'}?length=96")["notes"] == []
    assert ran("eval", files / "float", "--text", seen)["notes"] == []
    np.full(96, 5, dtype=np.uint16).tofile(files / "seen.u16")
    changed = ran("eval", files / "q", "--text", f"{files / 'fresh.u16'}?length=96")["notes"]
    assert len(changed) == 1
    assert "has changed since" in changed[0]
    (files / "seen.u16").unlink()
    gone = ran("eval", files / "q", "--text", f"{files / 'fresh.u16'}?length=96")["notes"]
    assert len(gone) == 1
    assert "could not be compared" in gone[0]


def test_a_contest_on_calibration_text_is_noticed(files: Path, tmp_path: Path) -> None:
    told = ran(
        "quantize", files / "float", "-o", tmp_path / "q", "--average-bits", 3.6, "--calibration",
        f"{files / 'fresh.u16'}?length=96", "--set", "calibration.samples=2", "--set", "calibration.length=96",
        "--set", f"spending.held_out={files / 'held.u16'}?length=96", "--quantizer", "gptq",
        "--set", "spending.levels=int4z/64,int3z/64",
    )["notes"]  # fmt: skip
    assert any(note.startswith("4 of 90 documents") and "too good" in note for note in told), told


def test_a_contest_on_the_text_of_a_score_is_noticed(files: Path, tmp_path: Path) -> None:
    """A score's file remembers its text, however long ago it was made."""
    seen, held = f"{files / 'fresh.u16'}?length=96", f"{files / 'held.u16'}?length=96"
    words = ("--text", seen, "--samples", 2, "--length", 96)
    ran("score", files / "float", "--method", "lim", *words, "-o", tmp_path / "lim.json")
    score = ("--set", f"spending.score={tmp_path / 'lim.json'}", "--set", "spending.granularity=block")
    budget = ("--average-bits", 3.6, *score, "--set", f"spending.held_out={held}")
    for command in (
        ("plan", files / "float", *budget, "--set", "spending.length=96"),
        ("quantize", files / "float", "-o", tmp_path / "q", *budget),
    ):
        told = [note for note in ran(*command)["notes"] if "too good" in note]
        assert told == [
            f"4 of 90 documents of {held} are also in the text that the score saw {seen}: figures on them are too good"
        ]


def test_generated_text_is_nobodys(files: Path) -> None:
    text = read_documents(f"{files / 'fresh.u16'}?length=96", None, 96)
    assert overlap_notes(text, [{"source": "generated", "sha256": "0"}], None, 96) == ()
