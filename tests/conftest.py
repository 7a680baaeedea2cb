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

if TYPE_CHECKING:
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
    """A maker of random Llama models, about 0.1M weights: `tiny_llama(seed=1, intermediate_size=44, ...)`.

    Keywords are LlamaConfig's. No block size of 32 or more divides its widths, 48 and 132. The same arguments
    give the same weights, and the caller's random state is left alone.
    """

    def make(seed: int = 0, **changes: object) -> LlamaForCausalLM:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes: dict[str, object] = {
            "vocab_size": 96,
            "hidden_size": 48,
            "intermediate_size": 132,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()

    return make
