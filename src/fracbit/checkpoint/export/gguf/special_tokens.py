"""Whether a tokenizer puts special tokens around a text, as its post-processor says, and how it changes letters before.

The package `gguf` reads the ids of special tokens, merges and chat templates. Its releases lag behind llama.cpp in the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fracbit.checkpoint.export.gguf.vocabulary import settings_in


def added_tokens(folder: Path) -> dict[str, bool]:
    """Whether `bos` and `eos` are put around a text, as far as the post-processor of tokenizer.json says."""
    settings = settings_in(folder / "tokenizer_config.json")
    processor = settings_in(folder / "tokenizer.json").get("post_processor") or {}
    starts = [settings[name] for name in ("bos_token", "cls_token") if settings.get(name)]
    found: dict[str, bool] = {}
    for step in processor.get("processors", [processor]):
        if step.get("type") == "ByteLevel":
            found = {"bos": False, "eos": False} | found
        elif step.get("type") == "TemplateProcessing" and len(step.get("single", [])) > 1:
            first, last = (step["single"][place].get("SpecialToken", {}).get("id") for place in (0, -1))
            found |= {"bos": first in starts or not starts} if first else {}
            found |= {"eos": True} if last else {}
    return found


def letters(folder: Path) -> dict[str, bool]:
    """What the normalizer of tokenizer.json does to letters, by the name that a file has for it."""
    return dict(_changes(settings_in(folder / "tokenizer.json").get("normalizer") or {}))


def _changes(normalizer: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    kind = normalizer.get("type")
    if kind == "Lowercase":
        yield "lowercase", True
    elif kind == "StripAccents":
        yield "strip_accents", True
    elif kind == "BertNormalizer":
        yield from ((name, normalizer[name]) for name in ("lowercase", "strip_accents") if name in normalizer)
    for step in normalizer.get("normalizers", []):
        yield from _changes(step)
