"""Laws of every family: gradients taken block by block are those of a backward pass through the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import families
from fracbit.checkpoint.output import open_output
from fracbit.models import backward
from fracbit.models.blocks import blocks, linears
from fracbit.models.experts import split_experts
from fracbit.models.find import family_of
from fracbit.numerics.stats import add_inputs, empty
from fracbit.pipeline.plan.scoring import make_losses
from fracbit.pipeline.plan.streamed import streamed
from fracbit.pipeline.quantize import token_weights as pass_
from fracbit.pipeline.quantize.calibrated import embed_all, write_rest
from fracbit.pipeline.quantize.run import open_for, write_checkpoint
from fracbit.pipeline.quantize.token_weights import FILE, token_weights
from fracbit.pipeline.quantize.work import Memory, Work, prepare
from fracbit.pipeline.study.float_model import float_model_of
from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import Scheme
from texts import write_ids

SAMPLES, LENGTH = 6, 16


def recipe_for(model: Any, folder: Path, **fields: Any) -> Recipe:
    model.save_pretrained(folder / "float")
    text = write_ids(folder / "ids.u16", 8, 24, families.VOCABULARY)
    calibration = Calibration(
        texts=(text,), samples=SAMPLES, length=LENGTH, batch=2, weigh="loss", dtype="float32"
    )
    return Recipe(
        model=str(folder / "float"), quantizer="gptq", calibration=calibration.model_copy(update=fields)
    )


def measured(work: Work, folder: Path) -> dict[str, torch.Tensor]:
    (first, outside), *_ = work.schedule.shards.items()
    with open_output(folder, work.schedule.key, expected_bytes=1, overwrite=True, resume=False) as target:
        floats, _ = write_rest(target, first, outside, work)
        hidden = embed_all(work, floats, target, 1 << 40)
        before = hidden.states.clone()
        found = token_weights(work, target, lambda: hidden)
        assert torch.equal(hidden.states, before)
        assert target.journal is not None
        again = token_weights(
            work, target, lambda: pytest.fail("walked again")
        )  # from the journal: nothing is walked
        assert (target.journal / FILE).is_file()
    assert found.keys() == again.keys()
    assert all(torch.equal(found[name], again[name]) for name in found)
    return dict(found)


def at_once(model: Any, ids: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The definition: hooks on the whole model."""
    seen: dict[str, torch.Tensor] = {}
    family = family_of(model)
    for path, block in blocks(model, family):
        for name, module in linears(block, family).items():
            full = f"{path}.{name}"

            def hook(_: Any, __: Any, result: torch.Tensor, full: str = full) -> None:
                result.register_hook(lambda g: seen.__setitem__(full, g.square().mean(-1).sqrt().flatten()))

            module.register_forward_hook(hook)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    for full, weights in seen.items():
        if len(weights) == ids.numel():
            yield full, weights / weights.mean()


@pytest.mark.parametrize("name", families.CONFIGS)
def test_token_weights_are_those_of_one_backward_pass(name: str, tmp_path: Path) -> None:
    model = families.model_of(name)
    recipe = recipe_for(model, tmp_path)
    work = prepare(recipe, open_for(recipe))
    assert work.samples is not None
    found = measured(work, tmp_path / "q")
    split_experts(model)
    wanted = dict(at_once(model.eval(), work.samples.ids))
    assert wanted.keys() == found.keys()
    assert not [layer for layer in found if ".experts." in layer]
    for layer, weights in wanted.items():
        assert torch.allclose(found[layer], weights, rtol=1e-3, atol=1e-3), layer


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_any_number_of_blocks_and_pieces(depth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward, "LEAST_BYTES", 1)
    config, sizes = families.CONFIGS["llama"]
    model = families.model_of("llama", num_hidden_layers=depth)
    assert (config, sizes["num_hidden_layers"]) == ("LlamaConfig", 3)
    recipe = recipe_for(model, tmp_path)
    work = prepare(recipe, open_for(recipe), memory=(memory := Memory()))
    found = measured(work, tmp_path / "q")
    assert work.samples is not None
    wanted = dict(at_once(model.eval(), work.samples.ids))
    assert wanted.keys() == found.keys()
    for layer, weights in wanted.items():
        assert torch.allclose(found[layer], weights, rtol=1e-3, atol=1e-3), layer
    assert [dict(known).keys() for known in memory.token_weights.values()] == [found.keys()]


def test_statistics_count_tokens_by_their_weights() -> None:
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    weights = torch.arange(9.0)
    found = add_inputs(empty(5), x, weights=weights)
    assert torch.allclose(found.gram, x.T @ (weights[:, None] * x), atol=1e-5)
    assert torch.allclose(found.energy, (weights[:, None] * x.square()).sum(0), atol=1e-5)
    assert torch.equal(found.absmax, x.abs().amax(0))
    assert found.tokens == 9


@pytest.mark.parametrize(
    "fields", [{}, {"sequential": True}, {"transforms": ("awq",)}, {"tweak": "closed"}, {"chain": "float"}]
)
def test_weighted_tokens_change_what_is_made(fields: dict[str, Any], tmp_path: Path) -> None:
    recipe = recipe_for(families.model_of("llama"), tmp_path, **fields)
    equal = recipe.calibration.model_copy(update={"weigh": "equal"})  # type: ignore[union-attr]
    made = write_checkpoint(recipe, tmp_path / "a")
    plain = write_checkpoint(recipe.model_copy(update={"calibration": equal}), tmp_path / "b")
    stored = [(tmp_path / name / "model-00002-of-00004.safetensors").read_bytes() for name in "ab"]
    assert made.bits_per_weight == plain.bits_per_weight
    assert stored[0] != stored[1]


@pytest.mark.parametrize("transforms", [(), ("rotate",), ("smooth",), ("rotate-mlp", "awq")])
def test_a_run_weighs_tokens_by_the_model_of_the_source(
    transforms: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotations change embeddings, head and blocks, and the gradients at outputs of linears not at all."""
    model = families.model_of("llama-tied-biased")
    recipe = recipe_for(model, tmp_path, transforms=transforms)
    seen: list[dict[str, torch.Tensor]] = []
    real = pass_._measured
    monkeypatch.setattr(pass_, "_measured", lambda *given: seen.append(real(*given)) or seen[0])
    write_checkpoint(recipe, tmp_path / "q")
    ids = prepare(recipe, open_for(recipe)).samples
    assert ids is not None
    for layer, weights in at_once(model.eval(), ids.ids):
        assert torch.allclose(seen[0][layer], weights, rtol=1e-3, atol=1e-3), layer


def test_a_mixture_says_which_linears_count_tokens_alike(tmp_path: Path) -> None:
    recipe = recipe_for(families.model_of("mixtral"), tmp_path)
    notes = write_checkpoint(recipe, tmp_path / "q").notes
    assert any("counts tokens alike" in note for note in notes)


def test_interrupted_runs_read_the_weights_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_for(families.model_of("llama"), tmp_path)
    whole = write_checkpoint(recipe, tmp_path / "whole")
    shown: list[str] = []

    def stop(what: str, done: int, total: int) -> None:
        shown.append(what)
        if what.startswith("quantizing: block 2") and what.endswith("done"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(recipe, tmp_path / "q", progress=stop)
    assert any(what.startswith("weighing tokens: gradients of the loss") for what in shown)
    monkeypatch.setattr(pass_, "_measured", lambda *_: pytest.fail("measured again"))
    made = write_checkpoint(recipe, tmp_path / "q", resume=True)
    assert replace(made, output="", seconds=0, peak_rss_bytes=0, notes=()) == replace(
        whole, output="", seconds=0, peak_rss_bytes=0, notes=()
    )
    for path in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert (tmp_path / "q" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", families.CONFIGS)
def test_guided_errors_are_the_same_with_blocks_in_turn(name: str, tmp_path: Path) -> None:
    model = families.model_of(name)
    model.save_pretrained(tmp_path / "float")
    ids = families.tokens(4, 16)
    schemes = (Scheme("int", 2, 16), None)
    turned = streamed(open_for(Recipe(model=str(tmp_path / "float"))), ids)
    whole = float_model_of(model)
    found, wanted = (
        make_losses(where, where.weights.units("linear"), "guided-error", schemes, ids).rows
        for where in (turned, whole)
    )
    assert found.keys() == wanted.keys()
    for layer, (loss, nothing) in wanted.items():
        assert nothing == 0
        assert found[layer] == pytest.approx((loss, 0.0), rel=2e-2, abs=1e-9)
    assert sum(loss for loss, _ in wanted.values()) > 0
