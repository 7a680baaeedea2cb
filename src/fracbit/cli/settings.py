"""`--set key=value`: every field of a recipe, of a budget and of a run, by its dotted name. Torch-free.

The keys, their types, defaults and descriptions are read from the records themselves, so a new field of a record is a
setting at once. A field's description is the bullet of its record's docstring.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from fracbit.errors import RecipeError
from fracbit.records.allocation import read_level
from fracbit.records.calibration import Calibration
from fracbit.records.scheme import Scheme, parse_scheme

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LISTED = "help"  # `--set help` lists the settings
REQUIRED = "required"
SCHEMES = ("scheme", "embeddings", "head", "towers")  # fields of a recipe that may be written in one word
PLAIN = (bool, int, float)
NAMES = {bool: "true | false", int: "whole number", float: "number", str: "text", Scheme: "scheme"}
_HEAD = re.compile(r"((?:`\w+`(?:, )?)+): (.+)")
_CLAUSE = re.compile(r"; (?=(?:`\w+`(?:, )?)+: )")


@dataclass(frozen=True)
class Setting:
    """One key: `kind` is the annotation of its field, `default` its value if it is not set, `line` its description."""

    key: str
    kind: Any
    default: Any
    line: str


def all_settings(tables: Mapping[str, type]) -> dict[str, Setting]:
    """The settings of records by dotted name; `tables` maps a prefix (`""`, `"spending."`) to a record."""
    return {found.key: found for prefix, record in tables.items() for found in _walk(prefix, record)}


def read_settings(words: Sequence[str], known: Mapping[str, Setting]) -> dict[str, Any]:
    """The values of `key=value` words by key; a repeated key extends a list, else the last value wins.

    A value is TOML where it parses as TOML of the field's type, else a string. Raises `RecipeError`, `SchemeError`.
    """
    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise RecipeError(
                f"--set {word}: write it as key=value, such as seed=3; --set help lists the keys"
            )
        if key not in known:
            raise RecipeError(f"--set has no key {key!r}; {_near(key, known)}--set help lists all keys")
        try:
            value = read_value(text, known[key].kind)
        except ValueError as error:
            raise RecipeError(f"--set {word}: {error}") from None
        found[key] = [*found.get(key, []), *value] if isinstance(value, list) else value
    return found


def read_value(text: str, kind: Any) -> Any:
    """A value of the annotation `kind`: a scheme in one word, a list with commas or in brackets, a TOML value, or a string.

    Raises `SchemeError`, or `ValueError` for a value that is none of the kind.
    """
    choices = _choices(kind)
    named = [name for choice in choices if get_origin(choice) is Literal for name in get_args(choice)]
    if text == "none" and NoneType in choices and text not in named:
        return None
    parsed = _toml(text)
    if _is_scheme(choices):
        if isinstance(parsed, dict):
            return parsed
        level = read_level(text) if NoneType in choices else parse_scheme(text)
        return level and level.to_json()
    if any(get_origin(choice) is tuple for choice in choices):
        return parsed if isinstance(parsed, list) else [part.strip() for part in text.split(",")]
    plain = tuple(choice for choice in choices if choice in PLAIN)
    if named or str in choices:
        return parsed if isinstance(parsed, (str, *plain)) else text
    if plain and not _is_plain(parsed, plain):
        raise ValueError(f"the value must be a {_kind_text(kind)}, got {text!r}")
    return parsed


def laid_over(data: Mapping[str, Any], values: Mapping[str, Any], path: Path | None = None) -> dict[str, Any]:
    """The nested tables of the file `path`, overridden by dotted settings.

    Raises `RecipeError` for a setting below something that is not a table.
    """
    found = dict(data)
    for key in sorted(values, key=lambda key: key.count(".")):  # a scheme, then its parts
        *outer, last = key.split(".")
        table = found
        for name in outer:
            inner = table.get(name) or {}
            if isinstance(inner, str) and name in SCHEMES:
                inner = parse_scheme(inner).to_json()
            if not isinstance(inner, Mapping):
                where = f"{path}: " if path else ""
                raise RecipeError(
                    f"{where}{name} is {inner!r}; write it as a table, [{name}], to set {key} over it"
                )
            table[name] = dict(inner)
            table = table[name]
        table[last] = values[key]
    return found


def asks_for_help(words: Sequence[str] | None) -> bool:
    """Whether the settings are to be listed instead of used: `--set help`."""
    return LISTED in (words or [])


def listing(known: Mapping[str, Setting]) -> list[list[str]]:
    """A row per setting: key, type, default, meaning; the parts of a scheme once, not again for embeddings, head and towers."""
    rows = [found for found in known.values() if not _repeats(found.key, known)]
    return [[each.key, _kind_text(each.kind), _default_text(each.default), each.line] for each in rows]


def field_lines(record: type) -> dict[str, str]:
    """What a record's docstring says of its fields: bullets such as "- `name`: text; `other`: text", or mentions."""
    clauses = [part for bullet in _bullets(inspect.getdoc(record) or "") for part in _CLAUSE.split(bullet)]
    found: dict[str, str] = {}
    for clause in clauses:
        match = _HEAD.match(clause)
        if match:
            found |= dict.fromkeys(re.findall(r"`(\w+)`", match[1]), match[2])
    for name, _, _ in _fields(record):
        mentions = (clause for clause in clauses if f"`{name}`" in clause)
        found.setdefault(name, next(mentions, ""))
    return {name: re.sub(r"(?<!\.)[.;,]$", "", line.replace("`", "")) for name, line in found.items()}


def _walk(prefix: str, record: type) -> Iterator[Setting]:
    lines = field_lines(record)
    for name, kind, default in _fields(record):
        choices = _choices(kind)
        if Calibration not in choices:
            yield Setting(prefix + name, kind, default, lines[name])
        if Calibration in choices or _is_scheme(choices):
            inner = Calibration if Calibration in choices else Scheme
            yield from _walk(f"{prefix}{name}.", inner)


def _fields(record: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, annotation and default of every field of a pydantic model or a dataclass."""
    if issubclass(record, BaseModel):
        for name, field in record.model_fields.items():
            default = REQUIRED if field.is_required() else field.get_default(call_default_factory=True)
            yield name, field.annotation, default
    else:
        kinds = get_type_hints(record)
        for each in fields(record):
            yield each.name, kinds[each.name], REQUIRED if each.default is MISSING else each.default


def _choices(kind: Any) -> tuple[Any, ...]:
    """The members of a union, however it is written; anything else by itself."""
    if get_origin(kind) is Annotated:
        return _choices(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return tuple(choice for each in get_args(kind) for choice in _choices(each))
    return (kind,)


def _is_scheme(choices: tuple[Any, ...]) -> bool:
    """Whether a field is a scheme; the scales of a scheme, text or a scheme, have their own short form."""
    return Scheme in choices and str not in choices


def _bullets(doc: str) -> list[str]:
    found: list[str] = []
    inside = False
    for line in doc.splitlines():
        if line.startswith("- "):
            found.append(line[2:])
        elif inside and line.startswith("  "):
            found[-1] += " " + line.strip()
        inside = line.startswith(("- ", "  ")) and bool(found)
    return found


def _toml(text: str) -> Any:
    """The value as TOML, or the text itself if it is not TOML."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _is_plain(value: object, plain: tuple[type, ...]) -> bool:
    """Whether a value is of one of the types; a whole number is a number, but true and false are not."""
    numbers = (*plain, int) if float in plain else plain
    return isinstance(value, numbers) and (bool in plain or not isinstance(value, bool))


def _repeats(key: str, known: Mapping[str, Setting]) -> bool:
    """Whether a key is part of a scheme that is not set by default: `head.bits`."""
    whole = known.get(key.rpartition(".")[0])
    return whole is not None and whole.default is None


def _near(key: str, known: Mapping[str, Setting]) -> str:
    """`did you mean ...? `, by the whole key and by its last part; nothing when none is close."""
    last = key.rpartition(".")[2]
    alike = [name for name in known if name.rpartition(".")[2] == last and not _repeats(name, known)]
    close = list(dict.fromkeys([*alike, *difflib.get_close_matches(key, known, n=3, cutoff=0.6)]))[:4]
    if not close:
        ends = difflib.get_close_matches(last, {name.rpartition(".")[2] for name in known}, n=2, cutoff=0.6)
        close = [name for name in known if name.rpartition(".")[2] in ends][:4]
    return f"did you mean {' or '.join(map(repr, close))}? " if close else ""


def _kind_text(kind: Any) -> str:
    parts: list[str] = []
    others: list[str] = []
    for choice in _choices(kind):
        if get_origin(choice) is Literal:
            parts += map(str, get_args(choice))
        elif get_origin(choice) is tuple:
            parts.append("list")
        elif choice in NAMES:
            parts.append(NAMES[choice])
        elif choice is not NoneType:
            others.append("text")
    return " | ".join(parts or others)


def _default_text(default: Any) -> str:
    if default is None or default == ():
        return "none"
    return str(default).lower() if isinstance(default, bool) else str(default)
