"""Calibrated runs on a device: a pretended accelerator that refuses to mix tensors of two devices; the result is the CPU's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from accelerator import DEVICE, accelerator
from fracbit.errors import RecipeError, SourceError
from fracbit.models.blocks import blocks
from fracbit.numerics import decode
from fracbit.numerics.stats import add_inputs, empty
from fracbit.pipeline.quantize import block as stage
from fracbit.pipeline.quantize.run import write_checkpoint
from fracbit.quantizers.gptq import Gptq
from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import Scheme
from texts import write_ids

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

Maker = Callable[..., "LlamaForCausalLM"]


@pytest.fixture(scope="module")
def files(tiny_llama: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device")
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2}
    tiny_llama(**sizes, num_key_value_heads=1, tie_word_embeddings=True).save_pretrained(folder / "float")
    write_ids(folder / "ids.u16", 8, 24)
    return folder


def recipe(files: Path, scheme: Scheme, quantizer: str, **plan: Any) -> Recipe:
    outliers = plan.pop("outliers", None)
    calibration = Calibration(
        texts=(f"{files / 'ids.u16'}?length=24",), samples=8, length=24, batch=8, **plan
    )
    return Recipe(
        model=str(files / "float"),
        scheme=scheme,
        quantizer=quantizer,
        outliers=outliers,
        calibration=calibration,
    )


CASES: dict[str, tuple[Scheme, str, dict[str, Any]]] = {
    "much": (
        Scheme("int", 3, 10, offset="zero"),
        "gptq",
        {
            "transforms": ("rotate", "rotate-mlp", "smooth"),
            "axis": "nearest",
            "tweak": "auto",
            "outliers": "cost:0.1",
        },
    ),
    "trained": (
        Scheme("kmeans", 2, 10),
        "gptq",
        {"tweak": "train:epochs=2,tokens=24", "transforms": ("smooth",)},
    ),
    "trained with zero points": (
        Scheme("int", 2, 10, offset="zero"),
        "gptq",
        {"tweak": "train:epochs=2", "chain": "float"},
    ),
    "the rest": (
        Scheme("nf", 3, 10, "out", "float"),
        "gptq",
        {"inputs": "power8/tensor", "chain": "float", "sequential": True},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_blocks_go_to_the_device_and_come_back(
    name: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme, quantizer, plan = CASES[name]
    asked = recipe(files, scheme, quantizer, **dict(plan))
    # The native attention adds in another order than torch's, and runs on the CPU alone.
    monkeypatch.setattr("fracbit.models.attention.attends", lambda *states: False)
    write_checkpoint(asked, tmp_path / "cpu")
    places, left = set(), []
    advance, release = stage.observe_block, stage.release

    def observed(work: Any, block: Any) -> Any:
        places.update(parameter.device for parameter in block.module.parameters())
        assert block.hidden.states.device == torch.device("cpu"), "hidden states stay where there is room"
        opened = work.opened
        elsewhere = [b for _, b in blocks(opened.model, opened.family) if b is not block.module]
        assert all(p.is_meta for b in elsewhere for p in b.parameters()), "one block at a time"
        return advance(work, block)

    def released(block: torch.nn.Module) -> None:
        release(block)
        left.append({parameter.device.type for parameter in block.parameters()})

    monkeypatch.setattr(stage, "observe_block", observed)
    monkeypatch.setattr(stage, "release", released)
    with accelerator() as seen:
        write_checkpoint(asked, tmp_path / "away", device=DEVICE)
    assert places == {DEVICE}
    assert left == [{"meta"}] * 2
    assert seen["aten::addmm"] > 0, "gram matrices are summed on the device"
    for path in sorted((tmp_path / "cpu").iterdir()):
        assert path.read_bytes() == (tmp_path / "away" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("dtype", ["kmeans", "kmeans:row", "quantile"])
def test_fitted_tables_are_refined_on_the_device(dtype: str) -> None:
    random = torch.Generator().manual_seed(0)
    weight, x = torch.randn(4, 12, generator=random), torch.randn(40, 12, generator=random)
    scheme, fill = Scheme(dtype, 2, 6, scale="int8:8"), Gptq(search=True, rounds=1)
    here = fill(weight, scheme, add_inputs(empty(12), x))
    with accelerator():
        far, seen = weight.to(DEVICE), x.to(DEVICE)
        there = fill(far, scheme, add_inputs(empty(12, device=far.device), seen)).packed.to("cpu")
    assert torch.equal(decode(here.packed), decode(there))


def test_two_devices_do_not_mix() -> None:
    """The pretended accelerator itself: it would notice."""
    with accelerator():
        away = torch.ones(3).to(DEVICE)
        assert away.cpu().sum() == 3
        with pytest.raises(RuntimeError, match="expected all tensors on"):
            away + torch.ones(3)


def test_devices_that_are_not_there(files: Path, tmp_path: Path) -> None:
    asked = recipe(files, Scheme(), "gptq")
    for device in ("vulkan", "no such thing"):
        with pytest.raises(SourceError, match="cannot be used here"):
            write_checkpoint(asked, tmp_path / "q", device=device)
    assert not (tmp_path / "q").exists()
    from typer.testing import CliRunner

    from fracbit.cli import app

    done = CliRunner().invoke(
        app, ["quantize", str(files / "float"), "-o", str(tmp_path / "q"), "--device", "cuda"]
    )
    assert isinstance(done.exception, RecipeError)
