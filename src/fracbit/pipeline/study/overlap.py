"""Whether a model is judged on what it was calibrated with: documents that an evaluation text shares with calibration texts.

A figure on text that the quantizer has seen flatters it. The manifest of a checkpoint names its calibration texts, so that this
is noticed long after the run, on whatever text is evaluated.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fracbit.checkpoint.output import MANIFEST
from fracbit.data import Tokens, parse_source, read_documents, shared_documents
from fracbit.errors import DataError


def calibration_sources(model: str | Path) -> tuple[dict[str, Any], ...]:
    """What the manifest beside a model says of its calibration texts: `source`, `sha256`, ...; nothing for other models."""
    path = Path(model).expanduser() / MANIFEST
    if not path.is_file():
        return ()
    try:
        texts = json.loads(path.read_text(encoding="utf-8")).get("texts", ())
        return tuple(source for text in texts for source in text.get("sources", ()))
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def overlap_notes(
    text: Tokens,
    calibration: Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None,
    vocabulary: int,
    what: str = "calibration text",
) -> tuple[str, ...]:
    """A note for every calibration source that shares documents with `text`, or that cannot be looked at any more.

    `calibration`: as `calibration_sources` gives them; without `sha256` the source is taken as it is now. `what`: how the
    notes call it.
    """
    notes = []
    for entry in calibration:
        name = str(entry["source"])
        try:
            if parse_source(name).format == "generated":
                continue
            seen = read_documents(name, tokenizer, vocabulary)
        except DataError as error:
            notes.append(f"whether {text.source} shares documents with the {what} is not known: {error}")
            continue
        if entry.get("sha256", seen.sha256) != seen.sha256:
            notes.append(f"{name} is no longer the file that was the {what}")
        shared = shared_documents(text, seen)
        if shared:
            notes.append(
                f"{shared} of {len(text.starts) - 1} documents of {text.source} stand in the {what} {name}: "
                "figures on them flatter the model"
            )
    return tuple(notes)
