"""Models for the evaluation tests: a tiny random one, and the shared trained ones where they are at hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from families import tiny_llama

VOCABULARY = 61


@pytest.fixture(scope="session")
def tiny() -> Callable[[int], LlamaForCausalLM]:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "initializer_range": 0.4}
    return partial(tiny_llama, vocab_size=VOCABULARY, max_position_embeddings=64, **sizes)


@pytest.fixture(scope="session")
def model(tiny: Callable[[int], LlamaForCausalLM]) -> LlamaForCausalLM:
    return tiny(0)


@pytest.fixture(scope="session")
def stream() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (301,), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="session")
def shared_model(shared: Path) -> Callable[[str], PreTrainedModel]:
    def load(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(shared / "models" / name, dtype=dtype)

    return load
