"""The passes that feed scores: every score on a tiny model, the model left as it was, and the oracle on trained ones."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from fracbit.checkpoint.opened import open_float
from fracbit.errors import DataError, RecipeError, SourceError
from fracbit.importance import SCORES
from fracbit.models.walk import advance, embed
from fracbit.numerics import decode, quantize_tensor
from fracbit.pipeline.plan.scoring import make_losses, make_scores, score
from fracbit.pipeline.study.float_model import (
    FloatModel,
    float_model_of,
    load_float,
    measure,
    replaced,
    rounded,
)
from fracbit.pipeline.study.weights import weights_on_disk
from fracbit.records.scheme import Scheme

INT2, INT8 = Scheme(bits=2), Scheme(bits=8)


@pytest.fixture
def float_model(tiny_llama: Callable[..., LlamaForCausalLM]) -> FloatModel:
    return float_model_of(tiny_llama())


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 96, (3, 24), generator=torch.Generator().manual_seed(0))


def state(float_model: FloatModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in float_model.model.state_dict().items()}


@pytest.mark.parametrize("granularity", ["block", "linear"])
@pytest.mark.parametrize("name", SCORES)
def test_every_score_names_every_unit_and_leaves_the_model_alone(
    float_model: FloatModel, ids: torch.Tensor, name: str, granularity: str
) -> None:
    before = state(float_model)
    units = float_model.weights.units(granularity)  # type: ignore[arg-type]
    scores = make_scores(float_model, units, name, INT2, ids, seed=3)
    assert list(scores.values) == [unit.name for unit in units]
    assert len(units) == (3 if granularity == "block" else 21)
    assert scores.values == make_scores(float_model, units, name, INT2, ids, seed=3).values
    assert all(torch.equal(tensor, before[key]) for key, tensor in float_model.model.state_dict().items())
    assert all(parameter.requires_grad for parameter in float_model.model.parameters())
    assert not any(
        module._forward_pre_hooks or module._forward_hooks for module in float_model.model.modules()
    )


@pytest.mark.parametrize("name", ["lim", "weight-error", "gram-error", "fisher", "oracle"])
def test_losses_cover_every_scheme_and_float_costs_nothing(
    float_model: FloatModel, ids: torch.Tensor, name: str
) -> None:
    losses = make_losses(float_model, float_model.weights.units(), name, (INT2, INT8, None), ids)
    for row in losses.rows.values():
        assert row[2] == 0
        assert abs(row[1]) < abs(row[0])


def test_lim_is_the_cosine_of_raw_states(float_model: FloatModel, ids: torch.Tensor) -> None:
    hidden = embed(float_model.model, float_model.family, ids)
    scores = make_scores(float_model, float_model.weights.units(), "lim", ids=ids)
    normed = make_scores(float_model, float_model.weights.units(), "lim-final-norm", ids=ids)
    for index, (name, value) in enumerate(scores.values.items()):
        after = advance(float_model.model.model.layers[index], hidden)
        x, y = hidden.states[:, 1:], after.states[:, 1:]
        assert value == pytest.approx(-float(torch.cosine_similarity(x, y, dim=-1).mean()), abs=1e-6)
        if index == 2:
            y = float_model.model.model.norm(y).detach()
        assert normed.values[name] == pytest.approx(
            -float(torch.cosine_similarity(x, y, dim=-1).mean()), abs=1e-6
        )
        hidden = after


def test_what_needs_text_or_a_scheme_says_so(float_model: FloatModel, ids: torch.Tensor) -> None:
    units = float_model.weights.units()
    with pytest.raises(RecipeError, match="reads text"):
        make_scores(float_model, units, "lim")
    with pytest.raises(RecipeError, match="name the low level"):
        make_scores(float_model, units, "weight-error")
    with pytest.raises(DataError, match=r"\[samples, tokens\]"):
        make_scores(float_model, units, "lim", ids=ids[0])


def test_replaced_weights_come_back_when_something_raises(float_model: FloatModel) -> None:
    before = state(float_model)
    names = list(float_model.weights.layers)
    stack = ExitStack()
    stack.enter_context(replaced(float_model, rounded(float_model, dict.fromkeys(names, INT2))))
    assert not torch.equal(float_model.model.state_dict()[f"{names[0]}.weight"], before[f"{names[0]}.weight"])
    with pytest.raises(KeyboardInterrupt), stack:
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, before[key]) for key, tensor in float_model.model.state_dict().items())


def test_a_model_on_disk_gives_the_scores_of_the_one_in_memory(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    tiny_llama(seed=4).save_pretrained(tmp_path)
    disk, memory = weights_on_disk(open_float(tmp_path)), load_float(tmp_path)
    for name in ("zd", "weight-error", "reverse:first"):
        one = make_scores(disk, disk.units(), name, INT2)
        assert one == make_scores(memory, memory.weights.units(), name, INT2)
    with pytest.raises(RecipeError, match="reads text"):
        make_scores(disk, disk.units(), "lim", ids=torch.ones(1, 4, dtype=torch.long))
    assert float_model_of(tiny_llama(seed=5)).weights.fingerprint != memory.weights.fingerprint


def test_a_quantized_model_is_refused(tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    tiny_llama().save_pretrained(tmp_path / "float")
    from fracbit import quantize

    quantize(tmp_path / "float", tmp_path / "small")
    for opens in (open_float, load_float, partial(score, method="zd")):
        with pytest.raises(SourceError, match="already quantized"):
            opens(tmp_path / "small")


@pytest.mark.slow
def test_the_oracle_is_the_loss_of_one_quantized_block(shared: Path) -> None:
    float_model = load_float(shared / "models" / "tales-xs")
    import numpy as np

    tokens = np.fromfile(shared / "data" / "tales-evaluation.u16", dtype="<u2").reshape(-1, 512)[:8, :256]
    ids = torch.from_numpy(tokens.astype(np.int64))
    units = float_model.weights.units()
    scheme = Scheme("int", 2, 64, "in", "zero")
    oracle = make_scores(float_model, units, "oracle", scheme, ids)
    base = measure(float_model, ids).nll
    with replaced(float_model, rounded(float_model, dict.fromkeys(units[0].shapes, scheme))):
        assert oracle.values[units[0].name] == pytest.approx(measure(float_model, ids).nll - base, abs=1e-9)
    assert all(value > 0.01 for value in oracle.values.values())


def test_the_guided_error_is_the_mean_squared_gradient_times_the_squared_error_of_the_outputs(
    float_model: FloatModel, ids: torch.Tensor
) -> None:
    """Against gradients and outputs of one linear, taken by hand."""
    name = "model.layers.1.mlp.up_proj"
    units = [unit for unit in float_model.weights.units("linear") if name in unit.own]
    found = make_losses(float_model, units, "guided-error", [INT2, None], ids).rows[units[0].name]
    seen: list[torch.Tensor] = []
    module = float_model.module(name)

    def keep(_: object, args: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
        seen.append(args[0].detach())
        result.register_hook(seen.append)

    with ExitStack() as hooks:
        hooks.callback(module.register_forward_hook(keep).remove)
        logits = float_model.model(input_ids=ids).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        torch.autograd.grad(loss, module.weight)
    x, grad = seen  # [samples, tokens, in] and [samples, tokens, out]
    error = (decode(quantize_tensor(module.weight, INT2)) - module.weight).detach()
    squares = (x @ error.T).square().sum(-1) * grad.square().mean(-1)  # [samples, tokens]
    assert found == pytest.approx((float(squares.sum()) / 2 / ids.numel(), 0.0), rel=1e-3)
