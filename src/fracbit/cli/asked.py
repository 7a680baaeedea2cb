"""What a command line asks for: a recipe, a budget, and how to run, from a recipe file, flags and `--set`. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from fracbit.cli.settings import Setting, all_settings, laid_over, read_settings
from fracbit.errors import RecipeError
from fracbit.records.recipe import Recipe, make_recipe, read_toml
from fracbit.records.scheme import parse_scheme
from fracbit.records.spending import Spending

Run = TypeVar("Run")


@dataclass(frozen=True)
class Asked(Generic[Run]):
    """The three records that a command line makes; `run` is how and where the work is done."""

    recipe: Recipe
    spending: Spending
    run: Run


def known_settings(run: type) -> dict[str, Setting]:
    """Every key of `--set`, for a command whose own record is `run`."""
    return all_settings({"": Recipe, "spending.": Spending, "run.": run})


def asked(
    run: type[Run], settings: Sequence[str], flags: Mapping[str, Any], *, scheme: str | None = None,
    keep: Sequence[str] = (), path: Path | None = None,
) -> Asked[Run]:  # fmt: skip
    """Override the recipe at `path` by `scheme`, then `flags` by their keys (None: not given), `settings` and `keep`.

    Raises `RecipeError`, `SchemeError`.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    given |= {"scheme": parse_scheme(scheme).to_json()} if scheme is not None else {}
    given |= read_settings(settings, known_settings(run))
    parts = {name: _taken(given, f"{name}.") for name in ("spending", "run")}
    data = laid_over(read_toml(path) if path else {}, given, path)
    data = data | _kept(data.get("overrides", []), keep, path)
    if "model" not in data:
        raise RecipeError(
            "no model: name a folder or a hub id on the command line, or as `model` in the recipe"
        )
    return Asked(make_recipe(data, path), Spending(**parts["spending"]), run(**parts["run"]))


def _taken(given: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The values whose keys start with `prefix`, taken out of `given`, under the rest of their keys."""
    return {key[len(prefix) :]: given.pop(key) for key in list(given) if key.startswith(prefix)}


def _kept(overrides: object, keep: Sequence[str], path: Path | None) -> dict[str, Any]:
    if not keep:
        return {}
    if not isinstance(overrides, (list, tuple)):
        raise RecipeError(f"{path}: overrides is {overrides!r}; write it as a table, [[overrides]]")
    return {"overrides": [*overrides, *({"layers": pattern, "keep": True} for pattern in keep)]}
