"""Where text comes from, in one string: the grammar of calibration and evaluation sources.

    source   = location [ "?" option { "&" option } ] [ "@" weight ]
    location = FILE                                     its extension is its format
             | FOLDER                                   a data set that datasets' save_to_disk wrote
             | "datasets:" NAME [ ":" [CONFIG] [ ":" SPLIT ] ]          a data set on the hub, or such a folder
             | "bundled" [ ":" ( "held-out" | "train" ) ]               text of the bundled model
             | "builtin" [ ":" PART ]                   text that comes with fracbit: chats, code, prose, languages;
                                                        held-out, to judge by
             | "generated"                              written by the float model (data/self_text.py)
    weight   = a number above 0                         share of the samples in a mixture (default 1)

    option             values                           meaning (default first)
    documents          one, line, paragraph             of a text: what is a document
                       each, one                        of records: each is one, or all joined by blank lines
                       one, each                        of the bundled text: all, or each module
    length             N                                of ids: cut into documents of N ids (default: one)
    field              NAME                             of records (default text, messages, conversations)
    bos                auto, always, never              of texts; auto: as the tokenizer does by itself
    empty              error, skip                      what an empty document or record is
    first              N                                only the first N documents (or joined records)
    keep               N                                only the first N ids of each document
    format             text, jsonl, parquet,            instead of the file's extension
                       u16, u32, npy

For example: notes.txt, chats.jsonl?field=messages@0.3, ids.u16?length=512&first=60&keep=256,
datasets:wikitext:wikitext-2-raw-v1:test?documents=one. A string that names an existing file exactly is that
file, so that "?" and "@" stay usable in file names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from fracbit.errors import DataError, near_matches
from fracbit.records.extras import check_extra
from fracbit.records.files import named_path

TextKind = Literal["file", "datasets", "bundled", "builtin", "generated"]
Format = Literal[
    "text", "jsonl", "parquet", "u16", "u32", "npy", "datasets", "bundled", "builtin", "generated"
]
ID_FORMATS = ("u16", "u32", "npy")
"""Formats of files that hold token ids; they need no tokenizer."""
BUILTIN: Mapping[str, float] = {"chats": 0.5, "code": 0.2, "prose": 0.15, "languages": 0.15}
"""Parts of the text that comes with fracbit, and how samples are shared between them."""
HELD_OUT = "held-out"
"""One more part, of which samples of the whole are never drawn: to judge by."""
Division = Literal["one", "each", "line", "paragraph"]
Bos = Literal["auto", "always", "never"]
Empty = Literal["error", "skip"]

EXTENSIONS: Mapping[str, Format] = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".u16": "u16",
    ".u32": "u32",
    ".npy": "npy",
}

GIVE = (
    "give --calibration FILE, or builtin (text that comes with fracbit), or generated (the model writes it)"
)
"""What a message says where a text is missing."""

FILE_FORMATS: tuple[str, ...] = tuple(dict.fromkeys(EXTENSIONS.values()))

PACKAGES: Mapping[str, str] = {"parquet": "pyarrow", "datasets": "datasets"}
"""Formats that are read by a package of the extra `datasets`."""

_EVERYWHERE = frozenset({"first", "keep", "empty"})
_RECORDS = _EVERYWHERE | {"bos", "field", "documents"}
OPTIONS: Mapping[Format, frozenset[str]] = {
    "text": _EVERYWHERE | {"format", "bos", "documents"},
    "jsonl": _RECORDS | {"format"},
    "parquet": _RECORDS | {"format"},
    "u16": _EVERYWHERE | {"format", "length"},
    "u32": _EVERYWHERE | {"format", "length"},
    "npy": _EVERYWHERE | {"format", "length"},
    "datasets": _RECORDS,
    "bundled": _EVERYWHERE | {"bos", "documents"},
    "builtin": _EVERYWHERE | {"bos"},
    "generated": frozenset(),
}

DIVISIONS: Mapping[Format, tuple[Division, ...]] = {
    "text": ("one", "line", "paragraph"),
    "jsonl": ("each", "one"),
    "parquet": ("each", "one"),
    "datasets": ("each", "one"),
    "bundled": ("one", "each"),
    "builtin": ("each",),
}
"""What `documents=` may be for each format; the first is the default."""


@dataclass(frozen=True)
class TextSource:
    """A parsed source (grammar above). text: as it was written. length, first, keep: above 0."""

    text: str
    format: Format
    location: str
    config: str | None = None
    split: str | None = None
    field: str | None = None
    documents: Division = "one"
    length: int | None = None
    bos: Bos = "auto"
    empty: Empty = "error"
    first: int | None = None
    keep: int | None = None
    weight: float = 1.0

    def __str__(self) -> str:
        return self.text


def _is_file(text: str) -> bool:
    """Whether the whole text names a file; with its options it may be longer than a name can be."""
    with suppress(DataError):
        return named_path(text, DataError).is_file()
    return False


def parse_source(text: str) -> TextSource:
    """Parse one source string; files are not opened, but the exact name of a file wins over the grammar.

    Raises: DataError with what is allowed for an unknown extension, option or value.
    """
    if not text.strip():
        raise DataError("an empty source: write a path, datasets:NAME, bundled, builtin or generated.")
    if _is_file(text):
        return _source(text, text, {}, 1.0)
    rest, weight = _split_weight(text)
    location, _, options = rest.partition("?")
    return _source(text, location, _split_options(text, options), weight)


def check_source(text: str, written: bool = False) -> TextSource:
    """A parsed source whose file, if it names one, exists; nothing is read. `written`: whether the model may write it.

    Raises: DataError as parse_source, for a missing file or package, and for text that the model would write where it may not.
    """
    source = parse_source(text)
    if source.format in FILE_FORMATS:
        find_file(source)
    if source.format in PACKAGES:
        check_extra(f"{text}: this source", PACKAGES[source.format], "datasets", DataError)
    if source.format == "generated" and not written:
        raise DataError(
            f"{text}: generated text is for calibration and for scores, and this text measures losses; name one that "
            "the model did not write, such as a file or bundled:held-out."
        )
    return source


def divided(source: TextSource) -> tuple[TextSource, ...]:
    """What samples are drawn from: the parts of the whole built-in text, by their shares; any other source as it is."""
    if source.format != "builtin" or source.split is not None:
        return (source,)
    return tuple(
        replace(source, text=f"builtin:{part}", split=part, weight=share * source.weight)
        for part, share in BUILTIN.items()
    )


def find_file(source: TextSource) -> Path:
    """The file of a source. Raises: DataError when there is none."""
    path = named_path(source.location, DataError)
    if not path.exists():
        raise DataError(f"{source.location}: no such file (in the folder {Path.cwd()}).")
    if not path.is_file():
        raise DataError(f"{source.location} is not a file.")
    return path


def _split_weight(text: str) -> tuple[str, float]:
    """The weight is a number after the last "@"; any other "@" belongs to the name."""
    head, at, tail = text.rpartition("@")
    try:
        weight = float(tail) if at else 1.0
    except ValueError:
        return text, 1.0
    if not (weight > 0 and math.isfinite(weight)):
        raise DataError(f"{text}: the weight {tail} must be a finite number above 0.")
    return (head, weight) if at else (text, 1.0)


def _split_options(text: str, options: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for option in filter(None, options.split("&")):
        name, equals, value = option.partition("=")
        if not equals or not value:
            raise DataError(f"{text}: the option {option!r} has no value: write {name}=VALUE.")
        if name in pairs:
            raise DataError(f"{text}: the option {name} is given twice.")
        pairs[name] = value
    return pairs


def _source(text: str, location: str, options: dict[str, str], weight: float) -> TextSource:
    kind, name, config, split = _locate(text, location)
    form = _format(text, location, options.get("format")) if kind == "file" else cast("Format", kind)
    _check_names(text, form, options)
    divisions = DIVISIONS.get(form, ("one",))
    return TextSource(
        text=text,
        format=form,
        location=name,
        config=config,
        split=split,
        field=options.get("field"),
        documents=_choice(text, options, "documents", allowed=divisions, default=divisions[0]),
        length=_count(text, options, "length"),
        bos=_choice(text, options, "bos", allowed=get_args(Bos), default="auto"),
        empty=_choice(text, options, "empty", allowed=get_args(Empty), default="error"),
        first=_count(text, options, "first"),
        keep=_count(text, options, "keep"),
        weight=weight,
    )


def _locate(text: str, location: str) -> tuple[TextKind, str, str | None, str | None]:
    """TextKind, name, config, split."""
    head, _, tail = location.partition(":")
    if head == "datasets":
        name, _, rest = tail.partition(":")
        config, _, split = rest.partition(":")
        if not name:
            raise DataError(f"{text}: no name of a data set; write datasets:NAME[:CONFIG[:SPLIT]].")
        return "datasets", name, config or None, split or None
    if head == "bundled":
        if tail not in ("", "train", "held-out"):
            raise DataError(f"{text}: the bundled text has the parts train and held-out, not {tail!r}.")
        return "bundled", "bundled", None, tail or "held-out"
    if head == "builtin":
        if tail not in ("", *BUILTIN, HELD_OUT):
            parts = ", ".join((*BUILTIN, HELD_OUT))
            raise DataError(f"{text}: the built-in text has the parts {parts}, not {tail!r}.")
        return "builtin", "builtin", None, tail or None
    if location == "generated":
        return "generated", location, None, None
    folder = named_path(location, DataError)
    if folder.is_dir():
        return "datasets", str(folder), None, None
    return "file", location, None, None


def _format(text: str, location: str, wanted: str | None) -> Format:
    if wanted is not None:
        return cast("Format", _allowed(text, "format", wanted, FILE_FORMATS))
    extension = Path(location).suffix.lower()
    if extension not in EXTENSIONS:
        raise DataError(
            f"{text}: unknown extension {extension or '(none)'}; {near_matches(extension, EXTENSIONS)}. "
            "Add ?format=text (or jsonl, parquet, u16, u32, npy) to say what the file is."
        )
    return EXTENSIONS[extension]


def _check_names(text: str, form: Format, options: Mapping[str, str]) -> None:
    for name in options:
        if name not in OPTIONS[form]:
            known = near_matches(name, OPTIONS[form]) if OPTIONS[form] else "it takes no options"
            raise DataError(f"{text}: a source of the format {form} has no option {name!r}; {known}.")


def _choice(
    text: str, options: Mapping[str, str], name: str, *, allowed: tuple[str, ...], default: str
) -> Any:
    return _allowed(text, name, options.get(name, default), allowed)


def _allowed(text: str, name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise DataError(f"{text}: unknown {name}={value}; {near_matches(value, allowed)}.")
    return value


def _count(text: str, options: Mapping[str, str], name: str) -> int | None:
    value = options.get(name)
    if value is None:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise DataError(f"{text}: {name}={value} must be a whole number of at least 1.")
    return int(value)
