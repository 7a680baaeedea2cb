"""The house holds: imports go one way, light rooms are light, every module says what it is for."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter import configuration
from importlinter.application import use_cases

SOURCE = Path(__file__).resolve().parents[2] / "src" / "fracbit"
PYPROJECT = SOURCE.parents[1] / "pyproject.toml"
NOT_ROOMS = {"bundled"}
TORCH_FREE = ["errors", "records", "report"]
TRANSFORMERS_FREE = ["numerics", "quantizers", "importance", "transforms", "lens", "kernels"]
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}

MODULES = sorted(SOURCE.rglob("*.py"))
ROOMS = sorted(path.parent.name for path in SOURCE.glob("*/__init__.py") if path.parent.name not in NOT_ROOMS)


def relative(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def present(rooms: list[str]) -> list[str]:
    return [room for room in rooms if room in ROOMS or (SOURCE / f"{room}.py").is_file()]


def loaded_by(rooms: list[str]) -> set[str]:
    """The top-level packages that a fresh interpreter holds after importing the rooms."""
    imports = "".join(f"import fracbit.{room}\n" for room in rooms)
    program = f"import sys\n{imports}print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_import_contracts_hold(capsys: pytest.CaptureFixture[str]) -> None:
    configuration.configure()
    kept = use_cases.lint_imports(config_filename=str(PYPROJECT), cache_dir=None, no_logo=True)
    assert kept, capsys.readouterr().out


@pytest.mark.parametrize("room", present(TORCH_FREE))
def test_light_rooms_start_without_torch(room: str) -> None:
    heavy = {"torch", "transformers", "numpy", "datasets"} & loaded_by([room])
    assert not heavy, f"importing fracbit.{room} loads {sorted(heavy)}"


def test_tensor_rooms_start_without_transformers() -> None:
    rooms = present(TRANSFORMERS_FREE)
    assert "transformers" not in loaded_by(rooms), f"importing one of {rooms} loads transformers"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_every_module_opens_with_a_docstring(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{relative(path)} does not say what it is for"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_no_module_has_a_vague_name(path: Path) -> None:
    assert not VAGUE_NAMES & {path.stem, *path.relative_to(SOURCE).parts[:-1]}


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_declares_what_others_may_use(room: str) -> None:
    tree = ast.parse((SOURCE / room / "__init__.py").read_text())
    module = importlib.import_module(f"fracbit.{room}")
    only_docstring = len(tree.body) == 1
    declared = getattr(module, "__all__", [] if only_docstring else None)
    assert declared is not None, f"fracbit/{room}/__init__.py holds names and has no __all__"
    missing = [name for name in declared if not hasattr(module, name)]
    assert not missing, f"fracbit.{room}.__all__ names {missing}, which do not exist"
