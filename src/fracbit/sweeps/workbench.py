"""`Workbench`: one float model, and everything that its runs share.

A run goes through the core of `fracbit.quantize` (pipeline/quantize), into memory. It is evaluated with the modules
that loading would install, by the function behind `fracbit.evaluate`. Runs share a cache: tensors of the source,
calibration samples, statistics and outputs of float blocks (float chain), and the float model's predictions.
"""

from __future__ import annotations

import math
import platform
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fracbit.checkpoint.format import StoredLayer, packed_layer
from fracbit.checkpoint.installed import installed
from fracbit.checkpoint.load import tokenizer_or_none
from fracbit.checkpoint.opened import Opened, open_float
from fracbit.checkpoint.output import InMemory
from fracbit.data import Tokens, read_documents
from fracbit.errors import DataError, FracbitError, SourceError, lacks_memory
from fracbit.evaluation import (
    Expected,
    Judgement,
    Windowing,
    cut_windows,
    default_window,
    judge,
    keep_expected,
)
from fracbit.evaluation.zero_shot import Questions, ask, prepare_questions, tasks_of
from fracbit.numerics.packed import decode
from fracbit.pipeline.quantize.manifest import run_notes
from fracbit.pipeline.quantize.record import layer_records, records_of, stored_layers
from fracbit.pipeline.quantize.rotate import needs_untied_head
from fracbit.pipeline.quantize.run import fill_shards, open_for
from fracbit.pipeline.quantize.schedule import FloatItem, LayerItem
from fracbit.pipeline.quantize.share import share_of
from fracbit.pipeline.quantize.work import Memory, Work, prepare
from fracbit.pipeline.study.float_model import load_float
from fracbit.records.files import named_path
from fracbit.records.recipe import Recipe
from fracbit.records.row import Evaluation, Row, Run, failed_row, run_key
from fracbit.records.run import ALLOWED
from fracbit.records.version import __version__
from fracbit.sweeps.queue import Workload

T = TypeVar("T")

EXPECTED_BYTES = 1 << 30  # of the float model's predictions that are kept
RUN_FAILURES: Final = (
    FracbitError,
    SafetensorError,
    OSError,
    MemoryError,
    torch.OutOfMemoryError,
    torch.linalg.LinAlgError,  # type: ignore[attr-defined]  # public, but not exported in so many words
)
"""Failures of models, data and machines, which become failed rows. Other exceptions are bugs and stop the sweep."""
BUGS: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Exceptions that `keep_going` also turns into failed rows, with the traceback."""


@dataclass(frozen=True)
class Failure:
    """Why something failed, as the rows of its runs say it."""

    error: str
    notes: tuple[str, ...] = ()

    def row(self, run: Run) -> Row:
        """The row of a run that could not start."""
        return failed_row(run, self.error, self.notes)


def attempt(work: Callable[[], T], keep_going: bool) -> T | Failure:
    """What `work` returns, or why it failed. A bug of fracbit is raised; with `keep_going` it is a failure too."""
    try:
        return work()
    except RUN_FAILURES as error:
        return Failure(explain(error))
    except BUGS as error:
        if lacks_memory(error):
            return Failure(explain(error))
        if not keep_going:
            raise
        return Failure(f"a bug of fracbit: {explain(error)}", (traceback.format_exc(),))


def open_bench(workload: Workload, root: Path, device: str, keep_going: bool) -> Workbench | Failure:
    """The workbench of a workload, or why it cannot be made. Both engines call it."""
    return attempt(lambda: Workbench(workload, root, device), keep_going)


@dataclass(frozen=True, eq=False)
class Made:
    """A quantized run: how it was made, and what is stored."""

    work: Work
    layers: dict[str, StoredLayer]
    tensors: dict[str, Tensor]
    notes: tuple[str, ...]


class Workbench:
    """Measures runs of one model. Its state is the float model, which every run restores, and the cache."""

    def __init__(self, workload: Workload, root: Path, device: str = "cpu") -> None:
        """Load the model and the text. `root`: folder that relative paths of the sweep start from. Raises `SourceError`.

        `device` "auto" spreads the model over all GPUs of this process. On a CPU models are evaluated in fp32; on GPUs
        in the type in which they are stored, which is fast there.
        """
        self.workload, self.root, self.device = workload, root, device
        self.where = _place(workload.model, root)
        opened = open_float(self.where, workload.revision, workload.trust_remote_code)
        self.opened: dict[bool, Opened] = {False: opened}  # by whether a rotation unties head and table
        self.floats = load_float(opened, device, dtype="float32" if device == "cpu" else "auto")
        self.tokenizer: PreTrainedTokenizerBase | None = tokenizer_or_none(
            opened.source.folder, workload.trust_remote_code
        )
        self.text = self._read(workload.evaluation.text)
        self.windows = _windows(self.floats.model, self.text, workload.evaluation)
        self.questions = self._questions()
        self.memory = Memory()

    def measure(self, run: Run, keep_going: bool = False) -> Row:
        """Quantize and evaluate a run; returns its row. A run that fails gives a row with the reason.

        A bug of fracbit is raised, or with `keep_going` its traceback is in the row's notes.
        """
        started = time.perf_counter()
        row = Row(
            key=run_key(run), run=run, status="done", family=self.floats.family.name, device=device_name(self.device),
            versions=versions(), text_sha256=self.text.sha256, notes=self.text.notes,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )  # fmt: skip
        figures = attempt(lambda: self._measure(run), keep_going)
        if isinstance(figures, Failure):
            figures = {"status": "failed", **vars(figures)}
        notes = (*row.notes, *figures.pop("notes", ()))
        return row.model_copy(update={**figures, "notes": notes, "seconds": _since(started)})

    def _measure(self, run: Run) -> dict[str, Any]:
        """The figures of a run, and its notes."""
        expected = self._expected  # now, while the model is float
        made = self.quantize(run.recipe)
        with installed(self.floats.model, made.layers, made.tensors):
            started = time.perf_counter()
            judged = judge(self.floats.model, self.windows, reference=expected)
            judging = _since(started)
            accuracies, notes = self._ask()
        return {
            **_size(made),
            **_loss(judged),
            "weight_error": weight_error(made),
            "evaluation_seconds": judging,
            "accuracies": accuracies,
            "notes": (*made.notes, *notes),
        }

    def quantize(self, recipe: Recipe) -> Made:
        """What `fracbit.quantize` of this recipe would store."""
        recipe = self._resolved(recipe)
        untied = needs_untied_head(() if recipe.calibration is None else recipe.calibration.transforms)
        if untied not in self.opened:
            self.opened[untied] = open_for(recipe)
        device = "cpu" if recipe.calibration is None or self.device == "auto" else self.device
        work = prepare(recipe, self.opened[untied], device=device, memory=self.memory)
        target = InMemory()
        fill_shards(work, target)
        records = records_of(work.schedule, target)
        tensors = {name: t for shard in records for name, t in target.tensors(shard).items()}
        notes = run_notes(work, layer_records(records.values()))
        notes += share_of(work.opened, work.schedule).warning(ALLOWED)
        return Made(work, stored_layers(work.schedule, records), self._changed(tensors), notes)

    def _changed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors, except those of the source that are unchanged: the float model already has them."""
        own = {tensor.data_ptr() for tensor, _ in self.memory.tensors.values()}
        return {name: tensor for name, tensor in tensors.items() if tensor.data_ptr() not in own}

    def _resolved(self, recipe: Recipe) -> Recipe:
        """The recipe with its paths as this process finds them."""
        plan = recipe.calibration
        if plan is not None:
            plan = plan.model_copy(update={"texts": tuple(self._beside(text) for text in plan.texts)})
        return recipe.model_copy(update={"model": self.where, "calibration": plan})

    @cached_property
    def _expected(self) -> Expected:
        """The float model's predictions, for as many windows as fit."""
        return keep_expected(self.floats.model, self.windows, room_bytes=EXPECTED_BYTES)

    def _ask(self) -> tuple[dict[str, float], tuple[str, ...]]:
        """Zero-shot accuracies by lm-eval; `mean_of_four` when all of the scaling paper's tasks are asked."""
        if self.questions is None or self.tokenizer is None:
            return {}, ()
        limit = self.workload.evaluation.limit
        found = ask(self.floats.model, self.tokenizer, self.questions, limit=limit, quiet=True)
        accuracies = {score.task: score.accuracy for score in found.scores if score.accuracy is not None}
        if found.paper_mean is not None:
            accuracies["mean_of_four"] = found.paper_mean
        return accuracies, tuple(f"{score}, lm-eval {found.lm_eval}" for score in found.scores)

    def _questions(self) -> Questions | None:
        """The tasks of the evaluation, read once. Raises `DataError`, `SourceError` for a model without a tokenizer."""
        if not self.workload.evaluation.tasks:
            return None
        if self.tokenizer is None:
            raise SourceError(f"model {self.workload.model} has no tokenizer, and zero-shot tasks need one")
        return prepare_questions(tasks_of(self.workload.evaluation.tasks, self.root))

    def _beside(self, text: str) -> str:
        """A text source; a path is looked for below the root of the sweep first."""
        below = self.root / text.partition("?")[0]
        return str(self.root / text) if named_path(below, DataError).exists() else text

    def _read(self, text: str) -> Tokens:
        """An evaluation text. Raises `DataError`."""
        location, vocabulary = text.partition("?")[0], self.floats.model.config.get_text_config().vocab_size
        try:
            return read_documents(self._beside(text), self.tokenizer, vocabulary)
        except DataError as error:
            places = (self.root / location, Path(location))
            if ":" in location or any(named_path(place, DataError).exists() for place in places):
                raise
            raise DataError(f"{error} It is not below the root of the sweep either: {self.root}.") from error


def weight_error(made: Made) -> float | None:
    """Squared error of all quantized weights relative to their power.

    None if nothing is quantized, or if a transform changed the float weights: the error would then include that change.
    """
    plan = made.work.recipe.calibration
    if not made.layers or (plan is not None and plan.transforms):
        return None
    error = power = 0.0
    for items in made.work.schedule.shards.values():
        for item in items:
            if isinstance(item, LayerItem):
                tensor = made.work.reader.read(item)[0]
                weight = (tensor.T if item.layer.transposed else tensor).float()  # [out, in]
                name = item.layer.name
                decoded = decode(packed_layer(name, made.layers[name], made.tensors))  # [out, in]
                error += float((decoded - weight).square().sum())
                power += float(weight.square().sum())
    return error / power if power else None


def _size(made: Made) -> dict[str, int]:
    """Parameters and bits, counted from what is stored."""
    weights = sum(layer.shape[0] * layer.shape[1] for layer in made.layers.values())
    floats = [
        item
        for items in made.work.schedule.shards.values()
        for item in items
        if isinstance(item, FloatItem) and not item.unused
    ]
    others = sum(torch.Size(item.shape).numel() for item in floats)
    packed = sum(layer.bytes for layer in made.layers.values())
    return {
        "parameters": weights + others,
        "weights": weights,
        "stored_bits": 8 * packed,
        "model_bits": 8 * (packed + sum(item.bytes for item in floats)),
    }


def _loss(judged: Judgement) -> dict[str, object]:
    found, apart = judged.perplexity, judged.divergence
    return {
        "nll": found.nll,
        "perplexity": found.perplexity if math.isfinite(found.perplexity) else None,
        "divergence": None if apart is None else apart.kl,
        "agreement": None if apart is None else apart.agreement,
        "window_nll": tuple(round(nats, 4) for nats in found.window_nll),
        "window_tokens": found.window_tokens,
    }


def explain(error: BaseException) -> str:
    """An error on one line, with its kind when it is not one of ours."""
    text = " ".join(str(error).split())
    return text if isinstance(error, FracbitError) else f"{type(error).__name__.lstrip('_')}: {text}"


def device_name(device: str) -> str:
    """The device in a row: `cpu x86_64 AVX2, 2 threads`, the GPU's name, or `8 x` that name."""
    if device == "auto" and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    chip = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"{device} {chip}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """The versions that a figure depends on."""
    return {
        "fracbit": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def _place(model: str, root: Path) -> str:
    """The location of a sweep's model: a folder below the root, or the name itself."""
    below = named_path(root / model, SourceError)
    return str(below) if below.exists() else model


def _windows(model: PreTrainedModel, tokens: Tokens, evaluation: Evaluation) -> Windowing:
    window = evaluation.window or default_window(model)
    return cut_windows(tokens.documents, window=window, stride=evaluation.stride)


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 4)
