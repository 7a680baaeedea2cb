"""Plans: predicted sizes hold when a plan is carried out, budgets of every kind are kept, uniform is taken when it wins."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from fracbit.errors import BudgetError, RecipeError
from fracbit.pipeline.plan.memory import running_memory
from fracbit.pipeline.plan.problem import Ask, allocated, contest, make_plan, make_problem, written_bytes
from fracbit.pipeline.plan.scoring import make_losses, make_scores
from fracbit.pipeline.quantize.calibrated import run_calibrated
from fracbit.pipeline.quantize.stream import run
from fracbit.pipeline.study.float_model import load_float
from fracbit.records.allocation import read_levels, recipe_text, uniform
from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Override, Recipe, make_recipe, read_toml
from fracbit.records.scheme import Scheme
from fracbit.records.scores import Losses, Scores

LEVELS = read_levels("int2z/32,int4z/32,kmeans:row3/row,nf3/16 out")
TWO = read_levels("int2z/64,int4z/64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., LlamaForCausalLM]) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_llama(tie_word_embeddings=True).bfloat16().save_pretrained(path)
    return path


def ids_of(shared: Path, name: str, documents: int, length: int) -> torch.Tensor:
    tokens = np.fromfile(shared / "data" / f"tales-{name}.u16", dtype="<u2").reshape(-1, 512)
    return torch.from_numpy(tokens[:documents, :length].astype(np.int64))


@pytest.mark.parametrize(("granularity", "bits"), [("block", 3.3), ("linear", 4.0), ("linear", 4.7)])
def test_the_plan_is_what_is_written(folder: Path, tmp_path: Path, granularity: str, bits: float) -> None:
    recipe = Recipe(model=str(folder))
    problem = make_problem(recipe, LEVELS, Ask(average_bits=bits), granularity)  # type: ignore[arg-type]
    plan = make_plan(problem)
    result = run(allocated(recipe, plan.chosen.allocation), tmp_path / "out")
    assert result.bits_per_weight == pytest.approx(plan.chosen.bits_per_weight, rel=1e-12)
    assert result.bits_per_weight <= bits
    assert result.bytes <= plan.chosen.file_bytes <= result.bytes + 1000
    assert plan.needs.seconds > 0


def test_a_file_size_is_kept(folder: Path, tmp_path: Path) -> None:
    recipe = Recipe(model=str(folder))
    for size in (52_000, 58_000):
        problem = make_problem(recipe, LEVELS, Ask(size=size), "linear", fused=True)
        plan = make_plan(problem)
        result = run(allocated(recipe, plan.chosen.allocation), tmp_path / str(size))
        assert result.bytes <= plan.chosen.file_bytes <= size
        q, k = (plan.chosen.allocation.schemes[f"model.layers.0.self_attn.{n}_proj"] for n in "qk")
        assert q == k


@pytest.mark.parametrize(
    "plan",
    [
        {"transforms": ("rotate",)},
        {"outliers": 0.1},
        {"axis": "nearest"},
        {"transforms": ("rotate",), "outliers": 0.1, "axis": "predicted"},
    ],
    ids=str,
)
def test_what_a_calibrated_run_adds_is_in_the_budget(
    tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM], plan: dict[str, object]
) -> None:
    """A head that a rotation unties, columns in 16 bits, an axis that is chosen later: the files stay within the size."""
    tiny_llama(tie_word_embeddings=True, intermediate_size=68).bfloat16().save_pretrained(tmp_path / "model")
    np.random.default_rng(0).integers(3, 90, 4 * 16, dtype=np.uint16).tofile(tmp_path / "ids.u16")
    calibration = Calibration(
        texts=(f"{tmp_path / 'ids.u16'}?length=16",), samples=4, length=16, batch=4, **plan
    )  # type: ignore[arg-type]
    recipe = Recipe(
        model=str(tmp_path / "model"), calibration=calibration,
        overrides=(Override(layers="*.0.mlp.up_proj", scheme=Scheme(block=16)),),
    )  # fmt: skip
    dearest = make_problem(recipe, TWO[1:], Ask(size=10**6), "linear")
    most = written_bytes(dearest, {name: TWO[1] for unit in dearest.units for name in unit.shapes})
    for size in (most - 4_000, most - 1_000):
        chosen = make_plan(make_problem(recipe, TWO, Ask(size=size), "linear")).chosen
        result = run_calibrated(allocated(recipe, chosen.allocation), tmp_path / "out", overwrite=True)
        assert result.bytes <= chosen.file_bytes <= size
        assert chosen.file_bytes <= result.bytes + 2000


@pytest.mark.parametrize("granularity", ["block", "linear"])
def test_what_the_recipe_names_is_left_alone_and_counts(
    folder: Path, tmp_path: Path, granularity: str
) -> None:
    """Overrides hold under a budget; a head with a scheme is quantized too, and the average is over it as well."""
    down = Override(layers="*.down_proj", scheme=Scheme("nf", 4, 32))
    first = Override(layers="model.layers.0.*", keep=True)
    recipe = Recipe(model=str(folder), head=Scheme(bits=8), overrides=(down, first))
    for ask in (Ask(average_bits=4.2), Ask(size=90_000)):
        problem = make_problem(recipe, TWO, ask, granularity)  # type: ignore[arg-type]
        scores = make_scores(problem.weights, problem.weights.units(granularity), "first")  # type: ignore[arg-type]
        plan = make_plan(problem, scores, "order")
        assert len(set(plan.chosen.allocation.schemes.values())) == 2
        result = run(allocated(recipe, plan.chosen.allocation), tmp_path / plan.budget, overwrite=True)
        assert result.bits_per_weight == pytest.approx(plan.chosen.bits_per_weight, rel=1e-12)
        assert result.bytes <= plan.chosen.file_bytes <= result.bytes + 1000
        assert result.bits_per_weight <= (ask.average_bits or 9)
        assert result.bytes <= (ask.size or 10**6)
        whole = problem.spelled_out(plan.chosen.allocation).schemes
        assert {whole[name] for name in whole if "layers.0." in name} == {None}
        assert {whole[name] for name in whole if name.endswith("down_proj")} == {None, down.scheme}
        (tmp_path / "plan.toml").write_text(recipe_text(problem.spelled_out(plan.chosen.allocation), recipe))
        read = make_recipe(read_toml(tmp_path / "plan.toml"))
        assert run(read, tmp_path / "read", overwrite=True).bytes == result.bytes
    with pytest.raises(RecipeError, match="name every linear"):
        make_problem(Recipe(model=str(folder), overrides=(Override(layers="*", keep=True),)), TWO, ask)


def test_a_device_must_also_hold_the_cache(folder: Path) -> None:
    recipe = Recipe(model=str(folder))
    config = AutoConfig.from_pretrained(folder)
    running = running_memory(config, 128).bytes
    size = make_plan(make_problem(recipe, TWO, Ask(size=55_000))).chosen
    fits = make_plan(make_problem(recipe, TWO, Ask(fits=55_000 + running, context=128))).chosen
    assert size.allocation.schemes == fits.allocation.schemes
    with pytest.raises(BudgetError, match="KV cache and activations take"):
        make_problem(recipe, TWO, Ask(fits=running, context=128))


def test_the_candidates_are_ordered_and_the_curve_falls(folder: Path) -> None:
    plan = make_plan(
        make_problem(Recipe(model=str(folder)), LEVELS, Ask(average_bits=4.0), "linear"), curve=True
    )
    assert [candidate.name for candidate in plan.candidates] == ["exact", "order", "uniform"]
    losses = [candidate.predicted_loss for candidate in plan.candidates]
    assert losses[0] is not None
    assert all(loss is not None and loss >= losses[0] for loss in losses)
    exact = plan.curve["exact"]
    assert [loss for _, loss in exact] == sorted((loss for _, loss in exact), reverse=True)
    assert all(e <= o + 1e-9 for (_, e), (_, o) in zip(exact, plan.curve["order"], strict=True))


def test_the_order_needs_no_scipy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("scipy", "scipy.optimize", "scipy.sparse"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("fracbit.pipeline.plan.problem.find_spec", lambda name: None)
    problem = make_problem(Recipe(model=str(folder)), TWO, Ask(average_bits=3.5))
    plan = make_plan(problem, solver="order", curve=True)
    assert [candidate.name for candidate in plan.candidates] == ["order", "uniform"]
    assert set(plan.curve) == {"order", "uniform"}
    assert any("scipy" in note for note in plan.notes)
    with pytest.raises(RecipeError, match="needs scipy"):
        make_plan(problem)


def test_scores_and_losses_can_be_brought_along(folder: Path) -> None:
    problem = make_problem(Recipe(model=str(folder)), TWO, Ask(average_bits=3.5))
    names = [unit.name for unit in problem.units]
    scores = make_scores(problem.weights, problem.units, "first")
    plan = make_plan(problem, scores, "order")
    assert plan.chosen.allocation.schemes[f"{names[0]}.mlp.up_proj"] == TWO[1]
    losses = make_losses(problem.weights, problem.units, "weight-error", TWO)
    assert make_plan(problem, losses).chosen.allocation == make_plan(problem).chosen.allocation
    with pytest.raises(RecipeError, match="do not cover int4z/64"):
        make_plan(problem, make_losses(problem.weights, problem.units, "weight-error", TWO[:1]))
    with pytest.raises(RecipeError, match="another model"):
        make_plan(problem, Scores({"model.layers.9": 1.0}, "lim", ""))
    with pytest.raises(RecipeError, match="other weights"):
        make_plan(problem, Losses(losses.schemes, losses.rows, "weight-error", "0" * 16))
    with pytest.raises(RecipeError, match="reads text"):
        make_plan(problem, "lim")


def test_a_plan_becomes_a_recipe_file(folder: Path, tmp_path: Path) -> None:
    levels = read_levels("int2z/32,nf4/16 out s=int8:64,float")
    plan = make_plan(make_problem(Recipe(model=str(folder)), levels, Ask(average_bits=7.0), "linear"))
    (tmp_path / "plan.toml").write_text(recipe_text(plan.chosen.allocation, Recipe(model=str(folder))))
    recipe = make_recipe(read_toml(tmp_path / "plan.toml"))
    assert recipe.overrides == allocated(Recipe(model=str(folder)), plan.chosen.allocation).overrides
    assert {override.keep for override in recipe.overrides} == {True, False}


@pytest.mark.parametrize("asked", [{}, {"average_bits": 3.0, "size": 5}])
def test_ask_for_one_thing(asked: dict[str, float]) -> None:
    with pytest.raises(BudgetError, match="exactly one"):
        Ask(**asked)  # type: ignore[arg-type]


def test_a_model_of_one_block_needs_linears(
    tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM]
) -> None:
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path)
    recipe = Recipe(model=str(tmp_path))
    with pytest.raises(BudgetError, match="granularity linear"):
        make_plan(make_problem(recipe, TWO, Ask(average_bits=3.5)))
    assert make_plan(make_problem(recipe, TWO, Ask(average_bits=3.5), "linear")).chosen.bits_per_weight <= 3.5


def test_memory_of_known_models() -> None:
    """Llama-2-7B at 4096 tokens in 16 bits: 2 GiB of keys and values; a sliding window bounds Mistral's."""
    llama = LlamaConfig(max_position_embeddings=4096)
    assert running_memory(llama, 4096).cache == 2 * 2**30
    assert running_memory(llama, 4096, batch=3).bytes == 3 * running_memory(llama, 4096).bytes
    with pytest.raises(BudgetError, match="longer than the model's 4096"):
        running_memory(llama, 4097)
    with pytest.raises(BudgetError, match="must be at least 1"):
        running_memory(llama, 0)
    from transformers import MistralConfig

    mistral = MistralConfig(sliding_window=1024, max_position_embeddings=32768)
    assert running_memory(mistral, 32768).cache == 2 * 32 * 1024 * 8 * 128 * 2


@pytest.mark.slow
def test_the_better_of_searched_and_uniform_is_taken(shared: Path) -> None:
    """At 3 bits of 2 and 4, uniform int3 wins on this model by far, whatever the order; near 4 bits, it does not exist."""
    model = shared / "models" / "tales-s"
    subject = load_float(model)
    held_out = ids_of(shared, "evaluation", 8, 256)
    problem = make_problem(Recipe(model=str(model)), TWO, Ask(average_bits=3.4))
    searched = make_plan(problem).chosen.allocation
    found = contest(subject, problem.units, searched, held_out, TWO, problem.budget.bits)
    assert not found.kept
    assert set(found.winner.schemes.values()) == {Scheme("int", 3, 64, "in", "zero")}
    assert "uniform scheme won" in found.winner.notes[-1]
    assert found.uniform_bits_per_weight <= 3.4
    worst = uniform(searched.schemes, Scheme(bits=2, block="tensor"))
    best = make_plan(make_problem(Recipe(model=str(model)), TWO, Ask(average_bits=4.36))).chosen.allocation
    assert contest(subject, problem.units, best, held_out, [worst.schemes[next(iter(worst.schemes))]]).kept
