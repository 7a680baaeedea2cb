"""Texts for scores, lenses and contests, read as one model reads them: with its own tokenizer, within its vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fracbit.checkpoint.load import tokenizer_or_none
from fracbit.checkpoint.opened import Opened
from fracbit.data import Samples, Tokens, read_calibration, read_documents
from fracbit.pipeline.study.overlap import overlap_notes
from fracbit.records.progress import Progress

SAMPLES = 32
LENGTH = 256
SCORED = "text that the score saw"


@dataclass(frozen=True, eq=False)
class TextReader:
    """How a model reads text: its tokenizer, None where it has none (files of ids need none), and how many ids it knows."""

    tokenizer: PreTrainedTokenizerBase | None
    vocabulary: int

    def documents(self, text: str) -> Tokens:
        """All of a text (grammar: data/text_source.py). Raises `DataError`."""
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

        `what`: how the notes call the others. Raises `DataError`.
        """
        entries = [dict(other) for other in others]
        if not entries:
            return ()
        return overlap_notes(self.documents(text), entries, self.tokenizer, self.vocabulary, what=what)


def reader_of(opened: Opened) -> TextReader:
    """The reader of an opened checkpoint. Raises `SourceError` when its tokenizer is broken."""
    tokenizer = tokenizer_or_none(opened.source.folder, opened.trust_remote_code)
    return TextReader(tokenizer, int(opened.model.config.get_text_config().vocab_size))


def seen_by(samples: Samples) -> dict[str, Any] | list[dict[str, Any]]:
    """What a score's protocol says of its text, or of each of its texts: `source` and `sha256`."""
    entries = [{"source": each["source"], "sha256": each["sha256"]} for each in samples.sources]
    return entries[0] if len(entries) == 1 else entries


def texts_of(protocol: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The texts that a score's protocol names; none for a score that read nothing, or a file from elsewhere."""
    found = protocol.get("text")
    entries = found if isinstance(found, list) else [found]
    return [entry for entry in entries if isinstance(entry, Mapping) and "source" in entry]
