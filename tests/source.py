"""The source of fracbit as a test reads it: modules, syntax trees, names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "fracbit"
MODULES = sorted(SOURCE.rglob("*.py"))
ROOMS = sorted(path.parent.name for path in SOURCE.glob("*/__init__.py") if path.parent.name != "bundled")


def relative(path: Path) -> str:
    """A module's path below src/fracbit."""
    return path.relative_to(SOURCE).as_posix()


def room_of(path: Path) -> str:
    """The package of a module; the module's own name if it is in none."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def modules_of(room: str) -> list[str]:
    """The full names of all modules of a package; for a package that is one file, the name of the file."""
    if (SOURCE / f"{room}.py").is_file():
        return [f"fracbit.{room}"]
    found = [path for path in MODULES if room_of(path) == room]
    assert found, f"src/fracbit has no package {room}: a test names one that was renamed"
    return [module_name(path) for path in found]


def module_name(path: Path) -> str:
    """The name that a module is imported by."""
    parts = ["fracbit", *path.relative_to(SOURCE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(path: Path) -> ast.Module:
    """A module's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"))


def attributes_of(path: Path, *owners: str) -> Iterator[tuple[int, str]]:
    """Where a module says `owner.name` for one of the `owners`, or imports a name from one of them: (line, name)."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in owners:
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and node.module in owners:
            yield from ((node.lineno, alias.name) for alias in node.names)
