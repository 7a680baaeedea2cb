"""transformers 5.19 asks a quantizer for its rules of names without naming the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers.quantizers.base import HfQuantizer

import fracbit
from fracbit.checkpoint.hf import FracbitQuantizer
from fracbit.pipeline.quantize.run import write_checkpoint
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import parse_scheme
from outputs import logits

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def test_a_checkpoint_is_loaded(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llama().save_pretrained(tmp_path / "float")
    write_checkpoint(Recipe(model=str(tmp_path / "float"), scheme=parse_scheme("int4z/32")), tmp_path / "q")
    wanted = logits(fracbit.load(tmp_path / "q"))
    asked: list[bool] = []
    ours = FracbitQuantizer.update_weight_conversions

    def older_base(self: HfQuantizer, weight_conversions: list[Any]) -> list[Any]:
        return weight_conversions

    def older_call(self: FracbitQuantizer, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        asked.append(True)
        return ours(self, weight_conversions)

    monkeypatch.setattr(HfQuantizer, "update_weight_conversions", older_base)
    monkeypatch.setattr(FracbitQuantizer, "update_weight_conversions", older_call)
    model = fracbit.load(tmp_path / "q")
    assert asked
    assert torch.equal(logits(model), wanted)
    assert model.hf_quantizer.loading is None
