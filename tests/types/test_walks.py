"""Types that a plain walk over blocks does not fit: shared blocks, blocks that text skips, models that text cannot run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import check
import pytest
import tiny
import torch
from transformers import PreTrainedModel

import fracbit
from families import walked
from fracbit.checkpoint.opened import open_float
from fracbit.checkpoint.output import InMemory
from fracbit.errors import RecipeError, SourceError
from fracbit.models.blocks import blocks, linears
from fracbit.models.find import family_of
from fracbit.pipeline.quantize.calibrated import embed_source
from fracbit.pipeline.quantize.run import write_checkpoint
from fracbit.pipeline.quantize.shared import shared_stats
from fracbit.pipeline.quantize.token_weights import stack_of
from fracbit.pipeline.quantize.work import prepare
from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Recipe
from outputs import contents
from texts import write_ids

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own

LENGTH, SAMPLES = 16, 8
WHOLE = {
    "causal:zamba": "",
    "causal:zamba2": "",
    "image:mllama": "",  # its last block attends to images and is left out
    "image:blip-2": "language_model",
    "image:kosmos-2": "text_model",
    "image:t5gemma2": "",
}
"""Types, and the part of the model that text goes through."""


@pytest.mark.parametrize("kind", WHOLE)
def test_walk_is_the_whole_forward(kind: str) -> None:
    model = tiny.model_of(kind)
    ids = torch.randint(4, 80, (3, 7), generator=torch.Generator().manual_seed(0))
    part: Any = model.get_submodule(WHOLE[kind])
    given = {"input_ids": ids} | ({"decoder_input_ids": ids} if kind == "image:t5gemma2" else {})
    with torch.no_grad():
        whole = part(**given, use_cache=False).logits
    assert check.apart(walked(model, ids), whole) < check.TOLERANCE


@pytest.mark.parametrize("kind", ["causal:xlnet", "causal:llama"])
def test_as_many_samples_as_tokens(kind: str) -> None:
    """The shape of the states alone does not tell which of the two comes first (XLNet: tokens)."""
    model = tiny.model_of(kind)
    ids = torch.randint(4, 80, (5, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids).logits
    assert check.apart(walked(model, ids, batch=5), whole) < check.TOLERANCE


def saved(kind: str, folder: Path) -> PreTrainedModel:
    model = tiny.model_of(kind)
    model.save_pretrained(folder / "float")
    return model


def asked(folder: Path, **changes: Any) -> Recipe:
    text = write_ids(folder / "ids.u16", SAMPLES, LENGTH, 80)
    plan = Calibration(texts=(text,), samples=SAMPLES, length=LENGTH, batch=4, **changes)
    return Recipe(model=str(folder / "float"), scheme=check.SCHEME, quantizer="gptq", calibration=plan)


@pytest.mark.parametrize("kind", ["causal:zamba", "causal:zamba2"])
def test_statistics_of_shared_blocks_are_those_of_every_use(kind: str, tmp_path: Path) -> None:
    model = saved(kind, tmp_path)
    opened = open_float(tmp_path / "float")
    work, target = prepare(asked(tmp_path), opened), InMemory()
    assert work.samples is not None
    sums: dict[str, torch.Tensor] = {}
    owner = {id(parameter): name for name, parameter in model.named_parameters()}
    for _, block in blocks(model, family_of(model)):
        for module in linears(block, family_of(model)).values():

            def seen(_: Any, args: Any, name: str = owner[id(module.weight)].removesuffix(".weight")) -> None:
                rows = args[0].reshape(-1, args[0].shape[-1])  # [tokens, in]
                sums[name] = sums.get(name, 0) + rows.T @ rows  # [in, in]

            module.register_forward_pre_hook(seen)
    with torch.no_grad():
        model(work.samples.ids)
    found = shared_stats(work, stack_of(work), embed_source(work, target))
    shared = {name for name in opened.model.all_tied_weights_keys.values() if "shared" in name}
    assert found
    assert {f"{name}.weight" for name in found} <= shared
    for name, stats in found.items():
        assert stats.gram is not None
        torch.testing.assert_close(
            stats.gram, sums[name], rtol=1e-3, atol=1e-3 * float(sums[name].abs().max())
        )


def test_shared_blocks_are_resumed_to_the_same_bytes(tmp_path: Path) -> None:
    saved("causal:zamba", tmp_path)
    recipe = asked(tmp_path, tweak="train:epochs=1")
    write_checkpoint(recipe, tmp_path / "whole")

    def stop(what: str, done: int, total: int) -> None:
        if "block 3 of" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(recipe, tmp_path / "parts", progress=stop)
    write_checkpoint(recipe, tmp_path / "parts", resume=True)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_shared_blocks_are_not_distilled(tmp_path: Path) -> None:
    saved("causal:zamba", tmp_path)
    with pytest.raises(RecipeError, match="share weights, which cannot be distilled"):
        write_checkpoint(asked(tmp_path, distill=1), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("image:mllama", "leaves 1 blocks out for text (1): they were rounded to nearest"),
        ("image:mllama", "could not be tried before the run: the model leaves it out for text"),
        ("image:blip-2", "does not run on text alone: the texts went through its language_model"),
        ("image:pp_formulanet", "no calibration token reached it: rounded to nearest"),
        (
            "causal:hrm_text",
            "passes through its blocks several times: they were calibrated on the first pass alone",
        ),
    ],
)
def test_what_no_text_reaches_is_said(kind: str, said: str, tmp_path: Path) -> None:
    saved(kind, tmp_path)
    result = fracbit.quantize(asked(tmp_path), tmp_path / "small", progress=False)
    assert any(said in note for note in result.notes), result.notes


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("multimodal:voxtral_realtime", "cannot be calibrated on text alone"),
        ("image:diffusion_gemma", "outside its blocks is a weight of theirs"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(kind: str, said: str, tmp_path: Path) -> None:
    saved(kind, tmp_path)
    with pytest.raises(SourceError, match=said):
        fracbit.quantize(asked(tmp_path), tmp_path / "small", progress=False)
