"""Plans: predicted sizes hold when a plan is carried out, budgets of every kind are kept, uniform is taken when it wins."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fracbit
from fracbit.checkpoint import source as checkpoint_source
from fracbit.checkpoint.opened import open_float
from fracbit.errors import BudgetError, RecipeError
from fracbit.pipeline.plan.contest import UNCHECKED, contest
from fracbit.pipeline.plan.memory import running_memory
from fracbit.pipeline.plan.plan import open_for, plan
from fracbit.pipeline.plan.problem import make_problem
from fracbit.pipeline.plan.scoring import make_losses, make_scores, score
from fracbit.pipeline.quantize.run import write_checkpoint
from fracbit.pipeline.study.float_model import load_float
from fracbit.pipeline.study.weights import weights_on_disk
from fracbit.records.allocation import allocated, read_levels, uniform
from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Override, Recipe, make_recipe, read_toml, recipe_toml
from fracbit.records.resources import Needs
from fracbit.records.scheme import Scheme
from fracbit.records.scores import Losses, Scores
from fracbit.records.sizes import read_size
from fracbit.records.spending import Spending

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


def spending(levels: object = TWO, **terms: object) -> Spending:
    return Spending(levels=levels, **terms)  # type: ignore[arg-type]


@pytest.mark.parametrize(("granularity", "bits"), [("block", 3.3), ("linear", 4.0), ("linear", 4.7)])
def test_the_plan_is_what_is_written(folder: Path, tmp_path: Path, granularity: str, bits: float) -> None:
    recipe = Recipe(model=str(folder))
    made = plan(recipe, spending(LEVELS, average_bits=bits, granularity=granularity))
    result = write_checkpoint(allocated(recipe, made.allocation), tmp_path / "out")
    assert result.bits_per_weight == pytest.approx(made.chosen.bits_per_weight, rel=1e-12)
    assert result.bits_per_weight <= bits
    assert result.bytes <= made.chosen.file_bytes <= result.bytes + 1000
    assert isinstance(made.needs, Needs)
    assert made.needs.seconds > 0
    assert UNCHECKED in made.notes


def test_a_file_size_is_kept(folder: Path, tmp_path: Path) -> None:
    recipe = Recipe(model=str(folder))
    for size in (52_000, 58_000):
        made = plan(recipe, spending(LEVELS, size=size, fused=True))
        result = write_checkpoint(allocated(recipe, made.allocation), tmp_path / str(size))
        assert result.bytes <= made.chosen.file_bytes <= size
        q, k = (made.allocation.schemes[f"model.layers.0.self_attn.{n}_proj"] for n in "qk")
        assert q == k


@pytest.mark.parametrize(
    "settings",
    [
        {"transforms": ("rotate",)},
        {"outliers": "cost:0.1"},
        {"axis": "nearest"},
        {"transforms": ("rotate",), "outliers": "cost:0.1", "axis": "predicted"},
    ],
    ids=str,
)
def test_what_a_calibrated_run_adds_is_in_the_budget(
    tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM], settings: dict[str, object]
) -> None:
    """A head that a rotation unties, columns in 16 bits, an axis that is chosen later: the files stay within the size."""
    tiny_llama(tie_word_embeddings=True, intermediate_size=68).bfloat16().save_pretrained(tmp_path / "model")
    np.random.default_rng(0).integers(3, 90, 4 * 16, dtype=np.uint16).tofile(tmp_path / "ids.u16")
    plan_settings = {name: value for name, value in settings.items() if name != "outliers"}
    calibration = Calibration(
        texts=(f"{tmp_path / 'ids.u16'}?length=16",), samples=4, length=16, batch=4, **plan_settings
    )  # type: ignore[arg-type]
    recipe = Recipe(
        model=str(tmp_path / "model"), calibration=calibration, outliers=settings.get("outliers"),
        overrides=(Override(layers="*.0.mlp.up_proj", scheme=Scheme(block=16)),),
    )  # fmt: skip
    dearest = make_problem(recipe, open_for(recipe), spending(TWO[1:], size=10**6))
    most = dearest.file_bytes({name: TWO[1] for unit in dearest.units for name in unit.shapes})
    for size in (most - 4_000, most - 1_000):
        chosen = plan(recipe, spending(size=size)).chosen
        result = write_checkpoint(allocated(recipe, chosen.allocation), tmp_path / "out", overwrite=True)
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
    scores = score(folder, "first", granularity=granularity)  # type: ignore[arg-type]
    terms = {"score": scores, "solver": "order", "granularity": granularity}
    for asked in ({"average_bits": 4.2}, {"size": 90_000}):
        made = plan(recipe, spending(**asked, **terms))
        assert len(set(made.allocation.schemes.values())) == 2
        result = write_checkpoint(allocated(recipe, made.allocation), tmp_path / made.budget, overwrite=True)
        assert result.bits_per_weight == pytest.approx(made.chosen.bits_per_weight, rel=1e-12)
        assert result.bytes <= made.chosen.file_bytes <= result.bytes + 1000
        assert result.bits_per_weight <= asked.get("average_bits", 9)
        assert result.bytes <= asked.get("size", 10**6)
        whole = made.spelled_out.schemes
        assert {whole[name] for name in whole if "layers.0." in name} == {None}
        assert {whole[name] for name in whole if name.endswith("down_proj")} == {None, down.scheme}
        (tmp_path / "plan.toml").write_text(recipe_toml(made.recipe, made.notes))
        read = make_recipe(read_toml(tmp_path / "plan.toml"))
        assert read == made.recipe
        assert write_checkpoint(read, tmp_path / "read", overwrite=True).bytes == result.bytes
    with pytest.raises(RecipeError, match="name every linear"):
        plan(Recipe(model=str(folder), overrides=(Override(layers="*", keep=True),)), spending(size=90_000))


def test_a_device_must_also_hold_the_cache(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    running = running_memory(config, 128).bytes
    size = plan(folder, spending(size=55_000, granularity="block"))
    fits = plan(folder, spending(fits=55_000 + running, context=128, granularity="block"))
    assert size.allocation.schemes == fits.allocation.schemes
    with pytest.raises(BudgetError, match=r"takes at least .* for the KV cache of 128 tokens"):
        plan(folder, spending(fits=running, context=128))


def test_a_memory_that_is_too_little_says_what_would_do(folder: Path) -> None:
    """The least that the error names is enough, and a hundredth less is not; what it offers saves as much as it says."""
    with pytest.raises(BudgetError, match="this model takes at least") as refused:
        plan(folder, spending(fits=1000, context=128))
    least = read_size(re.findall(r"at least ([\d.]+ \w+):", str(refused.value))[0])
    assert plan(folder, spending(fits=int(1.001 * least), context=128)).chosen.predicted_loss is not None
    with pytest.raises(BudgetError, match="this model takes at least"):
        plan(folder, spending(fits=int(0.99 * least), context=128))
    saved = read_size(re.findall(r"--set embeddings=int8/64 saves about ([\d.]+ \w+)", str(refused.value))[0])
    smaller = Recipe(model=str(folder), embeddings="int8/64")
    with pytest.raises(BudgetError) as again:
        plan(smaller, spending(fits=1000, context=128))
    assert "embeddings=int8/64" not in str(again.value)
    assert read_size(re.findall(r"at least ([\d.]+ \w+):", str(again.value))[0]) <= 1.01 * (
        least - 0.8 * saved
    )


def test_a_device_shows_what_else_would_fit(folder: Path) -> None:
    running = running_memory(AutoConfig.from_pretrained(folder), 128).bytes
    made = plan(folder, Spending(fits=60_000 + running, context=128))
    sizes = [each.bytes for each in made.neighbours]
    assert sizes == sorted(sizes)
    assert [each.fits for each in made.neighbours] == [size <= 60_000 + running for size in sizes]
    assert {True, False} == {each.fits for each in made.neighbours}
    assert made.chosen.predicted_loss is not None
    assert made.chosen.predicted_loss <= min(each.predicted_loss for each in made.neighbours if each.fits)
    assert [each["scheme"] for each in made.to_json()["neighbours"]] == [
        str(each.scheme) for each in made.neighbours
    ]


def test_a_size_chooses_among_wider_levels_than_an_average() -> None:
    assert max(each.bits for each in Spending(size="1GB").schemes if each) == 8
    assert max(each.bits for each in Spending(average_bits=3.5).schemes if each) == 4
    assert [str(each) for each in Spending(fits="1GB", levels="nf4/64,nf2/64").schemes] == [
        "nf4/64",
        "nf2/64",
    ]


def test_the_candidates_are_ordered_and_the_curve_falls(folder: Path) -> None:
    made = plan(folder, spending(LEVELS, average_bits=4.0), curve=True)
    assert [candidate.name for candidate in made.candidates] == ["exact", "order", "uniform"]
    losses = [candidate.predicted_loss for candidate in made.candidates]
    assert losses[0] is not None
    assert all(loss is not None and loss >= losses[0] for loss in losses)
    exact = made.curve["exact"]
    assert [loss for _, loss in exact] == sorted((loss for _, loss in exact), reverse=True)
    assert all(e <= o + 1e-9 for (_, e), (_, o) in zip(exact, made.curve["order"], strict=True))


def test_scores_and_losses_can_be_brought_along(folder: Path) -> None:
    def given(scored: object, **terms: object) -> Spending:
        return spending(average_bits=3.5, granularity="block", score=scored, **terms)

    made = plan(folder, given(score(folder, "first"), solver="order"))
    assert made.allocation.schemes["model.layers.0.mlp.up_proj"] == TWO[1]
    losses = score(folder, "weight-error", levels=TWO)
    assert isinstance(losses, Losses)
    assert plan(folder, given(losses)).allocation == plan(folder, given("weight-error")).allocation
    with pytest.raises(RecipeError, match="do not cover int4z/64"):
        plan(folder, given(score(folder, "weight-error", levels=TWO[:1])))
    with pytest.raises(RecipeError, match="another model"):
        plan(folder, given(Scores({"model.layers.9": 1.0}, "lim", "")))
    with pytest.raises(RecipeError, match="other weights"):
        plan(folder, given(Losses(losses.schemes, losses.rows, "weight-error", "0" * 16)))
    with pytest.raises(RecipeError, match="reads text"):
        plan(folder, given("lim"))


def test_the_verbs_score_and_plan_as_their_parts_do(folder: Path) -> None:
    weights = weights_on_disk(open_float(folder))
    assert fracbit.score(folder, "zd") == make_scores(weights, weights.units(), "zd")
    linears = weights.units("linear", fused=True)
    measured = fracbit.score(
        folder, "weight-error", levels="int2z/64,int4z/64", granularity="linear", fused=True
    )
    assert measured == make_losses(weights, linears, "weight-error", TWO)
    made = fracbit.plan(folder, Spending(average_bits=3.5, levels="int2z/64,int4z/64", fused=True))
    assert made.losses.rows == measured.rows
    assert made.allocation == made.chosen.allocation


def test_a_plan_opens_its_model_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers are read once and the skeleton is built once, also where text is read and a float model is loaded."""
    ids = np.random.default_rng(0).integers(3, 96, (2, 8, 32)).astype("<u2")
    for name, rows in zip(("seen", "unseen"), ids, strict=True):
        rows.tofile(tmp_path / f"{name}.u16")
    counts = {"headers": 0, "skeletons": 0, "loads": 0}

    def counted(what: str, function: Callable[..., object]) -> Callable[..., object]:
        def count(*args: object, **kwargs: object) -> object:
            counts[what] += 1
            return function(*args, **kwargs)

        return count

    monkeypatch.setattr(checkpoint_source, "_header", counted("headers", checkpoint_source._header))
    for name, what in (("from_config", "skeletons"), ("from_pretrained", "loads")):
        monkeypatch.setattr(AutoModelForCausalLM, name, counted(what, getattr(AutoModelForCausalLM, name)))
    plan(folder, spending(size=55_000))
    assert counts == {"headers": 1, "skeletons": 1, "loads": 0}
    texts = {"text": f"{tmp_path / 'seen.u16'}?length=32", "held_out": f"{tmp_path / 'unseen.u16'}?length=32"}
    sizes = {"samples": 4, "length": 32}
    made = plan(folder, spending(fits=10**7, context=32, score="gram-error", **texts, **sizes))
    assert counts == {"headers": 2, "skeletons": 2, "loads": 1}
    assert made.contest is not None


def test_a_plan_becomes_a_recipe_file(folder: Path, tmp_path: Path) -> None:
    levels = read_levels("int2z/32,nf4/16 out s=int8:64,float")
    made = plan(folder, spending(levels, average_bits=7.0))
    (tmp_path / "plan.toml").write_text(recipe_toml(made.recipe, made.notes))
    recipe = make_recipe(read_toml(tmp_path / "plan.toml"))
    assert recipe == made.recipe == allocated(Recipe(model=str(folder)), made.allocation)
    assert {override.keep for override in recipe.overrides} == {True, False}


def test_a_plan_needs_a_budget(folder: Path) -> None:
    with pytest.raises(BudgetError, match="exactly one"):
        plan(folder, Spending())


def test_a_model_of_one_block_needs_linears(
    tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM]
) -> None:
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(BudgetError, match="granularity linear"):
        plan(tmp_path, spending(average_bits=3.5, granularity="block"))
    assert plan(tmp_path, spending(average_bits=3.5)).chosen.bits_per_weight <= 3.5


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
    float_model = load_float(model)
    held_out = ids_of(shared, "evaluation", 8, 256)
    made = plan(model, spending(average_bits=3.4, granularity="block"))
    units, searched = made.problem.units, made.allocation
    found = contest(float_model, units, searched, held_out, levels=TWO, budget=made.problem.budget.bits)
    assert not found.searched_won
    assert set(found.winner.schemes.values()) == {Scheme("int", 3, 64, "in", "zero")}
    assert "uniform scheme won" in found.winner.notes[-1]
    assert found.uniform_bits_per_weight <= 3.4
    worst = uniform(searched.schemes, Scheme(bits=2, block="tensor"))
    best = plan(model, spending(average_bits=4.36, granularity="block")).allocation
    rivals = [worst.schemes[next(iter(worst.schemes))]]
    assert contest(float_model, units, best, held_out, levels=rivals).searched_won
