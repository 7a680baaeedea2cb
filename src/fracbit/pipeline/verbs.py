"""The verbs of the package that need the pipeline. They take few arguments; the rest is in `Recipe` and `Spending`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fracbit.checkpoint.export.as_exported import as_exported
from fracbit.checkpoint.export.exporter import Exported, StoredModel
from fracbit.checkpoint.export.exporter import export as write_export
from fracbit.checkpoint.export.one_file import made_in
from fracbit.checkpoint.load import load, load_tokenizer, tokenizer_or_none
from fracbit.checkpoint.output import SHARD_BYTES
from fracbit.data import ID_FORMATS, Tokens, read_documents
from fracbit.errors import DataError, OutputError, RecipeError
from fracbit.evaluation import (
    Divergence,
    Ids,
    Perplexity,
    ZeroShot,
    ask,
    cut_windows,
    default_window,
    judge,
    prepare_questions,
    tasks_of,
)
from fracbit.pipeline.improve.bought import bought
from fracbit.pipeline.plan.budget import budgeted, planned
from fracbit.pipeline.plan.needs import needs_or_why
from fracbit.pipeline.quantize.ranks import joined
from fracbit.pipeline.quantize.run import FINISHED, open_for, write_checkpoint
from fracbit.pipeline.quantize.served import served
from fracbit.pipeline.quantize.work import check_shared, check_words
from fracbit.pipeline.study.overlap import calibration_sources, overlap_notes
from fracbit.records.files import named_path
from fracbit.records.progress import Shown, showing, whole_run
from fracbit.records.recipe import Recipe
from fracbit.records.resources import Needs
from fracbit.records.run import ALLOWED, Result
from fracbit.records.scheme import Scheme
from fracbit.records.spending import Spending, check_terms
from fracbit.records.text_source import check_source


def quantize(
    model: str | Path | Recipe,
    output: str | Path,
    scheme: Scheme | str | None = None,
    *,
    spending: Spending | None = None,
    allocation: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    device: str = "cpu",
    shard_bytes: int = SHARD_BYTES,
    allow_float: float = ALLOWED,
    compare: bool = False,
    progress: Shown = "auto",
    announce: Callable[[str], None] | None = None,
) -> Result:
    """Quantize a model into the folder `output`, with the loop that its recipe needs.

    - `model`: a folder or hub id, rounded to `scheme` (a `Scheme`, or a word such as `nf4/64`); or a whole `Recipe`:
      quantizer, calibration, corrections, overrides.
    - `spending`: a budget or preset that chooses the schemes; `allocation`: a JSON file of `fracbit plan` that names them.
    - `device`: where blocks are calibrated, one at a time; `shard_bytes` bounds the memory of a data-free run.
    - `allow_float`: the share of the weights of the blocks' matrices that may stay float without a warning in the notes.
    - `compare`: look, at the end, how far the predictions are from the float model's, on `spending.held_out` or a small builtin
      text; not where that would take over a minute and over a tenth of the run.
    - `announce` is told before the run what it will take, which is measured on one of the model's blocks.
    - `resume` continues an interrupted output; a finished one is left as it is, and a note says so.

    Where `spending` names an engine, `output` is what the engine reads, one file if it ends in .gguf (llama.cpp); the
    checkpoint that it is exported from lies beside it while the run lasts, in `output`.partial.

    Of processes that torchrun started each takes a share, and all of them return the same: what one process gives.

    Raises a `FracbitError`: `SourceError`, `RecipeError`, `SchemeError`, `BudgetError`, `DataError`, `WeightError` (layer
    named), `OutputError`, `RankError`.
    """
    recipe = _recipe_of(model, scheme)
    spending = spending or Spending()
    check_terms(recipe, spending)
    check_words(recipe)
    folder = named_path(output, OutputError)
    place = made_in(folder, spending.engine, resume=resume, overwrite=overwrite)
    with joined() as ranks, showing(progress if ranks.leads else None) as show:
        opened = open_for(recipe)
        check_shared(recipe, ranks)
        said: tuple[str, ...] = ()
        if allocation is not None:
            recipe, said = planned(recipe, Path(allocation), opened)
        asked = announce is not None and ranks.leads
        divided = budgeted(recipe, spending, opened=opened, device=device, measured=asked, progress=show)
        if announce is not None and asked:
            needs = divided.needs or needs_or_why(divided.recipe, opened, device)
            announce(f"the run: {needs}")
            show = whole_run(show, needs.phases) if show is not None and isinstance(needs, Needs) else show
        result = write_checkpoint(
            divided.recipe,
            place,
            overwrite=overwrite,
            resume=resume,
            device=device,
            shard_bytes=shard_bytes,
            progress=show,
            opened=opened,
            samples=divided.samples,
            allow_float=allow_float,
            ranks=ranks,
        )
        if ranks.leads and compare and FINISHED not in result.notes:
            found = bought(divided.recipe, place, result.seconds, text=spending.held_out, show=show)
            said = (*said, *((found,) if isinstance(found, str) else found.warning()))
            result = replace(result, bought=None if isinstance(found, str) else found)
        if ranks.leads and spending.engine is not None:
            result = served(result, folder, spending.engine, overwrite=overwrite, progress=show)
        return ranks.tell(replace(result, notes=(*said, *divided.notes, *result.notes)))


run = quantize
"""Version 0.1's name of `quantize` with a recipe; removed in 0.3."""


def _recipe_of(model: str | Path | Recipe, scheme: Scheme | str | None) -> Recipe:
    if not isinstance(model, Recipe):
        # A default scheme must not look like a requested one: a budget refuses a requested scheme.
        return Recipe(model=str(model)) if scheme is None else Recipe(model=str(model), scheme=scheme)
    if scheme is not None:
        raise RecipeError("a recipe names its scheme: leave the argument `scheme` out, or change the recipe")
    return model


def export(
    checkpoint: str | Path,
    output: str | Path,
    format: str,  # noqa: A002
    *,
    requantize: bool = False,
    held_out: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    trust_remote_code: bool = False,
    progress: Shown = "auto",
) -> Exported:
    """Write a fracbit checkpoint (a folder or hub id) into the folder, or the .gguf file, `output` in another format.

    `format` is a name of `FORMATS`, with a parameter after a colon if the format has one: `float`, `float:fp32`. Nothing is
    rounded, unless `requantize` allows it: then layers that the format cannot hold get the nearest scheme that it can.
    `held_out`: a text, as for `evaluate`, on which the divergence of their predictions from the checkpoint's is measured.
    Raises `RecipeError` for an unknown format, `FormatError` for a layer that it cannot hold, `SourceError`, `OutputError`,
    `DataError`.
    """
    if held_out is not None and not requantize:
        raise RecipeError(
            "held_out (--held-out) measures what rounding again costs, and nothing is rounded without requantize "
            "(--requantize); add that, or leave the text out"
        )
    measure = None
    if held_out is not None:
        check_source(str(held_out))
        measure = partial(_cost, text=str(held_out), trust_remote_code=trust_remote_code)
    return write_export(
        checkpoint,
        output,
        format,
        requantize=requantize,
        measure=measure,
        overwrite=overwrite,
        resume=resume,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )


def _cost(stored: StoredModel, text: str, trust_remote_code: bool) -> dict[str, Any]:
    """How far predictions of what is exported are from the checkpoint's, and on what; the same in every run."""
    with as_exported(stored, trust_remote_code) as model:
        reference = load(stored.source.folder, "float32", trust_remote_code=trust_remote_code)
        found = evaluate(model, text, against=reference, trust_remote_code=trust_remote_code, progress=None)
    assert found.divergence is not None
    measured = found.divergence.to_json()
    del measured["seconds"]
    return {"text": text, "text_sha256": found.text_sha256, **measured, "notes": list(found.notes)}


@dataclass(frozen=True)
class Evaluated:
    """Results of a model on a text (`loss`, `divergence`) and on tasks (`zero_shot`); None for what was not measured.

    `notes`: what the user should know, such as documents that the model was calibrated on. `print(found)` shows it all.
    """

    model: str
    loss: Perplexity | None = None
    divergence: Divergence | None = None
    zero_shot: ZeroShot | None = None
    text: str | None = None
    text_sha256: str = ""
    against: str | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The figures and the notes, a line each."""
        return "\n".join([*self.figures, *(f"note: {note}" for note in self.notes)])

    @property
    def figures(self) -> tuple[str, ...]:
        """What was measured, as lines: perplexity and its protocol, divergence, accuracies."""
        lines: list[str] = []
        if self.loss is not None:
            nats, speed = f"{self.loss.nll:.5f} nats per token", f"{self.loss.tokens_per_second:.0f} tokens/s"
            lines += [
                f"perplexity {self.loss.perplexity:.4f} ({nats}), {speed}",
                f"protocol: {self.loss.protocol}",
            ]
        if self.divergence is not None:
            lines.append(f"from {self.against}: {self.divergence}")
        if self.zero_shot is not None:
            lines += [f"{score}: {_accuracies(score.metrics)}" for score in self.zero_shot.scores]
            mean = self.zero_shot.paper_mean
            lines += [] if mean is None else [f"mean of the four: {mean:.4f}"]
        return tuple(lines)

    @property
    def perplexity(self) -> float:
        """exp(nll); infinite where that overflows. Raises `DataError` when no text was evaluated."""
        return self._loss.perplexity

    @property
    def nll(self) -> float:
        """Nats per scored token. Raises `DataError` when no text was evaluated."""
        return self._loss.nll

    @property
    def _loss(self) -> Perplexity:
        if self.loss is None:
            raise DataError("only tasks were evaluated, so there is no perplexity; name a text too")
        return self.loss

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        figures: dict[str, Any] = {"model": self.model, "notes": list(self.notes)}
        if self.loss is not None:
            figures |= {"text": self.text, "text_sha256": self.text_sha256, **self.loss.to_json()}
        if self.divergence is not None:
            figures["divergence"] = {"against": self.against, **self.divergence.to_json()}
        return figures | ({} if self.zero_shot is None else {"zero_shot": self.zero_shot.to_json()})


def _accuracies(metrics: Mapping[str, float]) -> str:
    return ", ".join(
        f"{name} {value:.4f}" + (f" ± {metrics[name + '_stderr']:.4f}" if f"{name}_stderr" in metrics else "")
        for name, value in metrics.items()
        if not name.endswith("_stderr")
    )


def evaluate(
    model: PreTrainedModel | str | Path,
    text: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    against: PreTrainedModel | str | Path | None = None,
    window: int | None = None,
    stride: int | None = None,
    bos: int | None = None,
    batch: int = 8,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Shown = "auto",
) -> Evaluated:
    """Evaluate a loaded model, a folder or a hub id on a text, on zero-shot tasks, or both.

    - `text`: a source such as `file.txt` or `ids.u16?length=512`. A single document is one stream; several documents
      get windows of their own. `window`, `stride`, `bos`, `batch`: see `fracbit.evaluation.cut_windows` and `judge`.
    - `against`: the float model, for the divergence from its predictions.
    - `tasks`: names of lm-eval or files of local tasks; the first `limit` questions of each.
    - `dtype`, `device`, `trust_remote_code`: how to load models that are not loaded yet.

    Raises `SourceError`, `DataError`, `WeightError`.
    """
    if text is None and (not tasks or against is not None):
        raise DataError("nothing to measure: give a text for perplexity, tasks for accuracy, or both")
    source = None if text is None else check_source(str(text))
    questions = prepare_questions(tasks_of(tasks)) if tasks else None
    how = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    loaded = _loaded(model, how)
    name = str(loaded.name_or_path)
    if tokenizer is None:
        alone = not tasks and source is not None and source.format in ID_FORMATS
        tokenizer = (tokenizer_or_none if alone else load_tokenizer)(name, trust_remote_code)
    found = Evaluated(name)
    if text is not None:
        reference = None if against is None else _loaded(against, how)
        tokens = read_text(text, tokenizer, loaded)
        vocabulary = loaded.config.get_text_config().vocab_size
        if bos is not None and not 0 <= bos < vocabulary:
            raise DataError(f"bos {bos} is not an id of this model: its vocabulary is 0..{vocabulary - 1}")
        windows = cut_windows(ids_of(tokens), window=window or default_window(loaded), stride=stride, bos=bos)
        with showing(progress) as show:
            judged = judge(loaded, windows, batch=batch, reference=reference, progress=show)
        shared = overlap_notes(tokens, calibration_sources(name), tokenizer, vocabulary)
        found = replace(
            found,
            loss=judged.perplexity,
            divergence=judged.divergence,
            text=str(text),
            text_sha256=tokens.sha256,
            against=None if reference is None else str(reference.name_or_path),
            notes=(*tokens.notes, *shared),
        )
    if questions is not None and tokenizer is not None:
        asked = ask(loaded, tokenizer, questions, limit=limit, batch=batch, quiet=True)
        found = replace(found, zero_shot=asked)
    return found


def _loaded(model: PreTrainedModel | str | Path, how: dict[str, Any]) -> PreTrainedModel:
    return model if isinstance(model, PreTrainedModel) else load(model, **how)


def read_text(text: str | Path, tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel) -> Tokens:
    """Read an evaluation text for a model. Raises `DataError`, also for text that the model would write itself."""
    return read_documents(check_source(str(text)), tokenizer, model.config.get_text_config().vocab_size)


def ids_of(tokens: Tokens) -> Ids:
    """One stream for a single document, else the documents, each windowed on its own."""
    documents = tokens.documents
    return documents[0] if len(documents) == 1 else documents
