"""A workbench measures what a fresh model would: sharing changes nothing, and runs leave no trace on each other."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import fracbit
from fracbit.data import read_documents
from fracbit.errors import DataError
from fracbit.evaluation import perplexity, write_continuation
from fracbit.evaluation.zero_shot import PAPER_TASKS, TaskScore, ZeroShot
from fracbit.models.blocks import blocks, linears, weight_of
from fracbit.models.find import family_of
from fracbit.models.install import set_weight
from fracbit.numerics import decode, quantize_tensor, stored_bits
from fracbit.numerics.linalg import gram_errors
from fracbit.quantizers import QUANTIZERS
from fracbit.records.recipe import Override, Recipe
from fracbit.records.row import KEEP_ALL, Calibration, Evaluation, Run, outliers_of
from fracbit.records.scheme import Scheme
from fracbit.sweeps import workbench
from fracbit.sweeps.queue import source_of
from fracbit.sweeps.workbench import Workbench, collect_stats

EVALUATION = Evaluation(text="ids.u16?length=32")
CALIBRATION = Calibration(text="ids.u16?length=32", samples=4, length=16)


def make_run(scheme: Scheme | None = None, **fields: object) -> Run:
    own = {"calibration"}  # a run's, not its recipe's
    names = [name for name in fields if name in Recipe.model_fields and name not in own]
    recipe_fields = {name: fields.pop(name) for name in names}
    recipe = Recipe(model="tiny", scheme=scheme or Scheme(block=16), **recipe_fields)  # type: ignore[arg-type]
    return Run(recipe=recipe, evaluation=EVALUATION, **fields)  # type: ignore[arg-type]


FLOAT = make_run(overrides=(KEEP_ALL,))


@pytest.fixture
def bench(study: Path) -> Workbench:
    return Workbench(source_of(FLOAT), study)


def plain_nll(study: Path, scheme: Scheme) -> tuple[float, int]:
    """Load, quantize and evaluate with nothing shared."""
    model = AutoModelForCausalLM.from_pretrained(study / "tiny", dtype=torch.float32)
    family, bits = family_of(model), 0
    for _, block in blocks(model, family):
        for linear in linears(block, family).values():
            packed = quantize_tensor(weight_of(linear), scheme)
            bits += stored_bits(packed)
            set_weight(linear, decode(packed))
    tokens = read_documents(str(study / EVALUATION.text), None, 64)
    return perplexity(model, tokens.documents).nll, bits


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("int", 3, 16),
        Scheme("nf", 4, 16),
        Scheme("int", 4, 16, "out"),
        Scheme("int", 3, 16, offset="zero"),
        Scheme("float", 4, 16, offset="float"),
        Scheme("nf", 3, 16, offset="mean"),
        Scheme("kmeans", 3, "row"),
        Scheme("quantile", 3, "flat:24"),
        Scheme("power", 4, "tensor"),
        Scheme("int", 4, 16, scale="int8:32"),
    ],
    ids=str,
)
def test_a_run_equals_the_plain_loop(study: Path, bench: Workbench, scheme: Scheme) -> None:
    bench.measure(make_run(Scheme("int", 2, 16)))
    bench.measure(make_run(Scheme("dynamic", 5, 16)))
    row = bench.measure(make_run(scheme))
    nll, bits = plain_nll(study, scheme)
    assert row.error is None
    assert row.nll == pytest.approx(nll, abs=1e-6)
    assert row.stored_bits == bits


def test_the_float_model_comes_back(bench: Workbench) -> None:
    first = bench.measure(FLOAT)
    bench.measure(make_run(Scheme("int", 2, 16), embeddings=Scheme("int", 2, 16)))
    again = bench.measure(FLOAT)
    assert first.nll == again.nll
    assert again.divergence == pytest.approx(0, abs=1e-6)
    assert again.agreement == 1
    assert again.weights == 0
    assert again.versions["fracbit"] == fracbit.__version__
    assert again.model_bits == 16 * again.parameters


@pytest.mark.parametrize("correction", ["none", "tweak-auto"])
def test_a_spread_model_measures_the_same(study: Path, bench: Workbench, correction: str) -> None:
    """Without GPUs accelerate spreads over the CPU alone: the path is walked, several devices are not."""
    pytest.importorskip("accelerate", reason="device_map is an extra: fracbit[device-map]")
    spread = Workbench(source_of(FLOAT), study, "auto")
    assert next(spread.model.parameters()).dtype == torch.bfloat16, "as it is stored"
    for fields in ({}, {"quantizer": "gptq"}, {"outliers": outliers_of("activation:0.1")}):
        run = make_run(Scheme("nf", 4, 16), correction=correction, calibration=CALIBRATION, **fields)
        found, expected = spread.measure(run), bench.measure(run)
        assert found.error is None
        assert found.stored_bits == expected.stored_bits
        assert found.nll == pytest.approx(expected.nll, abs=0.01)  # bfloat16 products


def test_model_bits_count_everything(bench: Workbench) -> None:
    row = bench.measure(make_run())
    assert row.parameters == sum(p.numel() for p in bench.model.parameters())
    assert row.model_bits == row.stored_bits + 16 * (row.parameters - row.weights)
    assert row.bits_per_weight == pytest.approx(4 + 16 / 16)
    assert len(row.window_nll) == len(row.window_tokens) == 6
    assert row.nll == pytest.approx(sum(row.window_nll) / sum(row.window_tokens), abs=1e-4)
    assert row.divergence is not None
    assert row.divergence > 0


def test_more_bits_are_closer_to_the_float_model(bench: Workbench) -> None:
    found = [bench.measure(make_run(Scheme("int", bits, 16))).divergence or 0 for bits in (2, 4, 8)]
    assert found[0] > found[1] > found[2] > 0


def test_overrides_and_embeddings(bench: Workbench) -> None:
    everything = bench.measure(make_run(embeddings=Scheme(block=16)))
    less = bench.measure(make_run(overrides=(Override(layers="*.mlp.*", keep=True),)))
    assert everything.weights > less.weights > 0


def test_a_tied_head_cannot_be_quantized_alone(bench: Workbench) -> None:
    row = bench.measure(make_run(head=Scheme()))
    assert row.status == "failed"
    assert "quantize the embeddings" in (row.error or "")


@pytest.mark.parametrize("chosen", ["proxy:0.1", "random:0.1", "activation:0.1"])
def test_kept_columns_are_counted(bench: Workbench, chosen: str) -> None:
    row = bench.measure(make_run(outliers=outliers_of(chosen), calibration=CALIBRATION))
    plain = bench.measure(make_run())
    assert row.error is None
    assert row.stored_bits > plain.stored_bits
    assert (row.weight_error or 1) < (plain.weight_error or 0)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_quantizer_keeps_columns(bench: Workbench, quantizer: str) -> None:
    """They cost their 16 bits, and the model moves less."""
    few, plain = (
        bench.measure(make_run(quantizer=quantizer, outliers=kept, calibration=CALIBRATION))
        for kept in (outliers_of("activation:0.1"), None)
    )
    assert few.status == plain.status == "done"
    assert few.stored_bits > plain.stored_bits
    assert (few.divergence or 1) < (plain.divergence or 0)


def test_random_columns_follow_the_seed(bench: Workbench) -> None:
    rows = [bench.measure(make_run(outliers=outliers_of("random:0.1"), seed=seed)).nll for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]


def test_what_a_run_cannot_do_is_its_row(bench: Workbench) -> None:
    without = bench.measure(make_run(outliers=outliers_of("activation:0.1")))
    assert (without.status, without.nll) == ("failed", None)
    assert "calibration" in (without.error or "")


def test_statistics_are_those_of_the_float_model(bench: Workbench) -> None:
    ids = torch.arange(32).view(2, 16)
    found = collect_stats(bench.model, bench.family, ids, gram=True)
    assert set(found) == {name for name in bench.layers if name != "model.embed_tokens"}
    query, key = (found[f"model.layers.0.self_attn.{name}_proj"] for name in "qk")
    assert query is key
    assert query.tokens == 32
    assert query.gram is not None
    torch.testing.assert_close(query.gram.diagonal(), query.energy, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["tweak-closed", "tweak-adam", "tweak-auto"])
def test_corrections_move_the_norms_of_their_run_alone(bench: Workbench, how: str) -> None:
    scheme = Scheme("int", 2, 16)
    before, plain = bench.measure(FLOAT), bench.measure(make_run(scheme))
    row = bench.measure(make_run(scheme, correction=how, calibration=CALIBRATION))
    assert row.error is None
    assert row.model_bits == plain.model_bits
    assert bool(row.notes) == (how != "tweak-closed")
    if how == "tweak-auto":
        assert all("error" in note for note in row.notes)
    else:
        assert row.nll != plain.nll
    assert all(torch.equal(norm, norm.bfloat16().float()) for norm in bench.norms), "as a checkpoint holds it"
    assert (bench.measure(FLOAT).nll, bench.measure(make_run(scheme)).nll) == (before.nll, plain.nll)


def test_the_closed_form_lowers_the_error_it_is_the_least_squares_solution_of(bench: Workbench) -> None:
    run = make_run(Scheme("int", 2, 16), calibration=CALIBRATION, correction="tweak-closed")
    ids = bench._samples(CALIBRATION)
    stats = collect_stats(bench.model, bench.family, ids, gram=True)
    name = "model.layers.0.mlp.gate_proj"
    gram, weight = stats[name].gram, bench.kept[name]
    norm = bench.model.get_submodule("model.layers.0.post_attention_layernorm").weight
    gain = norm.detach().clone()
    up = "model.layers.0.mlp.up_proj"

    def loss(factor: torch.Tensor) -> float:
        parts = [weight_of(bench.layers[each]) * factor - bench.kept[each] for each in (name, up)]
        return sum(float(((part @ gram) * part).sum()) for part in parts)

    assert bench.measure(run).error is None
    factor = (norm / gain).detach()
    assert not torch.equal(factor, torch.ones_like(factor))
    assert loss(factor) < loss(torch.ones_like(weight[0]))


def test_statistics_are_collected_once(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def counted(model: object, family: object, ids: object, gram: bool) -> object:
        seen.append(gram)
        return collect_stats(model, family, ids, gram)  # type: ignore[arg-type]

    monkeypatch.setattr("fracbit.sweeps.workbench.collect_stats", counted)
    for fields in (
        {"quantizer": "gptq"},
        {"quantizer": "descent", "search": True},
        {"correction": "tweak-closed"},
        {"outliers": outliers_of("activation:0.1")},
    ):
        assert bench.measure(make_run(calibration=CALIBRATION, **fields)).error is None
    assert seen == [True]


def test_gptq_beats_rounding_on_what_it_minimizes(bench: Workbench) -> None:
    stats = collect_stats(bench.model, bench.family, bench._samples(CALIBRATION), gram=True)
    bits, losses = {}, {}
    for name in ("rtn", "gptq"):
        row = bench.measure(make_run(Scheme("int", 2, 16), quantizer=name, calibration=CALIBRATION))
        bits[name] = row.stored_bits
        losses[name] = {
            layer: float(gram_errors(weight_of(bench.layers[layer]) - bench.kept[layer], found.gram).sum())
            for layer, found in stats.items()
            if found.gram is not None
        }
    assert bits["gptq"] == bits["rtn"]
    assert all(losses["gptq"][layer] < losses["rtn"][layer] for layer in stats)


@pytest.mark.parametrize("asked", [PAPER_TASKS, PAPER_TASKS[:3]], ids=len)
def test_the_mean_of_the_papers_tasks_is_stored_by_name(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, asked: tuple[str, ...]
) -> None:
    scores = [TaskScore(task, {"acc": 0.1 * index}, 10, "1") for index, task in enumerate(asked, 1)]
    monkeypatch.setattr(bench, "questions", object())
    monkeypatch.setattr(bench, "tokenizer", object())
    monkeypatch.setattr(workbench, "ask", lambda *_, **__: ZeroShot(tuple(scores), "0", 0.0))
    found = bench.measure(make_run(Scheme(block=16))).accuracies
    assert found.get("mean_of_four") == (pytest.approx(0.25) if len(asked) == 4 else None)
    assert set(asked) <= found.keys()


@pytest.mark.filterwarnings("ignore")  # the harness and what it brings warn about one another
def test_accuracies_stand_beside_the_loss(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="zero-shot is an extra: fracbit[eval]")
    text = " ".join(f"word{number}" for number in range(400))
    write_continuation([text], tmp_path, items=8, context_words=8, choice_words=3)
    evaluation = Evaluation(
        text="data/tales-evaluation.u16?length=512&first=1&keep=64", tasks=("continuation.yaml",)
    )
    recipe = Recipe(model="models/tales-xs", scheme=Scheme("int", 4))
    (tmp_path / "models").symlink_to(shared / "models")
    (tmp_path / "data").symlink_to(shared / "data")
    run = Run(recipe=recipe, evaluation=evaluation)
    bench = Workbench(source_of(run), tmp_path)
    row = bench.measure(run)
    assert row.error is None
    assert row.nll is not None
    assert 0 <= row.accuracies["continuation"] <= 1
    assert [note for note in row.notes if "continuation: 8 questions" in note and "lm-eval" in note]
    without = evaluation.model_copy(update={"tasks": ("gone.yaml",)})
    with pytest.raises(DataError, match=r"no task file .*gone\.yaml"):
        Workbench(source_of(run.model_copy(update={"evaluation": without})), tmp_path)
