"""Which ids may begin a self-generated text: those of the main languages of a vocabulary.

Norm tweaking (Li et al. 2023, arXiv:2309.02784, section on calibration data) restricts the random first
token of LLM-QAT's generated texts to the main languages of the training corpus. It does not say how they are
found. The rule here: an id's script is the Unicode script of its first letter (the first word of the letter's
name: LATIN, CYRILLIC, CJK, ...). Ids without a letter, special ids and pieces of a character have none. Scripts
are kept, the most frequent first, until they cover `share` of the ids that have one. If some ids of a script
begin a word (decoded after another id, they start with a space), only these are used. A script is not a
language: English and French count as one.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fracbit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAIN_SHARE = 0.75
REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class FirstIds:
    """Ids that may begin a text, ascending, and the scripts that were kept, the most frequent first."""

    ids: tuple[int, ...]
    scripts: tuple[str, ...]


def first_ids(tokenizer: PreTrainedTokenizerBase, vocabulary: int, share: float = MAIN_SHARE) -> FirstIds:
    """The ids below `vocabulary` that may begin a text. share: of the ids with a script, above 0 and at
    most 1.

    Raises: DataError when no id has a letter in it.
    """
    texts = decoded(tokenizer, vocabulary)
    scripts = {index: script for index, text in texts.items() if (script := script_of(text)) is not None}
    if not scripts:
        raise DataError(
            "no id of the vocabulary has a letter in it, so no text can be generated: name a text instead of generated."
        )
    kept = main_scripts(scripts.values(), share)
    chosen: list[int] = []
    for script in kept:
        ids = [index for index in scripts if scripts[index] == script]
        beginnings = [index for index in ids if texts[index][0] == " "]
        chosen.extend(beginnings or ids)
    return FirstIds(tuple(sorted(chosen)), kept)


def main_scripts(scripts: Iterable[str], share: float) -> tuple[str, ...]:
    """The fewest scripts, the most frequent first, that cover `share` of all."""
    counts = Counter(scripts)
    wanted = share * counts.total()
    kept: list[str] = []
    covered = 0
    for script, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        kept.append(script)
        covered += count
        if covered >= wanted:
            break
    return tuple(kept)


def script_of(text: str) -> str | None:
    """The script of the first letter, or None without a letter or with part of a character."""
    if REPLACEMENT in text:
        return None
    letter = next((character for character in text if character.isalpha()), None)
    return None if letter is None else unicodedata.name(letter, "UNNAMED").split()[0]


def decoded(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> dict[int, str]:
    """The text of every id that is not special, as it reads after another id, so that leading spaces show."""
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    front = len(tokenizer.decode(anchor))
    special = set(tokenizer.all_special_ids)
    ids = [index for index in range(min(vocabulary, len(tokenizer))) if index not in special]
    texts = tokenizer.batch_decode([[*anchor, index] for index in ids], clean_up_tokenization_spaces=False)
    return {index: text[front:] for index, text in zip(ids, texts, strict=True)}
