"""`Workbench`: one float model in memory, and everything that its runs share.

A run costs little more than its evaluation because nothing that runs have in common is done twice: the model is loaded once;
weights are quantized in place from a kept copy; the float model's log-probabilities, the calibration statistics, the proxy
scores and the block ranges (the same for every fixed data type of a block) are computed at first use and kept.
"""

from __future__ import annotations

import math
import platform
import time
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Final

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fracbit.bundled import bundled_model
from fracbit.checkpoint.load import load, tokenizer_or_none
from fracbit.data import Tokens, read_documents, sample
from fracbit.errors import DataError, FracbitError, RecipeError, SourceError
from fracbit.evaluation.logits import ScoredRows, scored_rows, vocabulary_of
from fracbit.evaluation.perplexity import Perplexity, default_window, finite_nll, summarize, window_nll
from fracbit.evaluation.windows import Windowing, plan_windows
from fracbit.evaluation.zero_shot import Questions, ask, prepare, tasks_of
from fracbit.models.blocks import blocks, groups, linears, norms, weight_of
from fracbit.models.family import Family
from fracbit.models.find import family_of
from fracbit.models.install import set_weight
from fracbit.models.walk import embed, observe
from fracbit.numerics import PackedTensor, decode, encode, fit, fixed_type, quantize_tensor, stored_bits
from fracbit.numerics.datatypes import is_fitted
from fracbit.numerics.grid import Grid as WeightGrid
from fracbit.numerics.stats import Stats, empty
from fracbit.numerics.stats import add_inputs as add
from fracbit.quantizers import QUANTIZERS
from fracbit.records.row import Calibration, Evaluation, Row, Run, run_key
from fracbit.records.scheme import Scheme
from fracbit.records.version import __version__
from fracbit.sweeps.corrections import CORRECTIONS, FloatModel
from fracbit.sweeps.outliers import choose_columns, producer_scores
from fracbit.sweeps.queue import Workload

FLOAT_LOGITS_BYTES = 1 << 30
RUN_FAILURES: Final = (
    FracbitError,
    SafetensorError,
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    MemoryError,
)
"""What a model that cannot be loaded, quantized or evaluated raises. Anything else is a bug of ours and stops the sweep."""


@dataclass(frozen=True, eq=False)
class Expected:
    """The float model's next-token distribution at a window's scored ids: `logs`, `chances` fp32 [scored, vocabulary] are the
    log-probabilities and the probabilities, `top` int64 [scored] the most likely ids.
    """

    logs: Tensor
    chances: Tensor
    top: Tensor


class Workbench:
    """Measures runs of one model. Its only state is the model's weights, which every run writes anew, and what is kept."""

    def __init__(self, source: Workload, root: Path, device: str = "cpu") -> None:
        """Load the model and the text. `root`: folder that relative paths of the grid start from. Raises `SourceError`.

        `device` "auto" spreads the model over all GPUs of this process. The kept copy is in the host's memory.
        """
        self.source, self.root, self.device = source, root, device
        self.model, self.tokenizer, self.stored_type = _load(source, root, device)
        self.family = family_of(self.model)
        self.layers = _layers(self.model, self.family)
        self.kept = {name: weight_of(module).to("cpu", copy=True) for name, module in self.layers.items()}
        self.text = self._read(source.evaluation.text)
        self.plan = _plan(self.model, self.text, source.evaluation)
        self.questions = self._questions()
        self.dirty: set[str] = set()
        self.norms = _norms(self.model, self.family)
        self.norms_kept = [parameter.clone() for parameter in self.norms]
        self.ranges: dict[tuple[str, Scheme], WeightGrid] = {}
        self.statistics: dict[tuple[Calibration, bool], dict[str, Stats]] = {}

    def measure(self, run: Run) -> Row:
        """Quantize, evaluate, and say what came out. A run that cannot be done gives a row that says why."""
        started = time.perf_counter()
        row = Row(
            key=run_key(run), run=run, status="done", family=self.family.name, device=device_name(self.device),
            versions=versions(), text_sha256=self.text.sha256, notes=self.text.notes,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )  # fmt: skip
        try:
            figures, notes = self._quantize(run)
            judged, asked = self._evaluate()
        except RUN_FAILURES as error:
            return row.model_copy(
                update={"status": "failed", "error": explain(error), "seconds": _since(started)}
            )
        notes = (*row.notes, *notes, *asked)
        return row.model_copy(update={**figures, **judged, "notes": notes, "seconds": _since(started)})

    def _quantize(self, run: Run) -> tuple[dict[str, object], tuple[str, ...]]:
        """Install the run's weights; bits and the relative squared error of what was quantized, and notes."""
        self._expected  # noqa: B018 - computed now, while the float model can be had
        chosen = self._schemes(run)
        columns = self._columns(run, chosen)
        stats = self._stats(run, chosen)
        self._restore(chosen)
        bits = weights = 0
        error = power = 0.0
        notes: list[str] = []
        for name, scheme in chosen.items():
            packed, said = self._pack(name, scheme, run, stats.get(name), columns.get(name))
            notes += [f"{name}: {note}" for note in said]
            weight, decoded = self._float(name), decode(packed)
            set_weight(self.layers[name], decoded)
            self.dirty.add(name)
            bits, weights = bits + stored_bits(packed), weights + weight.numel()
            error += float((decoded - weight).square().sum())
            power += float(weight.square().sum())
        notes += self._correct(run, chosen)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        model_bits = bits + (parameters - weights) * 8 * self.stored_type.itemsize
        figures: dict[str, object] = {
            "parameters": parameters, "weights": weights, "stored_bits": bits, "model_bits": model_bits,
            "weight_error": error / power if power else None,
        }  # fmt: skip
        return figures, tuple(notes)

    def _correct(self, run: Run, chosen: dict[str, Scheme]) -> tuple[str, ...]:
        """Apply the run's correction; norms are rounded to the type in which a checkpoint stores them."""
        correction = CORRECTIONS[run.correction]
        if correction is None:
            return ()
        calibration = _calibration_of(run)
        stats, ids = self.statistics[calibration, True], self._samples(calibration)
        floats = {name: self._float(name) for name in chosen}
        with torch.enable_grad():
            notes = correction(FloatModel(self.model, self.family, floats, ids, stats))
        with torch.no_grad():
            for parameter in self.norms:
                parameter.copy_(parameter.to(self.stored_type))
        return notes

    def _evaluate(self) -> tuple[dict[str, object], tuple[str, ...]]:
        """Loss, divergence, accuracies, and notes."""
        found, divergence, agreement = self._pass(self._expected)
        figures: dict[str, object] = {
            "nll": found.nll,
            "perplexity": found.perplexity if math.isfinite(found.perplexity) else None,
            "divergence": divergence,
            "agreement": agreement,
            "window_nll": tuple(round(nats, 4) for nats in found.window_nll),
            "window_tokens": found.window_tokens,
            "evaluation_seconds": found.seconds,
        }
        accuracies, notes = self._ask()
        return {**figures, "accuracies": accuracies}, notes

    def _ask(self) -> tuple[dict[str, float], tuple[str, ...]]:
        """Zero-shot accuracies by lm-eval; `mean_of_four` when all of the scaling paper's tasks are asked."""
        if self.questions is None or self.tokenizer is None:
            return {}, ()
        limit = self.source.evaluation.limit
        found = ask(self.model, self.tokenizer, self.questions, limit=limit, quiet=True)
        accuracies = {score.task: score.accuracy for score in found.scores if score.accuracy is not None}
        if found.paper_mean is not None:
            accuracies["mean_of_four"] = found.paper_mean
        return accuracies, tuple(f"{score}, lm-eval {found.lm_eval}" for score in found.scores)

    def _questions(self) -> Questions | None:
        """The tasks of the evaluation, read once. Raises `DataError`, `SourceError` for a model without a tokenizer."""
        if not self.source.evaluation.tasks:
            return None
        if self.tokenizer is None:
            raise SourceError(f"model {self.source.model} has no tokenizer: zero-shot tasks are text")
        return prepare(tasks_of(self.source.evaluation.tasks, self.root))

    def _pass(self, reference: dict[int, Expected]) -> tuple[Perplexity, float | None, float | None]:
        """One pass over the text gives the loss and, where the float model's are kept, what moved."""
        started = time.perf_counter()
        sums = [0.0] * len(self.plan.windows)
        divergence = agreed = 0.0
        compared = 0
        for rows in scored_rows(self.model, self.plan):
            if rows.index not in reference:
                sums[rows.index] = window_nll(rows)
                continue
            expected, found = reference[rows.index], logprobs(rows)
            own = found.gather(1, rows.targets[:, None])
            sums[rows.index] = finite_nll(rows, -float(own.double().sum()))
            divergence += float((expected.logs - found).mul_(expected.chances).sum())
            agreed += int((expected.top == found.argmax(1)).sum())
            compared += len(found)
        result = summarize(self.plan, sums, _since(started))
        return result, divergence / compared if compared else None, agreed / compared if compared else None

    @cached_property
    def _expected(self) -> dict[int, Expected]:
        """What the float model expects, window by window while it fits."""
        self._restore({})
        room = FLOAT_LOGITS_BYTES
        kept = {}
        for rows in scored_rows(self.model, self.plan):
            size = 8 * rows.logits.numel()
            if size <= room:
                logs = logprobs(rows)
                kept[rows.index] = Expected(logs, logs.exp(), logs.argmax(1))
                room -= size
        return kept

    def _restore(self, chosen: dict[str, Scheme]) -> None:
        for name in self.dirty - chosen.keys():
            set_weight(self.layers[name], self.kept[name])
        self.dirty &= chosen.keys()
        with torch.no_grad():
            for parameter, kept in zip(self.norms, self.norms_kept, strict=True):
                parameter.copy_(kept)

    def _schemes(self, run: Run) -> dict[str, Scheme]:
        """The scheme of every layer that the run quantizes."""
        recipe = run.recipe
        inside = {name for name in self.layers if name.startswith(self.family.blocks + ".")}
        chosen: dict[str, Scheme] = {}
        for name in self.layers:
            scheme = (
                recipe.scheme
                if name in inside
                else recipe.head
                if name == self.family.head
                else recipe.embeddings
            )
            for override in recipe.overrides:
                if fnmatchcase(name, override.layers):
                    scheme = None if override.keep else override.scheme or scheme
            if scheme is not None:
                chosen[name] = scheme
        if recipe.head is not None and self.family.head not in self.layers:
            raise RecipeError(
                "the head of this model is its embedding table: quantize the embeddings, not the head"
            )
        return chosen

    def _columns(self, run: Run, chosen: dict[str, Scheme]) -> dict[str, Tensor]:
        if run.outliers is None:
            return {}
        widths = {name: self.kept[name].shape[1] for name in chosen if name in self._proxy_scores}
        stats = self._stats_of(run, gram=False) if run.outliers.chosen == "activation" else {}
        scores = self._proxy_scores if run.outliers.chosen == "proxy" else {}
        return choose_columns(run.outliers, widths, scores, stats, run.recipe.seed)

    @cached_property
    def _proxy_scores(self) -> dict[str, Tensor]:
        self._restore({})
        return producer_scores(self.model, self.family)

    def _stats(self, run: Run, chosen: dict[str, Scheme]) -> dict[str, Stats]:
        """What the run's quantizer and correction look at, observed before anything is quantized."""
        needs = QUANTIZERS[run.recipe.quantizer]().needs
        corrected = run.correction != "none"
        if not chosen or not (needs or corrected):
            return {}
        found = self._stats_of(run, gram="gram" in needs or corrected)
        return found if needs else {}

    def _stats_of(self, run: Run, gram: bool) -> dict[str, Stats]:
        """Statistics of the float model's inputs, by layer; once per calibration text. Those with gram matrices hold all."""
        calibration = _calibration_of(run)
        for held in (True, gram):
            if (calibration, held) in self.statistics:
                return self.statistics[calibration, held]
        self._restore({})
        found = collect_stats(self.model, self.family, self._samples(calibration), gram)
        self.statistics[calibration, gram] = found
        return found

    def _samples(self, calibration: Calibration) -> Tensor:
        """Calibration ids int64 [samples, tokens]."""
        tokens = self._read(calibration.text)
        return sample(tokens, samples=calibration.samples, length=calibration.length, seed=0).ids

    def _float(self, name: str) -> Tensor:
        """A layer's float weight [out, in] in fp32, where the layer is."""
        return self.kept[name].to(weight_of(self.layers[name]).device).float()

    def _read(self, text: str) -> Tokens:
        """A source of the data room; a path is looked for beside the grid first."""
        location = text.partition("?")[0]
        beside = self.root / location
        source = str(self.root / text) if beside.exists() else text
        try:
            return read_documents(source, self.tokenizer, vocabulary_of(self.model))
        except DataError as error:
            if ":" in location or beside.exists() or Path(location).exists():
                raise
            raise DataError(
                f"{error} Below the root of the grid, {self.root}, there is none either."
            ) from error

    def _pack(
        self, name: str, scheme: Scheme, run: Run, stats: Stats | None, columns: Tensor | None
    ) -> tuple[PackedTensor, tuple[str, ...]]:
        """A layer's packed weight, and notes."""
        weight, search = self._float(name), run.recipe.search
        columns = None if columns is None else columns.to(weight.device)
        if run.recipe.quantizer != "rtn":
            made = QUANTIZERS[run.recipe.quantizer](search=search)(weight, scheme, stats, columns=columns)
            return made.packed, made.notes
        if columns is not None or search or is_fitted(scheme) or scheme.offset == "zero":
            return quantize_tensor(weight, scheme, None, search, columns), ()
        shared = replace(scheme, dtype="int", bits=8)
        if (name, shared) not in self.ranges:
            self.ranges[name, shared] = fit(weight, shared)
        grid = replace(self.ranges[name, shared], scheme=scheme, table=fixed_type(scheme).to(weight.device))
        return encode(weight, grid), ()


def _calibration_of(run: Run) -> Calibration:
    if run.calibration is None:
        raise RecipeError(f"{run}: calibration text is needed: add a [calibration] table to the grid")
    return run.calibration


def _norms(model: PreTrainedModel, family: Family) -> list[nn.Parameter]:
    """Gains and biases of the norms of all blocks: what corrections may move."""
    return [
        parameter
        for _, block in blocks(model, family)
        for norm in norms(block, family)
        for parameter in block.get_submodule(norm.name).parameters(recurse=False)
    ]


def collect_stats(model: PreTrainedModel, family: Family, ids: Tensor, gram: bool) -> dict[str, Stats]:
    """Statistics of every linear's inputs in the float model. `ids` int64 [samples, tokens]; by full name."""
    hidden = embed(model, family, ids)
    found: dict[str, Stats] = {}
    for prefix, block in blocks(model, family):
        first = {group[0]: group for group in groups(block, family)}
        sums = {name: _nothing_of(block.get_submodule(name), gram) for name in first}

        def visit(name: str, x: Tensor, sums: dict[str, Stats] = sums) -> None:
            sums[name] = add(sums[name], x)

        hidden = observe(block, hidden, list(first), visit, hidden.states)
        found |= {f"{prefix}.{name}": sums[head] for head, group in first.items() for name in group}
    return found


def _nothing_of(linear: nn.Module, gram: bool) -> Stats:
    """Empty statistics of a linear's inputs, where the linear is."""
    weight = weight_of(linear)
    return empty(weight.shape[1], gram, weight.device)


def logprobs(rows: ScoredRows) -> Tensor:
    """Log-probabilities fp32 [scored, vocabulary] of a window."""
    return torch.log_softmax(rows.logits.float(), dim=1)


def explain(error: BaseException) -> str:
    """An error on one line, with its kind when it is not one of ours."""
    text = " ".join(str(error).split())
    return text if isinstance(error, FracbitError) else f"{type(error).__name__}: {text}"


def device_name(device: str) -> str:
    """What a row says of where it was measured: `cpu x86_64, 2 threads`, the GPU's name, or `8 x` that name."""
    if device == "auto" and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    return f"{device} {platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """The versions that a figure depends on."""
    return {
        "fracbit": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def _load(
    source: Workload, root: Path, device: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, torch.dtype]:
    """The model, its tokenizer if it has one, and the type in which it is stored.

    On a CPU it runs in fp32; on GPUs in the type in which it is stored, which is what they are fast in.
    """
    beside = root / source.model
    where = (
        str(bundled_model())
        if source.model == "bundled"
        else str(beside)
        if beside.exists()
        else source.model
    )
    model = load(where, "auto", device, source.trust_remote_code, source.revision)
    stored: torch.dtype = next(parameter.dtype for parameter in model.parameters())
    return model.float() if device == "cpu" else model, tokenizer_or_none(where), stored


def _layers(model: PreTrainedModel, family: Family) -> dict[str, nn.Module]:
    """Every linear of the blocks, then the embedding table, then a head that has a weight of its own; by full name."""
    found = {
        f"{prefix}.{name}": module
        for prefix, block in blocks(model, family)
        for name, module in linears(block, family).items()
    }
    table = model.get_input_embeddings()
    found[family.embeddings[0]] = table
    head = model.get_output_embeddings()
    if head is not None and head.weight is not table.weight:
        found[family.head] = head
    return found


def _plan(model: PreTrainedModel, tokens: Tokens, evaluation: Evaluation) -> Windowing:
    window = evaluation.window or default_window(model)
    return plan_windows(tokens.documents, window=window, stride=evaluation.stride)


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 4)
