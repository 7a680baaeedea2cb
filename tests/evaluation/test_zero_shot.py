"""The harness runs our tasks on our models, and its figures are what the model's own probabilities say."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import fracbit
from fracbit.checkpoint.load import load
from fracbit.errors import DataError
from fracbit.evaluation import (
    PAPER_TASKS,
    LocalTask,
    Questions,
    TaskScore,
    ZeroShot,
    ask,
    continuation_items,
    prepare_questions,
    tasks_of,
    write_continuation,
    write_lambada,
    zero_shot,
)
from fracbit.records.scheme import Scheme

# The harness and the libraries it brings warn about one another; that is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {"items": 24, "context_words": 40, "choice_words": 12}


@pytest.fixture(scope="module")
def tokenizer(shared: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(shared / "models" / "tales-s")


@pytest.fixture(scope="module")
def texts(shared: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    ids = np.fromfile(shared / "data" / "tales-evaluation.u16", "<u2").reshape(-1, 512)[:60]
    return [tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in ids]


def log_probability(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: str, choice: str
) -> float:
    """The sum of ln p over the choice behind its context, by hand."""
    front = len(tokenizer(context)["input_ids"])
    ids = torch.tensor([tokenizer(context + choice)["input_ids"]])
    with torch.no_grad():
        scores = model(ids).logits[0].log_softmax(-1)
    return float(scores[front - 1 : -1].gather(1, ids[0, front:, None]).sum())


def test_accuracy_is_what_the_probabilities_say(
    shared_model: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    tmp_path: Path,
) -> None:
    pytest.importorskip("lm_eval", reason="the extra fracbit[eval] is not installed")
    model = shared_model("tales-s")
    before = torch.get_rng_state()
    found = zero_shot(model, tokenizer, [write_continuation(texts, tmp_path, **SIZES)], batch=4)
    assert torch.equal(torch.get_rng_state(), before)
    right = 0
    for item in continuation_items(texts, seed=0, **SIZES):
        values = [log_probability(model, tokenizer, item.context, choice) for choice in item.choices]
        right += values.index(max(values)) == item.answer
    (score,) = found.scores
    assert score.accuracy == pytest.approx(right / SIZES["items"], abs=1.5 / SIZES["items"])
    assert score.accuracy > 0.4, "a trained model beats chance, which is 0.25"
    assert (score.task, score.items) == ("continuation", SIZES["items"])
    assert found.mean == score.accuracy
    assert found.paper_mean is None


def test_lambada_from_a_file(
    shared: Path,
    shared_model: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    pytest.importorskip("lm_eval", reason="the extra fracbit[eval] is not installed")
    task = write_lambada(shared / "data" / "lambada-2000.jsonl", tmp_path)
    (score,) = zero_shot(shared_model("tales-s"), tokenizer, [task], limit=8).scores
    assert score.items == 8
    assert {"acc", "acc_stderr", "perplexity"} <= set(score.metrics)
    assert score.metrics["perplexity"] > 1


def test_a_fracbit_checkpoint_is_asked_like_a_float_one(
    shared: Path, tokenizer: PreTrainedTokenizerBase, texts: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="the extra fracbit[eval] is not installed")
    fracbit.quantize(shared / "models" / "tales-s", tmp_path / "q", Scheme("int", 8))
    questions = prepare_questions([write_continuation(texts, tmp_path, **SIZES)])
    asked = [
        ask(load(path), tokenizer, questions, quiet=True).scores[0].metrics
        for path in (shared / "models" / "tales-s", tmp_path / "q")
    ]
    assert asked[0] == asked[1], "8 bits answer as the float model does"
    (source,) = questions.sources.values()
    assert source == hashlib.sha256((tmp_path / "continuation.jsonl").read_bytes()).hexdigest()


@pytest.mark.slow
def test_names_of_the_harness(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra fracbit[eval] is not installed")
    with pytest.raises(DataError, match="did you mean lambada_openai"):
        prepare_questions(["lambada_opnai"])
    if not os.environ.get("HF_HUB_OFFLINE"):
        pytest.skip("the hub may be there")
    with pytest.raises(
        DataError, match=r"lambada_openai, piqa, winogrande, hellaswag cannot.*`fracbit task`"
    ):
        prepare_questions(tasks_of(["paper"]))


@pytest.mark.parametrize(
    ("tasks", "complaint"),
    [([], "at least one"), (["none.yaml"], "there is no task file none.yaml; `fracbit task`")],
)
def test_tasks_that_are_not_there(tasks: list[str], complaint: str) -> None:
    pytest.importorskip("lm_eval", reason="the extra fracbit[eval] is not installed")
    with pytest.raises(DataError, match=complaint):
        prepare_questions(tasks_of(tasks))


def test_nothing_asked_is_an_error(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="limit 0 asks nothing"):
        ask(model, tokenizer, Questions({}, {}, {}), limit=0)


def test_names_of_tasks(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("")
    assert tasks_of(["paper", "mine.yaml"]) == [*PAPER_TASKS, LocalTask("mine", Path("mine.yaml"))]
    assert tasks_of(["own.yaml"], tmp_path) == [LocalTask("own", tmp_path / "own.yaml")]


def test_without_the_extra(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(DataError, match=r"lm_eval, which is not installed.*\[eval\]"):
        zero_shot(model, tokenizer, [LocalTask("continuation", Path("continuation.yaml"))])


def test_means() -> None:
    scores = [
        TaskScore(task, {"acc": value}, 10, "1") for task, value in zip("abc", (0.2, 0.4, 0.9), strict=True)
    ]
    scores.append(TaskScore("wikitext", {"word_perplexity": 9.0}, 10, "1"))
    found = ZeroShot(tuple(scores), "0", 1.0)
    assert found.mean == pytest.approx(0.5)
    assert found.paper_mean is None
    names = ["hellaswag", "lambada_openai", "piqa", "winogrande"]
    paper = ZeroShot(
        tuple(TaskScore(name, {"acc": 0.1 * n}, 1, "1") for n, name in enumerate(names)), "0", 1.0
    )
    assert paper.paper_mean == pytest.approx(0.15)
    assert paper.to_json()["paper_mean"] == pytest.approx(0.15)
