"""`fracbit env` says what runs and why, and no secrets."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fracbit.cli import app
from fracbit.kernels.table import KERNELS
from fracbit.pipeline.serve import machine as described
from fracbit.records.version import __version__


def test_it_says_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    monkeypatch.setenv("FRACBIT_API_KEY", "secret-token")
    shown = CliRunner().invoke(app, ["env"])
    assert shown.exit_code == 0
    for part in (
        f"fracbit    {__version__}",
        f"torch {torch.__version__}",
        "OMP_NUM_THREADS=1",
        "cores for this process",
    ):
        assert part in shown.stdout
    assert all(f"{kernel.name}: {kernel.explain()}" in shown.stdout for kernel in KERNELS)
    assert "secret-token" not in shown.stdout
    found = json.loads(CliRunner().invoke(app, ["env", "--json"]).stdout)
    assert found["fracbit"] == __version__
    assert found["threads"] == torch.get_num_threads()
    assert {"torch", "transformers", "scipy", "gguf"} <= set(found["packages"])
    assert not {"pytest", "ruff", "sphinx", "fracbit"} & set(found["packages"])


def test_sources_on_the_path_have_no_list_of_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(described, "requires", missing)
    assert set(described.machine().packages) == {"torch", "transformers", "safetensors", "numpy"}


def test_the_template_of_a_bug_asks_for_it() -> None:
    template = Path(__file__).parents[2] / ".github" / "ISSUE_TEMPLATE" / "bug.md"
    assert "fracbit env" in template.read_text(encoding="utf-8")
