"""`Recipe`: everything that decides what comes out, as one frozen record read from TOML. Its key names the result.

Numbers that only change how the work is done (threads, shard size, folders) are not part of it.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import (
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from fracbit.errors import FracbitError, RecipeError, SchemeError
from fracbit.records.calibration import Calibration
from fracbit.records.checked import Checked, Keys, explained
from fracbit.records.files import DEEPEST, is_deep
from fracbit.records.named import QuantizerField, read_named
from fracbit.records.outliers import OutliersField
from fracbit.records.scheme import Scheme, parse_scheme
from fracbit.records.tables import COLUMN_RULES, QUANTIZERS
from fracbit.records.text_source import GIVE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def _scheme(value: object) -> object:
    """A scheme from its word or the table of its fields; anything else is for pydantic to judge."""
    if isinstance(value, str):
        return parse_scheme(value)
    return Scheme.from_json(value) if isinstance(value, Mapping) else value


SchemeField = Annotated[Scheme, BeforeValidator(_scheme), PlainSerializer(Scheme.to_json)]


TRUST = "trust_remote_code"


class Override(Checked):
    """Another scheme, or none (kept float), for the layers whose names match the shell pattern `layers`.

    Raises `RecipeError`, `SchemeError`.
    """

    called: ClassVar[str] = "an override"
    remedies: ClassVar[Mapping[str, str]] = {
        "layers": 'write a pattern of names, such as layers = "*.down_proj"'
    }

    layers: str
    keep: bool = False
    scheme: SchemeField | None = None


class Recipe(Checked):
    """What to do to a model.

    - `model`: a folder or a hub id; `revision`: branch, tag or commit on the hub;
      `trust_remote_code`: run the model's own code.
    - `scheme`: of every linear of the blocks; `embeddings`: scheme of the embedding table, float unless given;
      `head`: scheme of the output head, float unless given;
      `towers`: scheme of the linears in towers for images and sound, float unless given.
    - `quantizer`: how codes are chosen, rtn, gptq or descent, with options if any, such as gptq:damping=0.05;
      `search`: look for block ranges of least error; unless it is given, where there are calibration texts.
    - `outliers`: input columns of every linear that stay in 16 bits, such as cost:0.01; None for none.
    - `calibration`: the texts that quantizers such as gptq look at; None for data-free ones.
    - `overrides`: other schemes for layers by the pattern of their names; later ones win.
    - `seed`: of everything random.

    A scheme may be written in one word: `scheme="nf4/64"`. Raises `RecipeError` and `SchemeError` for what cannot be.
    """

    called: ClassVar[str] = "a recipe"
    remedies: ClassVar[Mapping[str, str]] = {"model": "name a folder or a hub id"}

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    scheme: SchemeField = Field(default_factory=Scheme)
    embeddings: SchemeField | None = None
    head: SchemeField | None = None
    towers: SchemeField | None = None
    quantizer: QuantizerField = "rtn"
    search: bool = False
    outliers: OutliersField = None
    calibration: Calibration | None = None
    overrides: tuple[Override, ...] = ()
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _old_outliers(cls, data: Any) -> Any:
        """`[calibration] outliers = 0.01`, as recipes of version 0.1 write it, is `outliers = "cost:0.01"`."""
        plan = data.get("calibration") if isinstance(data, Mapping) else None
        if not isinstance(plan, Mapping) or "outliers" not in plan:
            return data
        share, rest = plan["outliers"], {name: value for name, value in plan.items() if name != "outliers"}
        given = {"outliers": f"cost:{share}"} if share else {}
        return {**given, **data, "calibration": rest}

    @model_validator(mode="wrap")
    @classmethod
    def _searched(cls, data: Any, handler: ModelWrapValidatorHandler[Recipe]) -> Recipe:
        """GPTQ at 3 bits lost 39 to 41 % less with `search` on a real model, on three texts (docs/quality.md)."""
        made = handler(data)
        if isinstance(data, Mapping) and "search" not in data and made.calibration is not None:
            made.__dict__["search"] = True  # the default of this recipe: not among the fields that were set
        return made

    def to_json(self) -> dict[str, Any]:
        """The recipe as a JSON object."""
        return self.model_dump(mode="json")


def key(recipe: Recipe) -> str:
    """16 hex digits that name the recipe: equal recipes, and only they, have equal keys.

    What has its default value is left out, so that a field that recipes gain later does not rename what was made before.
    """
    text = json.dumps(recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def recipe_toml(recipe: Recipe, notes: Iterable[str] = ()) -> str:
    """The recipe as TOML, without what has its default value; `fracbit quantize` reads it back. `notes`: comments on top.

    Whether the model's own code may run is not written: files are not asked for that.
    """
    comments = [f"# {_printable(line)}" for note in notes for line in note.splitlines()]
    data = recipe.model_dump(mode="json", exclude_defaults=True, exclude={TRUST})
    if recipe.calibration is not None:  # where the default depends on others
        data["search"] = recipe.search
    tables = {name: value for name, value in data.items() if name in ("scheme", "calibration")}
    lines = [
        f"{name} = {inline_toml(value)}" for name, value in data.items() if name not in (*tables, "overrides")
    ]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *_keys(table)]
    for override in data.get("overrides", ()):
        lines += ["", "[[overrides]]", *_keys(override)]
    return "\n".join([*comments, *lines]) + "\n"


def _printable(line: str) -> str:
    """A line without the control characters that TOML forbids in comments."""
    return "".join(each if each.isprintable() else " " for each in line)


def _keys(table: Mapping[str, Any]) -> list[str]:
    return [f"{name} = {inline_toml(value)}" for name, value in table.items() if value is not None]


def inline_toml(value: object) -> str:
    """A value on one line: strings, numbers, booleans and lists as JSON writes them, tables between braces."""
    if isinstance(value, Mapping):
        given = {name: item for name, item in value.items() if item is not None}
        return "{ " + ", ".join(f"{name} = {inline_toml(item)}" for name, item in given.items()) + " }"
    return json.dumps(value, ensure_ascii=False).replace(
        "\x7f", "\\u007f"
    )  # which TOML allows in escaped form alone


def check_data(recipe: Recipe, quantizer_reads: bool | None = None, rule_reads: bool | None = None) -> None:
    """Refuse a recipe without calibration texts whose quantizer or column rule reads them. Raises `RecipeError`.

    Whether they do is what the objects say, where they are known already, else what their tables say.
    """
    if recipe.calibration is not None:
        return
    if quantizer_reads is None:
        quantizer_reads = read_named(recipe.quantizer, QUANTIZERS).name in QUANTIZERS.reading
    chosen = "" if recipe.outliers is None else recipe.outliers.chosen
    if rule_reads is None:
        rule_reads = chosen in COLUMN_RULES.reading
    texts = f"calibration data: {GIVE}, or texts in a [calibration] table"
    if quantizer_reads:
        raise RecipeError(f"quantizer {recipe.quantizer} reads {texts}; rtn reads none")
    if rule_reads:
        raise RecipeError(f"outliers chosen by {chosen} read {texts}; cost and proxy read none")


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises `RecipeError` when it is missing, not TOML, or asks to run the code of a model."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not TOML: {error}") from error
    except RecursionError as error:
        raise RecipeError(f"{path} is not TOML: it is nested too deeply") from error
    if is_deep(found):
        raise RecipeError(f"{path} is nested in more than {DEEPEST} levels, which no file of settings is")
    if "\\u0000" in json.dumps(found, default=str):
        raise RecipeError(f"{path} holds a NUL character in a value, which no name and no path has")
    if found.pop(TRUST, False):
        raise RecipeError(
            f"{path}{_line_of((TRUST,), path)}: {TRUST} is not taken from a file, which may be another's: if you trust the "
            "model's own code, remove the line and pass --trust-remote-code"
        )
    return found


def make_recipe(data: Mapping[str, Any], path: Path | None = None) -> Recipe:
    """A recipe from the tables of a file merged with flags. Raises `RecipeError` that names the key and its line."""
    try:
        return Recipe.model_validate(dict(data))
    except ValidationError as error:
        keys, said = explained(error, Recipe)
        raise RecipeError(f"{path}{_line_of(keys, path)}: {said}" if path else said) from None
    except FracbitError as error:
        if path is None:
            raise
        line = _line_of((error.key,), path) if isinstance(error, SchemeError) and error.key else ""
        raise RecipeError(f"{path}{line}: {error}") from error


def _line_of(keys: Keys, path: Path) -> str:
    """`, line N` of the first line of the file that sets the last of the keys, else one before it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for key in reversed([key for key in keys if isinstance(key, str)]):
        pattern = re.compile(rf"(^|[\[{{,.])\s*[\"']?{re.escape(key)}[\"']?\s*[\]=.]")
        for number, line in enumerate(lines, 1):
            if pattern.search(line):
                return f", line {number}"
    return ""
