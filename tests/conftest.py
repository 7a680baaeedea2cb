"""What every test may use: the shared folder, tiny random models, and no network, no chance.

The environment is set before anything imports torch, transformers or datasets, which read it once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

import families

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Several test processes share the cores; a pool of threads in each only makes them wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tensors make examples slow to draw and to shrink, on a busy machine more so: time is no verdict here.
settings.register_profile(
    "default", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "default"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with trained models and real text: $FRACBIT_SHARED, else ../shared, else the test skips."""
    named = os.environ.get("FRACBIT_SHARED")
    folder = Path(named) if named else ROOT.parent / "shared"
    if not (folder / "models").is_dir():
        pytest.skip(f"no shared models at {folder}: set FRACBIT_SHARED to a folder with models/ and data/")
    return folder.resolve()


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """A maker of random Llama models: `families.tiny_llama`."""
    return families.tiny_llama


@pytest.fixture
def tokens() -> torch.Tensor:
    """Five samples of eleven ids for the tiny models of `families.CONFIGS`."""
    return families.tokens()
