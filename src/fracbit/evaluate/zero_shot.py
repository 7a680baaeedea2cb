"""Zero-shot accuracy through EleutherAI's evaluation harness (lm-eval, the extra fracbit[eval]).

The harness's own HFLM class runs the model, float or fracbit, so a figure here is a figure of the harness:
same prompts, same tokenization, same scores. `PAPER_TASKS` are the four whose mean accuracy the 4-bit
scaling laws report (Dettmers & Zettlemoyer 2022, arXiv:2212.09720, section 3). Tasks named as strings fetch
their data from the hub; local tasks (local_tasks.py) do not.
"""

from __future__ import annotations

import difflib
import importlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fracbit.errors import DataError
from fracbit.evaluate.local_tasks import LocalTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PAPER_TASKS = ("lambada_openai", "piqa", "winogrande", "hellaswag")


@dataclass(frozen=True)
class TaskScore:
    """One task's result. metrics: every figure of the harness by its name ("acc", "acc_stderr",
    "perplexity", ...).

    items: how many questions were asked. version: of the task file.
    """

    task: str
    metrics: Mapping[str, float]
    items: int
    version: str

    @property
    def accuracy(self) -> float | None:
        """Share of right answers, 0..1; None for a task that has no such figure."""
        return self.metrics.get("acc")


@dataclass(frozen=True)
class ZeroShot:
    """Results of several tasks. lm_eval: version of the harness. seconds: wall clock, data and model runs
    together.
    """

    scores: tuple[TaskScore, ...]
    lm_eval: str
    seconds: float

    @property
    def mean(self) -> float | None:
        """Mean accuracy over the tasks that have one, each counting once."""
        found = [score.accuracy for score in self.scores if score.accuracy is not None]
        return sum(found) / len(found) if found else None

    @property
    def paper_mean(self) -> float | None:
        """Mean accuracy over PAPER_TASKS, or None unless all four were asked."""
        found = {score.task: score.accuracy for score in self.scores}
        chosen = [found.get(task) for task in PAPER_TASKS]
        return None if None in chosen else sum(value for value in chosen if value is not None) / len(chosen)

    def to_json(self) -> dict[str, object]:
        """The record as JSON values."""
        scores = [
            {
                "task": score.task,
                "items": score.items,
                "version": score.version,
                "metrics": dict(score.metrics),
            }
            for score in self.scores
        ]
        return {
            "scores": scores,
            "mean": self.mean,
            "paper_mean": self.paper_mean,
            "lm_eval": self.lm_eval,
            "seconds": self.seconds,
        }


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | LocalTask] = PAPER_TASKS,
    *,
    limit: int | None = None,
    batch: int = 8,
) -> ZeroShot:
    """Ask a loaded model the questions of harness tasks, without examples.

    tasks: names of the harness's tasks or groups, and local ones. limit: only the first questions of each.
    batch: questions run together.

    Raises: DataError without lm-eval, for an unknown task (near matches listed) and when the hub cannot be
    reached.
    """
    started = time.perf_counter()
    harness = _library("lm_eval")
    manager = _library("lm_eval.tasks").TaskManager(include_path=_include(tasks))
    names = [task.name if isinstance(task, LocalTask) else task for task in tasks]
    _check_names(names, manager.all_tasks)
    runner = _library("lm_eval.models.huggingface").HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch
    )
    try:
        found = harness.simple_evaluate(
            model=runner,
            tasks=names,
            num_fewshot=0,
            task_manager=manager,
            limit=limit,
            bootstrap_iters=1000,
            log_samples=False,
            # The harness would seed the whole process; scoring without examples draws nothing.
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
            fewshot_random_seed=None,
        )
    except (OSError, ValueError) as error:
        raise DataError(_explain(names, error)) from error
    version = importlib.import_module("importlib.metadata").version("lm_eval")
    return ZeroShot(_scores(found), version, time.perf_counter() - started)


def _scores(found: Mapping[str, Any]) -> tuple[TaskScore, ...]:
    return tuple(
        TaskScore(
            task=task,
            metrics={
                name.removesuffix(",none"): float(value)
                for name, value in metrics.items()
                if isinstance(value, int | float) and "," in name
            },
            items=int(found["n-samples"][task]["effective"]),
            version=str(found["versions"].get(task)),
        )
        for task, metrics in found["results"].items()
        if task in found["n-samples"]
    )


def _include(tasks: Sequence[str | LocalTask]) -> list[str]:
    """The folders of local tasks, each once."""
    return sorted({str(task.path.parent) for task in tasks if isinstance(task, LocalTask)})


def _check_names(names: Sequence[str], known: Sequence[str]) -> None:
    if not names:
        raise DataError("no task to ask: name at least one, such as lambada_openai.")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise DataError(
                f"the harness has no task {name!r}: {hint}`lm_eval ls tasks` lists all {len(known)}."
            )


def _explain(names: Sequence[str], error: Exception) -> str:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f"the tasks {', '.join(names)} cannot be run ({reason}). When their data is not at hand and the hub "
        "cannot be reached, use local tasks: write_lambada and write_continuation."
    )


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"zero-shot tasks need {error.name}, which is not installed: "
            "install it with pip install 'fracbit[eval]'."
        ) from error
