"""The functions behind `fracbit.quantize` and `fracbit.evaluation`: few arguments, everything else in a recipe."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fracbit.checkpoint.load import load, load_tokenizer
from fracbit.data import Tokens, read_documents
from fracbit.errors import DataError
from fracbit.evaluation import Ids, Perplexity, perplexity
from fracbit.evaluation.logits import Progress
from fracbit.pipeline.quantize.stream import Result, run
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import Scheme


def quantize(
    model: str | Path, output: str | Path, scheme: Scheme | None = None, overwrite: bool = False
) -> Result:
    """Round `model` (folder or hub id) to `scheme` into the folder `output`; `fracbit.run` takes a whole recipe.

    Raises a `FracbitError`, as `run` does.
    """
    return run(Recipe(model=str(model), scheme=scheme or Scheme()), output, overwrite=overwrite)


def evaluate(
    model: PreTrainedModel | str | Path,
    text: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    window: int | None = None,
    stride: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a loaded model, a folder or a hub id on `text`, a source such as `file.txt` or `ids.u16?length=512`.

    A text is one stream; documents of an id file with `length` are windowed each on its own.
    Raises `SourceError`, `DataError`, `WeightError`.
    """
    loaded = model if isinstance(model, PreTrainedModel) else load(model)
    if tokenizer is None:
        tokenizer = load_tokenizer(str(loaded.name_or_path))
    tokens = read_text(text, tokenizer, loaded)
    return perplexity(loaded, ids_of(tokens), window=window, stride=stride, progress=progress)


def read_text(text: str | Path, tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel) -> Tokens:
    """Read an evaluation text for a model. Raises `DataError`."""
    if str(text).startswith("generated"):
        raise DataError("generated text is for calibration; evaluate on text that the model did not write")
    return read_documents(str(text), tokenizer, model.config.get_text_config().vocab_size)


def ids_of(tokens: Tokens) -> Ids:
    """One stream for a single document, else the documents, each windowed on its own."""
    documents = tokens.documents
    return documents[0] if len(documents) == 1 else documents
