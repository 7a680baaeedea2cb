"""Tasks for the evaluation harness that need no hub: LAMBADA from a file, and choices cut from held-out text.

Each is a YAML file beside its data in the user's folder, so that `lm_eval --include_path FOLDER` runs it too.

The continuation task has a context of `context_words` words and four continuations of `choice_words` words: the
true one, and three from other places in the texts. The wrong ones have nearly the same length, because longer
texts are less likely. Chance is 0.25. All four come from one kind of text, so only the context can tell them
apart: a model that knows the language but ignores the context stays at chance.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from fracbit.errors import DataError, OutputError
from fracbit.records.files import parse_json

CHOICES = 4
POOL = 32
"""Wrong continuations drawn for an item; the three nearest to the true one in length are taken."""

_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class LocalTask:
    """A local task. path: its YAML file."""

    name: str
    path: Path


@dataclass(frozen=True)
class TaskItem:
    """One question. choices: four continuations with white space before them; answer: which is true."""

    context: str
    choices: tuple[str, ...]
    answer: int

    def to_json(self) -> dict[str, object]:
        """A line of the task's data file."""
        return {"context": self.context, "choices": list(self.choices), "answer": self.answer}


def write_lambada(source: Path, folder: Path) -> LocalTask:
    """Write the task `lambada_local` over `source`, JSON lines with a passage in "text" each.

    Raises: DataError naming the line that is not a passage of at least two words; OutputError when the folder
    cannot be written.
    """
    if not source.is_file():
        raise DataError(f"{source}: no such file; LAMBADA is JSON lines with a passage in the field text.")
    for number, line in enumerate(source.read_bytes().splitlines(), 1):
        _check_passage(line, f"{source}, line {number}")
    return _write("lambada_local", source, folder)


def write_continuation(
    texts: Sequence[str],
    folder: Path,
    *,
    items: int = 500,
    context_words: int = 60,
    choice_words: int = 12,
    seed: int = 0,
) -> LocalTask:
    """Write the task `continuation` with `items` questions cut from held-out texts.

    Raises: DataError when the texts are too short, OutputError when the folder cannot be written.
    """
    questions = continuation_items(
        texts, items=items, context_words=context_words, choice_words=choice_words, seed=seed
    )
    data = folder / "continuation.jsonl"
    _write_text(data, "".join(json.dumps(item.to_json()) + "\n" for item in questions))
    return _write("continuation", data, folder)


def continuation_items(
    texts: Sequence[str], *, items: int, context_words: int, choice_words: int, seed: int
) -> tuple[TaskItem, ...]:
    """Cut questions from texts; the seed decides which. No two have the same true continuation.

    Raises: DataError when the texts do not hold `items` separate pieces of context and continuation.
    """
    if min(items, context_words, choice_words) < 1:
        raise DataError("items, context_words and choice_words must be at least 1.")
    pieces = [piece for text in texts for piece in _pieces(text, context_words, choice_words)]
    if len(pieces) < max(items, CHOICES):
        raise DataError(
            f"the texts hold {len(pieces)} pieces of {context_words} + {choice_words} words, and "
            f"{max(items, CHOICES)} are needed: ask for fewer or shorter items, or add text."
        )
    chance = random.Random(seed)
    return tuple(_item(index, pieces, chance) for index in chance.sample(range(len(pieces)), items))


def _pieces(text: str, context_words: int, choice_words: int) -> Iterator[tuple[str, str]]:
    """Contexts with their continuations, cut from a text one after another, with their white space."""
    words = list(_WORD.finditer(text))
    step = context_words + choice_words
    for start in range(0, len(words) - step + 1, step):
        middle = words[start + context_words - 1].end()
        yield text[words[start].start() : middle], text[middle : words[start + step - 1].end()]


def _item(index: int, pieces: Sequence[tuple[str, str]], chance: random.Random) -> TaskItem:
    context, true = pieces[index]
    others: list[str] = []
    for other in chance.sample(range(len(pieces)), len(pieces)):
        if pieces[other][1] not in (true, *others):
            others.append(pieces[other][1])
        if len(others) == POOL:
            break
    if len(others) < CHOICES - 1:
        raise DataError(f"the texts hold fewer than {CHOICES} different continuations: add text.")
    nearest = sorted(others, key=lambda other: abs(len(other) - len(true)))
    choices = [true, *nearest[: CHOICES - 1]]
    chance.shuffle(choices)
    return TaskItem(context, tuple(choices), choices.index(true))


def _check_passage(line: bytes, where: str) -> None:
    text = parse_json(line, where, DataError).get("text")
    if not isinstance(text, str) or len(text.split(" ")) < 2:
        raise DataError(f"{where}: a passage of at least two words was expected in the field text.")


def _write(name: str, data: Path, folder: Path) -> LocalTask:
    template = (files("fracbit.evaluation") / "tasks" / f"{name}.yaml").read_text(encoding="utf-8")
    path = folder / f"{name}.yaml"
    # A JSON string is also a valid YAML string.
    _write_text(path, template.replace('"@FILE@"', json.dumps(str(data.resolve()))))
    return LocalTask(name, path)


def _write_text(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}.") from error
