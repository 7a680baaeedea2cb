"""The shared fixtures keep their promises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants


def test_tiny_llama_is_the_same_for_the_same_seed(tiny_llama: Callable[..., Any]) -> None:
    before = torch.random.get_rng_state()
    first, second, other = tiny_llama(), tiny_llama(), tiny_llama(seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_tiny_llama_takes_what_its_configuration_takes(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(intermediate_size=44, num_hidden_layers=1)
    assert model.model.layers[0].mlp.down_proj.weight.shape == (48, 44)
    logits = model(torch.tensor([[1, 5, 7]])).logits
    assert logits.shape == (1, 3, 96)
    assert torch.isfinite(logits).all()


def test_the_hub_is_out_of_reach() -> None:
    assert constants.HF_HUB_OFFLINE


def test_the_shared_folder_has_models_and_data(shared: Path) -> None:
    assert list(shared.glob("models/*/config.json"))
    assert (shared / "data").is_dir()
