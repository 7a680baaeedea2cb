"""Text for scores, lenses and contests: samples [samples, tokens] of a source, read with the model's own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fracbit.checkpoint.load import tokenizer_or_none
from fracbit.data import read_documents, sample
from fracbit.pipeline.overlap import overlap_notes
from fracbit.pipeline.subject import Subject

SAMPLES = 32
LENGTH = 256


def samples_of(
    text: str, model: str, subject: Subject, samples: int = SAMPLES, length: int = LENGTH, seed: int = 0
) -> Tensor:
    """Token ids int64 [samples, length] drawn from `text` (grammar: data/source.py). Raises `DataError`, `SourceError`."""
    tokens = read_documents(text, tokenizer_or_none(model), vocabulary_of(subject))
    return sample(tokens, samples=samples, length=length, seed=seed).ids.to(subject.model.device)


def overlap_of(text: str, calibration: Sequence[str], model: str, subject: Subject) -> tuple[str, ...]:
    """Notes where `text` shares documents with `calibration` sources. Raises `DataError`, `SourceError`."""
    tokenizer, vocabulary = tokenizer_or_none(model), vocabulary_of(subject)
    tokens = read_documents(text, tokenizer, vocabulary)
    return overlap_notes(tokens, [{"source": source} for source in calibration], tokenizer, vocabulary)


def vocabulary_of(subject: Subject) -> int:
    """How many ids the model knows."""
    return int(subject.model.config.get_text_config().vocab_size)
