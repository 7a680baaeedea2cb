"""From the sources of a recipe to the samples that a method sees: read, generate, mix, draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fracbit.data.read import read_documents
from fracbit.data.self_text import generate_calibration
from fracbit.data.tokens import Opening, Samples, Tokens, sample, split_samples
from fracbit.errors import DataError
from fracbit.records.progress import Progress
from fracbit.records.text_source import TextSource, divided, parse_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def read_calibration(
    sources: Sequence[str | TextSource],
    tokenizer: PreTrainedTokenizerBase | None,
    vocabulary: int,
    *,
    samples: int,
    length: int,
    seed: int,
    bos: Opening = "stored",
    model: Callable[[], PreTrainedModel] | None = None,
    progress: Progress | None = None,
) -> Samples:
    """Draw calibration samples from a mixture of sources (grammar: records/text_source.py) by their weights.

    model: makes the float model, called only when a source is "generated". progress: of generating. The
    rest is as in read_documents and sample.

    Raises: DataError for every fault of a source, for too few ids, and for "generated" without model or
    tokenizer.
    """
    parsed = [
        part
        for source in sources
        for part in divided(parse_source(source) if isinstance(source, str) else source)
    ]
    shares = split_samples(samples, [source.weight for source in parsed])
    parts: list[Tokens] = []
    for source, share in zip(parsed, shares, strict=True):
        if source.format != "generated":
            parts.append(read_documents(source, tokenizer, vocabulary))
        else:
            written = _generate(
                source, tokenizer, model, samples=max(share, 1), length=length, seed=seed, progress=progress
            )
            parts.append(written)
    return sample(parts, samples=samples, length=length, seed=seed, bos=bos)


def _generate(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase | None,
    model: Callable[[], PreTrainedModel] | None,
    *,
    samples: int,
    length: int,
    seed: int,
    progress: Progress | None,
) -> Tokens:
    if tokenizer is None or model is None:
        raise DataError("generated text needs the float model and its tokenizer: name a text or ids instead.")
    tokens = generate_calibration(
        model(), tokenizer, samples=samples, length=length, seed=seed, progress=progress
    )
    return replace(tokens, source=str(source), weight=source.weight)
