"""Calls of fracbit's own functions name what they pass once there are more than four values."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from source import MODULES, relative, tree

MOST = 4  # values that a reader can tell apart by their place


def own_names(path: Path) -> set[str]:
    """What a module defines or imports from fracbit: `name`, and `module` of `module.name`."""
    names = {"self", "cls"}
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fracbit"):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def long_calls(code: ast.AST, own: set[str]) -> Iterator[ast.Call]:
    """Calls of own functions with more than `MOST` values by position."""
    for node in ast.walk(code):
        if isinstance(node, ast.Call) and len(node.args) > MOST:
            first = node.func
            while isinstance(first, ast.Attribute):
                first = first.value
            if isinstance(first, ast.Name) and first.id in own:
                yield node


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_calls_name_their_values(path: Path) -> None:
    found = [
        f"line {call.lineno}: {ast.unparse(call.func)}" for call in long_calls(tree(path), own_names(path))
    ]
    assert not found, f"more than {MOST} values by position; pass the others by keyword: {found}"


def test_a_long_call_is_noticed() -> None:
    code = ast.parse(
        "mine(1, 2, 3, 4, 5); room.mine(1, 2, 3, 4, *more); theirs(1, 2, 3, 4, 5); mine(1, 2, 3, 4, e=5)"
    )
    assert [ast.unparse(call.func) for call in long_calls(code, {"mine", "room"})] == ["mine", "room.mine"]
