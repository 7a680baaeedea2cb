"""Reading any kind of source: from its string to token ids.

To add a format: a reader in a file of its own, an extension in records/text_source.py, and a line in READERS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fracbit.data.arrow import read_dataset, read_parquet
from fracbit.data.builtin import as_taken, read_builtin
from fracbit.data.bundled import read_bundled
from fracbit.data.encode import encode_texts
from fracbit.data.ids import read_ids
from fracbit.data.lines import read_jsonl
from fracbit.data.raw import RawIds, RawTexts
from fracbit.data.text import read_text
from fracbit.data.tokens import Tokens, join_documents
from fracbit.errors import DataError
from fracbit.records.text_source import Format, TextSource, parse_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

READERS: Mapping[Format, Callable[[TextSource], RawTexts | RawIds]] = {
    "text": read_text,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "u16": read_ids,
    "u32": read_ids,
    "npy": read_ids,
    "datasets": read_dataset,
    "bundled": read_bundled,
    "builtin": read_builtin,
}


def read_documents(
    source: str | TextSource, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int
) -> Tokens:
    """Read one source (grammar: records/text_source.py) into token ids.

    tokenizer: of the model; not needed for files of ids. vocabulary: how many ids the model knows.

    Raises: DataError for every fault of the source, naming the place in it.
    """
    source = parse_source(source) if isinstance(source, str) else source
    if source.format == "generated":
        raise DataError(
            "generated: the model's own text is written by generate_calibration and cannot be read."
        )
    raw = READERS[source.format](source)
    if source.format == "builtin" and isinstance(raw, RawTexts) and tokenizer is not None:
        raw = as_taken(raw, tokenizer)
    documents = [document[: source.keep] for document in _documents(raw, source, tokenizer)]  # each [ids]
    _check(documents, source, vocabulary)
    ids, starts = join_documents(documents)  # [count], [documents + 1]
    return Tokens(
        ids,
        starts,
        source=str(source),
        sha256=raw.sha256,
        bos=_common_bos(documents, tokenizer),
        weight=source.weight,
        notes=_notes(raw, source),
        endless=source.format == "builtin",
    )


def read_sources(
    sources: Sequence[str | TextSource], tokenizer: PreTrainedTokenizerBase | None, vocabulary: int
) -> tuple[Tokens, ...]:
    """Read the parts of a mixture. Raises: DataError."""
    return tuple(read_documents(source, tokenizer, vocabulary) for source in sources)


def _documents(
    raw: RawTexts | RawIds, source: TextSource, tokenizer: PreTrainedTokenizerBase | None
) -> list[np.ndarray]:
    if isinstance(raw, RawIds):
        return list(raw.documents)
    if tokenizer is None:
        raise DataError(f"{source} is text, and the model has no tokenizer: use a file of ids.")
    return encode_texts(raw, source, tokenizer)


def _notes(raw: RawTexts | RawIds, source: TextSource) -> tuple[str, ...]:
    if not isinstance(raw, RawTexts):
        return ()
    notes = [f"{source}: {raw.skipped} empty documents left out"] if raw.skipped else []
    parts = ", ".join(f"{count} of type {kind}" for kind, count in raw.left.items())
    if parts:
        notes.append(f"{source}: parts of messages that are no text were left out: {parts}")
    return (*notes, *(f"{source}: {note}" for note in raw.notes))


def _check(documents: Sequence[np.ndarray], source: TextSource, vocabulary: int) -> None:
    if not documents:
        raise DataError(f"{source} holds no documents.")
    for number, document in enumerate(documents):
        outside = np.flatnonzero((document < 0) | (document >= vocabulary))
        if len(outside):
            raise DataError(
                f"{source}: id {document[outside[0]]} at position {outside[0]} of document "
                f"{number} is outside the vocabulary 0..{vocabulary - 1}: the file was made with another "
                "tokenizer, or has another format."
            )


def _common_bos(documents: Sequence[np.ndarray], tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """The tokenizer's BOS, when every document opens with it."""
    bos = None if tokenizer is None else tokenizer.bos_token_id
    return bos if bos is not None and all(document[0] == bos for document in documents) else None
