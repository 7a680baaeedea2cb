"""Before a run: one block of each kind must run packed; after it: how much became smaller is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

import families
import fracbit
from fracbit.errors import RecipeError, SourceError
from fracbit.models.calls import Call, HandedOn, handed
from fracbit.models.code import decode_for_code
from fracbit.models.quant_linear import QuantLinear
from fracbit.pipeline.quantize import tried


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    families.model_of("llama").save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


def test_code_that_treats_a_linear_as_another_thing_is_refused_before_anything_is_written(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(self: Any, x: torch.Tensor) -> torch.Tensor:
        return mlp(self, x) * (2 if isinstance(self.down_proj, nn.Linear) else 1)

    monkeypatch.setattr(LlamaMLP, "forward", other)
    with pytest.raises(
        SourceError, match=r"model\.layers\.0 \(LlamaDecoderLayer\) gives other numbers when it is packed"
    ):
        fracbit.quantize(llama, llama.parent / "out", "int4z/8", progress=False)
    assert not (llama.parent / "out").exists()


def test_code_that_fails_on_a_packed_linear_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(self: Any, x: torch.Tensor) -> torch.Tensor:
        return mlp(self, x) + 0 * len(self.down_proj.state_dict()["weight"].T[0, 0, None])

    monkeypatch.setattr(LlamaMLP, "forward", other)
    with pytest.raises(SourceError, match="runs as floats and not when it is packed"):
        fracbit.quantize(llama, llama.parent / "out", "int4z/8", progress=False)
    assert not (llama.parent / "out").exists()


class Reader(LlamaMLP):
    """An MLP whose code reads a weight instead of calling the layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.act_fn(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)


def test_code_that_reads_a_weight_gets_it_decoded(llama: Path) -> None:
    ids = torch.arange(12)[None]
    fracbit.quantize(llama, llama.parent / "out", "int4z/8", progress=False)
    model = fracbit.load(llama.parent / "out", "float32")
    with torch.no_grad():
        called = model(ids).logits
        for block in model.model.layers:
            block.mlp.__class__ = Reader
        decode_for_code(model)
        torch.testing.assert_close(model(ids).logits, called, rtol=1e-4, atol=1e-5)
    assert model.model.layers[0].mlp.up_proj.weight.dim() == 1  # the bytes, where nobody reads them


def test_blocks_that_cannot_be_tried_are_noted(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise ValueError("images are needed")

    monkeypatch.setattr(tried, "entrance", fail)
    made = fracbit.quantize(llama, llama.parent / "out", "int4z/8", progress=False)
    assert made.notes == ("the blocks could not be tried before the run (ValueError: images are needed)",)


def test_a_packed_block_that_gives_nan_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x.new_full((*x.shape[:-1], self.out_features), torch.nan)

    monkeypatch.setattr(QuantLinear, "forward", broken)
    with pytest.raises(SourceError, match="gives other numbers when it is packed"):
        fracbit.quantize(llama, llama.parent / "out", "int4z/8", progress=False)


def test_a_head_and_a_layer_have_the_type_that_code_asks_for(llama: Path) -> None:
    families.model_of("llama-tied-biased").save_pretrained(llama.parent / "tied")
    recipe = {"model": str(llama.parent / "tied"), "scheme": "int4z/8", "embeddings": "int4z/8"}
    fracbit.quantize(fracbit.Recipe.model_validate(recipe), llama.parent / "out", progress=False)
    model = fracbit.load(llama.parent / "out", "bfloat16")
    assert model.lm_head.weight.dtype == torch.bfloat16
    layer = model.model.layers[0].mlp.up_proj
    layer.decodes = "type"
    assert (layer.weight.dtype, layer.weight.numel()) == (torch.bfloat16, 0)


def test_what_stays_float_is_said(llama: Path) -> None:
    made = fracbit.quantize(llama, llama.parent / "all", "int4z/8", progress=False)
    assert made.share.blocks == 1
    assert made.share.kept_float == ()
    assert made.notes == ()
    recipe = {"model": str(llama), "overrides": [{"layers": "*.mlp.*", "keep": True}], "scheme": "int4z/8"}
    some = fracbit.quantize(fracbit.Recipe.model_validate(recipe), llama.parent / "some", progress=False)
    sizes = {"attention": 4 * 40 * 10 * 3, "mlp": 3 * 40 * 43}  # q and o of four heads, k and v of two
    assert some.share.blocks == pytest.approx(sizes["attention"] / sum(sizes.values()))
    assert [name for name, _, _ in some.share.kept_float] == [
        f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")
    ]
    assert some.notes == ()  # the recipe names what it keeps
    assert some.share.warning(0.1) == ()
    unasked = tuple((name, share, "not a linear") for name, share, _ in some.share.kept_float)
    (warning,) = replace(some.share, kept_float=unasked).warning(0.1)
    assert warning.startswith(
        "only 48.2% of the blocks' matrices become smaller; float: mlp.gate_proj.weight (17.3%"
    )
    assert warning.endswith("--allow-float 0.52")
    assert replace(some.share, kept_float=unasked).warning(0.6) == ()
    with pytest.raises(RecipeError, match="0 to 1; got 2"):
        fracbit.quantize(llama, llama.parent / "bad", "int4z/8", allow_float=2, progress=False)


def test_values_that_a_block_hands_on_are_put_in_their_places() -> None:
    call = Call((HandedOn(0, 1),), {"x": [HandedOn(1, 0), 3]})
    one = handed(call, 0, ("a", "b"))
    assert one.args == ("b",)
    assert one.kwargs == {"x": [HandedOn(1, 0), 3]}
    assert handed(one, 1, ("c",)).kwargs == {"x": ["c", 3]}
    assert handed(call, 0, None).args == (None,)
    assert handed(Call((HandedOn(1, 1),), {}), 0, ("a",)).args == (
        HandedOn(1, 1),
    )  # longer than what block 0 hands on
