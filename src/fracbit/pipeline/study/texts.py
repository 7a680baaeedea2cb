"""Texts for scores, lenses and contests, read as one model reads them: with its own tokenizer, within its vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fracbit.checkpoint.load import load_opened, load_tokenizer, tokenizer_or_none
from fracbit.checkpoint.opened import Opened
from fracbit.data import ID_FORMATS, Samples, Tokens, parse_source, read_calibration, read_documents
from fracbit.errors import DataError
from fracbit.pipeline.study.overlap import overlap_notes
from fracbit.records.calibration import Calibration
from fracbit.records.progress import Progress
from fracbit.records.recipe import Recipe
from fracbit.records.spending import LENGTH, SAMPLES

SCORED = "text that the score saw"
WITHOUT = "no built-in text among the samples: the model has no tokenizer for it"


@dataclass(frozen=True, eq=False)
class TextReader:
    """How a model reads text: its tokenizer (None if it has none; files of ids need none) and its number of ids."""

    tokenizer: PreTrainedTokenizerBase | None
    vocabulary: int

    def documents(self, text: str) -> Tokens:
        """All of a text (grammar: records/text_source.py). Raises `DataError`."""
        return read_documents(text, self.tokenizer, self.vocabulary)

    def samples(
        self,
        texts: str | Sequence[str],
        *,
        samples: int = SAMPLES,
        length: int = LENGTH,
        seed: int = 0,
        model: Callable[[], PreTrainedModel] | None = None,
        progress: Progress | None = None,
    ) -> Samples:
        """Samples drawn from one text or a mixture. `model` writes text where `generated` is asked for. Raises `DataError`."""
        return read_calibration(
            [texts] if isinstance(texts, str) else texts,
            self.tokenizer,
            self.vocabulary,
            samples=samples,
            length=length,
            seed=seed,
            model=model,
            progress=progress,
        )

    def overlap(self, text: str, others: Iterable[Mapping[str, Any]], what: str) -> tuple[str, ...]:
        """Notes where `text` shares documents with `others`, which have a `source` each and may have a `sha256`.

        `what`: the name of the others in the notes. Raises `DataError`.
        """
        entries = [dict(other) for other in others]
        if not entries:
            return ()
        return overlap_notes(self.documents(text), entries, self.tokenizer, self.vocabulary, what=what)


def reader_of(opened: Opened) -> TextReader:
    """The reader of an opened checkpoint. Raises `SourceError` when its tokenizer is broken."""
    tokenizer = tokenizer_or_none(opened.source.folder, opened.trust_remote_code)
    return TextReader(tokenizer, _vocabulary(opened))


def calibration_samples(
    recipe: Recipe, opened: Opened, model: Callable[[], PreTrainedModel], progress: Progress | None = None
) -> Samples:
    """The samples of a recipe's calibration, which a run and a score before it both read. `model` writes `generated` text.

    Raises `DataError`, `SourceError` when text needs a tokenizer and there is none.
    """
    calibration = recipe.calibration
    assert calibration is not None
    texts, length = calibration.texts, sample_length(calibration, opened)
    alone = all(parse_source(text).format in ID_FORMATS for text in texts)
    read = tokenizer_or_none if alone else load_tokenizer
    needed = calibration.builtin or not alone
    tokenizer = read(opened.source.folder, opened.trust_remote_code) if needed else None
    mixed = bool(calibration.builtin) and tokenizer is not None
    found = TextReader(tokenizer, _vocabulary(opened)).samples(
        (*texts, _beside(texts, calibration.builtin)) if mixed else texts,
        samples=calibration.samples,
        length=length,
        seed=recipe.seed,
        model=model,
        progress=progress,
    )
    left_out = calibration.builtin and not mixed
    return replace(found, notes=(*found.notes, WITHOUT)) if left_out else found


def _beside(texts: Sequence[str], share: float) -> str:
    """The built-in text as a source that gets a `share` of the samples, the rest going to `texts`."""
    return f"builtin@{share / (1 - share) * sum(parse_source(text).weight for text in texts)}"


def writer_of(opened: Opened, device: str | torch.device) -> PreTrainedModel:
    """The model that writes `generated` text: as it is stored, on `device`. Raises `SourceError`."""
    return load_opened(opened, "auto", device)


def sample_length(calibration: Calibration, opened: Opened) -> int:
    """Ids of a sample: as many as asked for, by default no more than the model has positions. Raises `DataError`."""
    limit = getattr(opened.model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or limit <= 0 or calibration.length <= limit:  # XLNet's -1: any length
        return calibration.length
    if "length" in calibration.model_fields_set:
        raise DataError(
            f"samples of {calibration.length} ids are longer than the {limit} positions of {opened.source.name}; "
            f"ask for at most {limit} (calibration.length)"
        )
    return int(limit)


def _vocabulary(opened: Opened) -> int:
    return int(opened.model.config.get_text_config().vocab_size)


def seen_by(samples: Samples) -> dict[str, Any] | list[dict[str, Any]]:
    """The entry of a score's protocol for its text, or one for each of its texts: `source` and `sha256`."""
    entries = [{"source": each["source"], "sha256": each["sha256"]} for each in samples.sources]
    return entries[0] if len(entries) == 1 else entries


def texts_of(protocol: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The texts that a score's protocol names; none for a score that read nothing, or a file from elsewhere."""
    found = protocol.get("text")
    entries = found if isinstance(found, list) else [found]
    return [entry for entry in entries if isinstance(entry, Mapping) and "source" in entry]
