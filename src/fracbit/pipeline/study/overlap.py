"""Finds documents that an evaluation text shares with the calibration texts of a model.

Figures on text that the quantizer has seen are too good. The manifest of a checkpoint names its calibration texts, so a
later evaluation on any text notices this.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fracbit.checkpoint.read_manifest import read_manifest
from fracbit.data import Tokens, parse_source, read_documents, shared_documents
from fracbit.errors import DataError, FormatError
from fracbit.records.files import named_path


def calibration_sources(model: str | Path) -> tuple[dict[str, Any], ...]:
    """The calibration texts in a model's manifest: `source`, `sha256`, ...; empty for a model without a manifest."""
    place = named_path(model, DataError)
    try:
        texts = read_manifest(place).get("texts", ())
        return tuple(dict(source) for text in texts for source in text.get("sources", ()))
    except (FormatError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"the record of {model} lists texts that cannot be read: {error}") from error


def overlap_notes(
    text: Tokens,
    calibration: Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None,
    vocabulary: int,
    what: str = "calibration text",
) -> tuple[str, ...]:
    """A note for every calibration source that shares documents with `text`, or that can no longer be read.

    `calibration`: entries of `calibration_sources`; without a `sha256`, the source is taken as it is now. `what`: the
    name of these texts in the notes.
    """
    notes = []
    for entry in calibration:
        name = str(entry["source"])
        try:
            if parse_source(name).format == "generated":
                continue
            seen = read_documents(name, tokenizer, vocabulary)
        except DataError as error:
            notes.append(f"{text.source} could not be compared with the {what}: {error}")
            continue
        if entry.get("sha256", seen.sha256) != seen.sha256:
            notes.append(f"{name} has changed since it was the {what}")
        shared = shared_documents(text, seen)
        if shared:
            notes.append(
                f"{shared} of {len(text.starts) - 1} documents of {text.source} are also in the {what} {name}: "
                "figures on them are too good"
            )
    return tuple(notes)
