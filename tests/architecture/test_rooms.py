"""The structure of the code: imports go one way, light packages are light, every module says what it is for."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from importlinter import configuration
from importlinter.application import use_cases

from source import MODULES, ROOMS, SOURCE, modules_of, relative, tree

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = SOURCE.parents[1]
PYPROJECT = ROOT / "pyproject.toml"
TORCH_FREE = ["errors", "records", "report"]
TRANSFORMERS_FREE = ["numerics", "quantizers", "importance", "transforms", "perturbation", "kernels"]
HEAVY = {"torch", "transformers", "datasets"}
OPTIONAL = {"plotly", "matplotlib", "scipy", "numpy"}  # report's own, which may be absent
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}

IMPORT = """
import importlib, sys
absent = set(sys.argv[1].split(","))
for name in sys.argv[2:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in absent:
            raise
print(*{name.partition(".")[0] for name in sys.modules})
"""


def loaded_by(modules: list[str]) -> set[str]:
    """The top-level packages that a fresh interpreter holds after importing these modules."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORT, ",".join(OPTIONAL), *modules],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def contracts() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = tomllib.loads(PYPROJECT.read_text())["tool"]["importlinter"]["contracts"]
    return found


def test_import_contracts_hold(capsys: pytest.CaptureFixture[str]) -> None:
    configuration.configure()
    kept = use_cases.lint_imports(config_filename=str(PYPROJECT), cache_dir=None, no_logo=True)
    assert kept, capsys.readouterr().out


@pytest.mark.parametrize("room", TORCH_FREE)
def test_light_rooms_start_without_torch(room: str) -> None:
    """Every module of them, and with them the whole package."""
    heavy = HEAVY & loaded_by(["fracbit", *modules_of(room)])
    assert not heavy, (
        f"importing fracbit.{room} loads {sorted(heavy)}: import inside the function that needs it"
    )


@pytest.mark.parametrize("module", ["fracbit", "fracbit.records.tables", "fracbit.cli"])
def test_names_are_checked_without_torch(module: str) -> None:
    heavy = (HEAVY | {"numpy"}) & loaded_by([module])
    assert not heavy, f"importing {module} loads {sorted(heavy)}: import inside the function that needs it"


def test_tensor_rooms_start_without_transformers() -> None:
    modules = [name for room in TRANSFORMERS_FREE for name in modules_of(room) if "triton" not in name]
    assert "transformers" not in loaded_by(modules), (
        f"importing one of {TRANSFORMERS_FREE} loads transformers"
    )


def test_contributing_draws_the_rooms_as_the_contracts_do() -> None:
    """The drawing has the lines of the layers contract, from top to bottom, and names the same light packages."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    drawing = text.partition("## The packages")[2].partition("```")[2].partition("```")[0]
    names = "|".join([*ROOMS, "errors"])
    drawn = [set(re.findall(rf"(?:^|\| )({names})\b", line)) for line in drawing.strip().splitlines()]
    layers = next(contract for contract in contracts() if contract["type"] == "layers")["layers"]
    assert [room for room in drawn if room] == [set(re.findall(r"\w+", line)) for line in layers]
    forbidden = [contract for contract in contracts() if contract["type"] == "forbidden"]
    for rooms, name in ((TORCH_FREE, "torch"), (TRANSFORMERS_FREE, "transformers")):
        sources = {f"fracbit.{room}.**" for room in rooms}
        assert any(set(c["source_modules"]) == sources and name in c["forbidden_modules"] for c in forbidden)
        said = re.search(rf"((?:`\w+`(?:, | and |\s+and\s+)?)+)\s+never\s+import\s+{name}\b", text)
        assert said, f"CONTRIBUTING.md does not say which packages never import {name}"
        assert set(re.findall(r"`(\w+)`", said[1])) == set(rooms)


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_every_module_opens_with_a_docstring(path: Path) -> None:
    assert ast.get_docstring(tree(path)), f"{relative(path)} does not say what it is for"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_no_module_has_a_vague_name(path: Path) -> None:
    assert not VAGUE_NAMES & {path.stem, *path.relative_to(SOURCE).parts[:-1]}


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_declares_what_others_may_use(room: str) -> None:
    module = importlib.import_module(f"fracbit.{room}")
    only_docstring = len(tree(SOURCE / room / "__init__.py").body) == 1
    declared = getattr(module, "__all__", [] if only_docstring else None)
    assert declared is not None, f"fracbit/{room}/__init__.py holds names and has no __all__"
    missing = [name for name in declared if not hasattr(module, name)]
    assert not missing, f"fracbit.{room}.__all__ names {missing}, which do not exist"
