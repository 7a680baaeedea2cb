"""Zero-shot accuracy through EleutherAI's evaluation harness (lm-eval, the extra fracbit[eval]).

The harness's own HFLM class runs the model, float or fracbit, so a figure here is a figure of the harness:
same prompts, same tokenization, same scores. `PAPER_TASKS` are the four tasks of the 4-bit scaling laws, which
report their mean accuracy (Dettmers & Zettlemoyer 2022, arXiv:2212.09720, section 3). Tasks named as strings
fetch their data from the hub; local tasks (local_tasks.py) do not.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import io
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fracbit.errors import DataError
from fracbit.evaluation.local_tasks import LocalTask
from fracbit.records.extras import check_extra

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PAPER_TASKS = ("lambada_openai", "piqa", "winogrande", "hellaswag")


def tasks_of(names: Sequence[str], root: Path | None = None) -> list[str | LocalTask]:
    """Tasks by the names that users write: `paper` for the four, `*.yaml` for files, looked for below `root` first."""
    named = [name for item in names for name in (PAPER_TASKS if item == "paper" else (item,))]
    return [_local(name, root or Path()) if name.endswith(".yaml") else name for name in named]


def _local(name: str, root: Path) -> LocalTask:
    beside = root / name
    return LocalTask(beside.stem, beside if beside.is_file() else Path(name))


@dataclass(frozen=True)
class TaskScore:
    """One task's result. metrics: every figure of the harness by its name ("acc", "acc_stderr", "perplexity").

    items: how many questions were asked. version: of the task file. source: SHA-256 of the data of a local task.
    """

    task: str
    metrics: Mapping[str, float]
    items: int
    version: str
    source: str = ""

    @property
    def accuracy(self) -> float | None:
        """Share of right answers, 0..1; None for a task without this figure."""
        return self.metrics.get("acc")

    def __str__(self) -> str:
        data = f", data {self.source[:12]}" if self.source else ""
        return f"{self.task}: {self.items} questions, version {self.version}{data}"


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
                "source": score.source,
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


@dataclass(frozen=True, eq=False)
class Questions:
    """Tasks with their data, read once for any number of models. `tasks` and `groups` are the harness's own objects.

    `sources`: task -> SHA-256 of its data file, for local tasks.
    """

    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]
    sources: Mapping[str, str]


def prepare_questions(tasks: Sequence[str | LocalTask] = PAPER_TASKS) -> Questions:
    """Read tasks: names of the harness's tasks or groups, and local ones.

    Raises: DataError without lm-eval, for an unknown task (near matches listed), a local one that cannot be read, and when the
    hub cannot be reached.
    """
    if not tasks:
        raise DataError("there is no task to ask: name at least one, such as lambada_openai.")
    _library("lm_eval")
    names = [task for task in tasks if isinstance(task, str)]
    # Reading the harness's thirteen thousand task files can take longer than the evaluation.
    manager = _library("lm_eval.tasks").TaskManager(include_defaults=bool(names))
    _check_names(names, manager.all_tasks)
    _check_files([task.path for task in tasks if isinstance(task, LocalTask)])
    specs = [str(task.path) if isinstance(task, LocalTask) else task for task in tasks]
    try:
        loaded = manager.load(specs)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(_explain([str(task) for task in specs], error)) from error
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
    sources = {name: _hash(task) for name, task in loaded["tasks"].items()}
    return Questions(
        loaded["tasks"], loaded["groups"], {name: found for name, found in sources.items() if found}
    )


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Questions,
    *,
    limit: int | None = None,
    batch: int = 8,
    quiet: bool = False,
) -> ZeroShot:
    """Ask a loaded model the questions, without examples.

    limit: only the first of each task. batch: questions run together. quiet: no progress bars of the harness.

    Raises: DataError when the model or its tokenizer cannot be asked.
    """
    started = time.perf_counter()
    if limit is not None and limit < 1:
        raise DataError(f"limit {limit} asks nothing: it must be at least 1.")
    harness, HFLM = _library("lm_eval"), _library("lm_eval.models.huggingface").HFLM
    loaded = {
        "tasks": dict(questions.tasks),
        "groups": dict(questions.groups),
        "group_map": {name: group.child_names for name, group in questions.groups.items()},
    }
    try:
        with _silence(quiet):
            runner = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
            found = harness.evaluate(
                lm=runner, task_dict=loaded, limit=limit, bootstrap_iters=1000, log_samples=False
            )
    except (OSError, ValueError) as error:
        raise DataError(_explain(list(questions.tasks), error)) from error
    version = importlib.import_module("importlib.metadata").version("lm_eval")
    return ZeroShot(_scores(found, questions.sources), version, time.perf_counter() - started)


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | LocalTask] = PAPER_TASKS,
    *,
    limit: int | None = None,
    batch: int = 8,
    quiet: bool = False,
) -> ZeroShot:
    """`prepare_questions` the tasks and `ask` a model, in one call."""
    return ask(model, tokenizer, prepare_questions(tasks), limit=limit, batch=batch, quiet=quiet)


@contextmanager
def _silence(quiet: bool) -> Iterator[None]:
    """Keep the harness off stdout and, when `quiet`, its bars and advice off stderr; errors are still raised."""
    if not quiet:
        with redirect_stdout(sys.stderr):
            yield
        return
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)


def _hash(task: Any) -> str:
    """SHA-256 over the data files of a task that has its own; "" for data of the hub."""
    files = (task.get_config("dataset_kwargs") or {}).get("data_files") or {}
    paths = (
        [Path(path) for path in files.values() if isinstance(path, str)] if isinstance(files, dict) else []
    )
    if not paths or not all(path.is_file() for path in paths):
        return ""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def _scores(found: Mapping[str, Any], sources: Mapping[str, str]) -> tuple[TaskScore, ...]:
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
            source=sources.get(task, ""),
        )
        for task, metrics in found["results"].items()
        if task in found["n-samples"]
    )


def _check_names(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise DataError(
                f"the harness has no task {name!r}: {hint}`lm_eval ls tasks` lists all {len(known)}; a task file ends in .yaml."
            )


def _check_files(paths: Sequence[Path]) -> None:
    for path in paths:
        if not path.is_file():
            raise DataError(f"there is no task file {path}; `fracbit task` writes one.")


def _explain(names: Sequence[str], error: Exception) -> str:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f"the tasks {', '.join(names)} cannot be run ({reason}). If their data is not here and the hub cannot be "
        "reached, use local tasks, which `fracbit task` writes."
    )


def _library(name: str) -> ModuleType:
    check_extra("a zero-shot task", name, "eval", DataError)
    return importlib.import_module(name)
