"""Models for the evaluation tests: a tiny random one, and the shared trained ones where they are at hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

VOCABULARY = 61
POSITIONS = 64


def tiny_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.4,
    )


@pytest.fixture(scope="session")
def tiny() -> Callable[[int], LlamaForCausalLM]:
    def make(seed: int) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        return LlamaForCausalLM(tiny_config()).eval()

    return make


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
