"""Text for scores, lenses and contests: samples [samples, tokens] of a source, read with the model's own tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fracbit.checkpoint.load import tokenizer_or_none
from fracbit.data import read_documents, sample
from fracbit.pipeline.study.float_model import FloatModel
from fracbit.pipeline.study.overlap import overlap_notes

SAMPLES = 32
LENGTH = 256


def samples_of(
    text: str, model: str, subject: FloatModel, samples: int = SAMPLES, length: int = LENGTH, seed: int = 0
) -> Tensor:
    """Token ids int64 [samples, length] drawn from `text` (grammar: data/text_source.py). Raises `DataError`, `SourceError`."""
    return known_samples_of(text, model, subject, samples, length, seed)[0]


def known_samples_of(
    text: str, model: str, subject: FloatModel, samples: int = SAMPLES, length: int = LENGTH, seed: int = 0
) -> tuple[Tensor, dict[str, str]]:
    """As `samples_of`, and what a score's protocol says of the text: `source` and `sha256`."""
    tokens = read_documents(text, tokenizer_or_none(model), vocabulary_of(subject))
    ids = sample(tokens, samples=samples, length=length, seed=seed).ids.to(subject.model.device)
    return ids, {"source": tokens.source, "sha256": tokens.sha256}


def seen_notes(text: str, seen: object, model: str, subject: FloatModel) -> tuple[str, ...]:
    """Notes where the held-out `text` shares documents with the text that a score saw (`text` of its protocol).

    Raises `DataError`, `SourceError`.
    """
    if (
        not isinstance(seen, Mapping) or "source" not in seen
    ):  # a score that read nothing, or a file from elsewhere
        return ()
    tokenizer, vocabulary = tokenizer_or_none(model), vocabulary_of(subject)
    return overlap_notes(
        read_documents(text, tokenizer, vocabulary),
        [dict(seen)],
        tokenizer,
        vocabulary,
        "text that the score saw",
    )


def overlap_of(text: str, calibration: Sequence[str], model: str, subject: FloatModel) -> tuple[str, ...]:
    """Notes where `text` shares documents with `calibration` sources. Raises `DataError`, `SourceError`."""
    tokenizer, vocabulary = tokenizer_or_none(model), vocabulary_of(subject)
    tokens = read_documents(text, tokenizer, vocabulary)
    return overlap_notes(tokens, [{"source": source} for source in calibration], tokenizer, vocabulary)


def vocabulary_of(subject: FloatModel) -> int:
    """How many ids the model knows."""
    return int(subject.model.config.get_text_config().vocab_size)
