"""A model, a text and a grid that are small enough to sweep in a test."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

GRID = """
models = ["tiny"]
[evaluation]
text = "ids.u16?length=32"
[calibration]
text = "ids.u16?length=32"
samples = 4
length = 16
[[arm]]
dtypes = ["int", "nf"]
bits = [2, 3, 4]
blocks = [16, "flat:16"]
"""


def save_tiny(folder: Path, seed: int = 0) -> Path:
    """A random Llama with grouped queries and a tied head."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A folder with a model `tiny`, token ids, and `grid.toml` (13 runs)."""
    save_tiny(tmp_path / "tiny")
    ids = np.random.default_rng(0).integers(0, 64, 32 * 6, dtype=np.uint16)
    ids.tofile(tmp_path / "ids.u16")
    (tmp_path / "grid.toml").write_text(GRID)
    return tmp_path
