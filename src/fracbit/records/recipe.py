"""`Recipe`: everything that decides what comes out, as one frozen record read from TOML. Its key names the result.

Numbers that only change how the work is done (threads, shard size, folders) are not part of it.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from fracbit.errors import FracbitError, RecipeError, SchemeError, near_matches
from fracbit.records.calibration import Calibration
from fracbit.records.scheme import Scheme

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def _scheme(value: object) -> object:
    return Scheme.from_json(value) if isinstance(value, Mapping) else value


SchemeField = Annotated[Scheme, BeforeValidator(_scheme), PlainSerializer(Scheme.to_json)]


class Override(BaseModel):
    """Another scheme, or none (kept float), for the layers whose names match the shell pattern `layers`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: str
    keep: bool = False
    scheme: SchemeField | None = None


class Recipe(BaseModel):
    """What to do to a model.

    - `model`: a folder or a hub id; `revision` and `trust_remote_code` belong to it.
    - `scheme`: for every linear of the blocks; `embeddings` and `head` stay float unless they are given one.
    - `quantizer` fills the schemes; `search` looks for block ranges of least error.
    - `calibration`: the texts that quantizers such as gptq look at; None for data-free ones.
    - `overrides`: later ones win.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    scheme: SchemeField = Field(default_factory=Scheme)
    embeddings: SchemeField | None = None
    head: SchemeField | None = None
    quantizer: str = "rtn"
    search: bool = False
    calibration: Calibration | None = None
    overrides: tuple[Override, ...] = ()
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """The recipe as a JSON object."""
        return self.model_dump(mode="json")


def key(recipe: Recipe) -> str:
    """16 hex digits that name the recipe: equal recipes, and only they, have equal keys."""
    text = json.dumps(recipe.to_json(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises `RecipeError` when it is missing or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not TOML: {error}") from error


def make_recipe(data: Mapping[str, Any], path: Path | None = None) -> Recipe:
    """A recipe from the tables of a file merged with flags. Raises `RecipeError` that names the key and its line."""
    try:
        return Recipe.model_validate(dict(data))
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(_explain(first["loc"], first["type"], first["msg"], path)) from None
    except FracbitError as error:
        if path is None:
            raise
        line = _line_of(error.key, path) if isinstance(error, SchemeError) and error.key else ""
        raise RecipeError(f"{path}{line}: {error}") from error


def _explain(location: tuple[int | str, ...], kind: str, message: str, path: Path | None) -> str:
    name = ".".join(str(part) for part in location)
    where = f"{path}{_line_of(str(location[-1]), path)}: " if path else ""
    if kind == "extra_forbidden":
        known = Override.model_fields if len(location) > 1 else Recipe.model_fields
        return f"{where}a recipe has no key {name!r}; {near_matches(str(location[-1]), known)}"
    return f"{where}{name}: {message}"


def _line_of(name: str, path: Path | None) -> str:
    """`, line N` of the first line of the file that sets `name`."""
    lines = path.read_text(encoding="utf-8").splitlines() if path else []
    pattern = re.compile(rf"(^|[\[{{,.])\s*[\"']?{re.escape(name)}[\"']?\s*[\]=.]")
    for number, line in enumerate(lines, 1):
        if pattern.search(line):
            return f", line {number}"
    return ""
