"""A workbench measures what a plain loop would, counts every bit, shares what it may, and says what a run cannot do.

That a row equals quantize and evaluate of its recipe is tests/laws/test_sweep_rows.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from fracbit.pipeline.quantize import block as stage
from fracbit.quantizers import QUANTIZERS
from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Override, Recipe
from fracbit.records.row import KEEP_ALL, Evaluation, Row, Run, run_key
from fracbit.records.scheme import Scheme
from fracbit.sweeps import workbench
from fracbit.sweeps.in_process import InProcess
from fracbit.sweeps.queue import Queue, workload_of
from fracbit.sweeps.workbench import Workbench

EVALUATION = Evaluation(text="ids.u16?length=32")
CALIBRATION = Calibration(texts=("ids.u16?length=32",), samples=4, length=16, chain="float")


def make_run(scheme: Scheme | None = None, **fields: Any) -> Run:
    recipe = Recipe(model="tiny", scheme=scheme or Scheme(block=16), **fields)
    return Run(recipe=recipe, evaluation=EVALUATION)


FLOAT = make_run(overrides=(KEEP_ALL,))


@pytest.fixture
def bench(study: Path) -> Workbench:
    return Workbench(workload_of(FLOAT), study)


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


def test_the_tokenizer_is_that_of_the_revision_and_trusted_as_the_model(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, bool]] = []
    monkeypatch.setattr(workbench, "tokenizer_or_none", lambda where, trust: asked.append((where, trust)))
    trusted = FLOAT.model_copy(update={"recipe": FLOAT.recipe.model_copy(update={"trust_remote_code": True})})
    made = [Workbench(workload_of(run), study) for run in (FLOAT, trusted)]
    assert asked == [(made[0].opened[False].source.folder, trust) for trust in (False, True)]


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


@pytest.mark.parametrize("tweak", ["none", "auto"])
def test_a_spread_model_measures_the_same(study: Path, bench: Workbench, tweak: str) -> None:
    """Without GPUs accelerate spreads over the CPU alone: the path is walked, several devices are not."""
    pytest.importorskip("accelerate", reason="device_map is an extra: fracbit[device-map]")
    spread = Workbench(workload_of(FLOAT), study, "auto")
    assert next(spread.floats.model.parameters()).dtype == torch.bfloat16, "as it is stored"
    plan = CALIBRATION.model_copy(update={"tweak": tweak})
    for fields in ({}, {"quantizer": "gptq"}, {"outliers": "activation:0.1"}):
        run = make_run(Scheme("nf", 4, 16), calibration=plan, **fields)
        found, expected = spread.measure(run), bench.measure(run)
        assert found.error is None
        assert found.stored_bits == expected.stored_bits
        assert found.nll == pytest.approx(expected.nll, abs=0.01)  # bfloat16 products


def test_model_bits_count_everything(bench: Workbench) -> None:
    row = bench.measure(make_run())
    assert row.parameters == sum(p.numel() for p in bench.floats.model.parameters())
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


def test_a_tied_head_is_quantized_with_its_table(bench: Workbench) -> None:
    """As `fracbit.quantize` does, and as it says."""
    row, plain = bench.measure(make_run(head=Scheme(block=16))), bench.measure(make_run())
    assert row.weights > plain.weights
    assert any("are one tensor" in note for note in row.notes)


@pytest.mark.parametrize("chosen", ["cost:0.1", "proxy:0.1", "random:0.1", "activation:0.1"])
def test_columns_in_sixteen_bits_are_counted(bench: Workbench, chosen: str) -> None:
    row = bench.measure(make_run(outliers=chosen, calibration=CALIBRATION))
    plain = bench.measure(make_run())
    assert row.error is None
    assert row.stored_bits > plain.stored_bits
    assert (row.weight_error or 1) < (plain.weight_error or 0)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_quantizer_keeps_columns(bench: Workbench, quantizer: str) -> None:
    """They cost their 16 bits, and the model moves less."""
    few, plain = (
        bench.measure(make_run(quantizer=quantizer, outliers=outliers, calibration=CALIBRATION))
        for outliers in ("activation:0.1", None)
    )
    assert few.status == plain.status == "done"
    assert few.stored_bits > plain.stored_bits
    assert (few.divergence or 1) < (plain.divergence or 0)


def test_random_columns_follow_the_seed(bench: Workbench) -> None:
    rows = [bench.measure(make_run(outliers="random:0.1", seed=seed)).nll for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]


def test_what_a_run_cannot_do_is_its_row(bench: Workbench) -> None:
    without = bench.measure(make_run(outliers="activation:0.1"))
    assert (without.status, without.nll) == ("failed", None)
    assert "calibration" in (without.error or "")


def test_a_float_block_is_observed_once(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float-chain runs of one calibration share what they observe; quantized chains cannot, and say nothing else."""
    seen: list[int] = []
    observe = stage.observe_all

    def counted(module: object, hidden: Any, *others: Any, **named: Any) -> Any:
        seen.append(hidden.index)
        return observe(module, hidden, *others, **named)

    monkeypatch.setattr(stage, "observe_all", counted)
    for fields in (
        {"quantizer": "gptq"},
        {"quantizer": "gptq", "search": True},
        {"quantizer": "descent", "search": True},
    ):
        assert bench.measure(make_run(calibration=CALIBRATION, **fields)).error is None
    assert seen == [0, 1]


def test_a_bug_stops_the_sweep_unless_it_is_to_go_on(
    bench: Workbench, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What models and data cause is a row; a bug of ours is raised, or with `keep_going` its traceback is in the row."""

    def broken(*_: object, **__: object) -> None:
        raise KeyError("no such thing")

    monkeypatch.setattr(workbench, "fill_shards", broken)
    with pytest.raises(KeyError, match="no such thing"):
        bench.measure(make_run())
    row = bench.measure(make_run(), keep_going=True)
    assert (row.status, row.nll) == ("failed", None)
    assert "a bug of fracbit: KeyError" in (row.error or "")
    assert any("Traceback" in note and "broken" in note for note in row.notes)
    run = make_run()
    key = run_key(run)
    for keep_going in (False, True):
        rows = InProcess(study, keep_going=keep_going).measure(
            Queue([(workload_of(run), key)]), {key: run}, lambda _: True
        )
        if keep_going:
            assert [row.status for row in rows] == ["failed"]
        else:
            with pytest.raises(KeyError):
                list(rows)


def raising(error: Exception) -> Callable[..., None]:
    def raised(*_: object, **__: object) -> None:
        raise error

    return raised


def measured(study: Path, keep_going: bool) -> list[Row]:
    """The rows of two runs of one model by the engine of this process."""
    runs = {run_key(run): run for run in (make_run(), make_run(Scheme("int", 3, 16)))}
    queue = Queue([(workload_of(run), key) for key, run in runs.items()])
    return list(InProcess(study, keep_going=keep_going).measure(queue, runs, lambda _: True))


@pytest.mark.parametrize("place", ["load_float", "fill_shards"])
def test_a_bug_in_loading_is_kept_going_after_as_one_in_quantizing(
    study: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(workbench, place, raising(KeyError("no such thing")))
    with pytest.raises(KeyError, match="no such thing"):
        measured(study, keep_going=False)
    rows = measured(study, keep_going=True)
    assert [row.status for row in rows] == ["failed", "failed"]
    assert {row.error for row in rows} == {"a bug of fracbit: KeyError: 'no such thing'"}
    assert all("Traceback" in note and "raised" in note for row in rows for note in row.notes)


NO_MEMORY = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"


@pytest.mark.parametrize("place", ["load_float", "fill_shards"])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError(NO_MEMORY), f"RuntimeError: {NO_MEMORY}"),
        (RuntimeError("not enough memory: you tried to allocate 9 bytes"), "not enough memory"),
        (MemoryError("9 bytes"), "MemoryError: 9 bytes"),
        (torch.linalg.LinAlgError("not positive-definite"), "LinAlgError: not positive-definite"),
    ],
    ids=["allocator", "allocator elsewhere", "python", "linear algebra"],
)
def test_what_a_machine_or_data_cause_is_no_bug(
    study: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception, said: str
) -> None:
    monkeypatch.setattr(workbench, place, raising(error))
    rows = measured(study, keep_going=False)
    assert [row.status for row in rows] == ["failed", "failed"]
    assert all(said in (row.error or "") and not row.notes for row in rows)
    assert all(not (row.error or "").startswith(("_", "a bug")) for row in rows)


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
    bench = Workbench(workload_of(run), tmp_path)
    row = bench.measure(run)
    assert row.error is None
    assert row.nll is not None
    assert 0 <= row.accuracies["continuation"] <= 1
    assert [note for note in row.notes if "continuation: 8 questions" in note and "lm-eval" in note]
    without = evaluation.model_copy(update={"tasks": ("gone.yaml",)})
    with pytest.raises(DataError, match=r"no task file .*gone\.yaml"):
        Workbench(workload_of(run.model_copy(update={"evaluation": without})), tmp_path)
