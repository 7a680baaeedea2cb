"""Who knows what: modules of torch in three packages, table entries by their protocol alone.

CONTRIBUTING.md says both in prose; here they are held.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fracbit.kernels import KERNELS
from fracbit.models.families import FAMILIES
from fracbit.records import tables
from fracbit.records.tables import Table
from source import MODULES, attributes_of, module_name, relative, room_of, tree

HOLDERS = {"models", "checkpoint", "pipeline"}
"""Packages that may hold an nn.Module: what loading puts in place, and a block on its way through the loop."""
INSIDE = {"copy_", "set_submodule", "register_parameter", "register_buffer", "register_module"}
"""Methods that change what a module holds."""
OTHER_MEANINGS = {("records/row.py", "random"), ("report/pictures.py", "uniform")}
"""Texts that look like the name of an entry: a rule in rows of version 0.1, and a curve of a plan."""
ALL_TABLES: Mapping[str, Table[Any]] = {
    name: table for name, table in vars(tables).items() if isinstance(table, Table)
}


def outside(*rooms: str) -> list[Path]:
    return [path for path in MODULES if room_of(path) not in rooms]


def test_modules_are_held_by_three_rooms() -> None:
    named = [
        f"{relative(path)}:{line}"
        for path in outside(*HOLDERS)
        for line, name in attributes_of(path, "nn", "torch.nn")
        if name[0].isupper()
    ]
    assert not named, f"only {sorted(HOLDERS)} hold nn.Module; pass tensors instead, or move this: {named}"


def test_layer_classes_are_known_to_models_alone() -> None:
    """Whether something is an nn.Linear, an nn.Embedding or a Conv1D is asked of models/blocks.py."""
    handles = {"Module", "Parameter"}
    named = [
        f"{relative(path)}:{line} {name}"
        for path in outside("models")
        for line, name in attributes_of(path, "nn", "torch.nn", "transformers.pytorch_utils")
        if name[0].isupper() and name not in handles
    ]
    assert not named, f"kinds of layers are for models/; ask a function of models/blocks.py: {named}"


def test_modules_are_defined_in_models_alone() -> None:
    made = [
        f"{relative(path)} {node.name}"
        for path in outside("models")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef)
        if any(ast.unparse(base) in ("nn.Module", "torch.nn.Module") for base in node.bases)
    ]
    assert not made, f"move this class to models/: {made}"


def test_modules_are_changed_by_models_alone() -> None:
    """Other packages call set_weight, set_tensor, replace and their like; none writes into a module by itself."""
    changed = [
        f"{relative(path)}:{node.lineno} {node.func.attr}"
        for path in MODULES
        if room_of(path) in HOLDERS - {"models"}
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in INSIDE
    ]
    assert not changed, f"change a module by a function of models/install.py: {changed}"


def test_weights_are_written_by_models_alone() -> None:
    """`gain[chosen] = ...` under `torch.no_grad()` writes into a module where the tensor is a parameter."""
    written = [
        f"{relative(path)}:{node.lineno}"
        for path in MODULES
        if room_of(path) in HOLDERS - {"models"}
        for block in ast.walk(tree(path))
        if isinstance(block, ast.With) and any("no_grad" in ast.unparse(item) for item in block.items)
        for node in ast.walk(block)
        if isinstance(node, ast.Assign | ast.AugAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Subscript) and not isinstance(target.slice, ast.Constant)
    ]
    assert not written, f"write into weights by a function of models/: {written}"


def table_objects() -> Iterator[tuple[str, Any]]:
    """Every entry of every table, with the table's name."""
    for table, entries in ALL_TABLES.items():
        yield from ((table, found) for _, found in entries.items())
    yield from (("FAMILIES", family) for family in FAMILIES)
    yield from (("KERNELS", kernel) for kernel in KERNELS)


def table_classes() -> dict[str, str]:
    """Classes that table entries are or are made of -> the module that defines them."""
    found = {}
    for _, entry in table_objects():
        kind = entry if isinstance(entry, type) else type(entry)
        if kind.__module__.startswith("fracbit"):
            found[kind.__name__] = kind.__module__
    return found


def asked_kinds(path: Path) -> Iterator[tuple[int, str]]:
    """Names of the classes that a module asks `isinstance` or `issubclass` about."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            for name in ast.walk(node.args[1]):
                if isinstance(name, ast.Name | ast.Attribute):
                    yield node.lineno, name.id if isinstance(name, ast.Name) else name.attr


def test_table_entries_are_not_told_apart_by_their_class() -> None:
    classes = table_classes()
    assert {"Gptq", "RoundToNearest", "ScoreMethod", "Rule", "Transform", "Family"} <= classes.keys()
    asked = [
        f"{relative(path)}:{line} {name}"
        for path in MODULES
        for line, name in asked_kinds(path)
        if name in classes and classes[name] != module_name(path)
    ]
    assert not asked, (
        f"put what you need to know into the protocol of the table instead of asking isinstance: {asked}"
    )


OPEN = {
    name
    for table in ("QUANTIZERS", "COLUMN_RULES", "TRANSFORMS", "PERTURBATIONS")
    for name in ALL_TABLES[table]
}


def asked_names(found: ast.AST) -> Iterator[tuple[int, str]]:
    """Texts that code compares with: by operators, alone or in a collection; by the ends of a text; by cases of a match."""
    for node in ast.walk(found):
        asked: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            asked = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            asked = node.args if node.func.attr in ("startswith", "endswith") else []
        elif isinstance(node, ast.MatchValue):
            asked = [node.value]
        for side in asked:
            for part in getattr(side, "elts", None) or getattr(side, "keys", None) or [side]:
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.lineno, part.value


def is_open(text: str) -> bool:
    """Whether a text is the name of an entry, alone or with the : that separates it from a parameter."""
    return text.strip(":").partition(":")[0] in OPEN


def test_table_entries_are_not_told_apart_by_their_name() -> None:
    compared = [
        f"{relative(path)}:{line} {text!r}"
        for path in MODULES
        for line, text in asked_names(tree(path))
        if is_open(text) and (relative(path), text) not in OTHER_MEANINGS
    ]
    assert not compared, (
        f"another entry could need the same: ask for a field of the entry, such as `needs`: {compared}"
    )


@pytest.mark.parametrize(
    "code",
    [
        "name == 'gptq'",
        "'awq' != name",
        "name in ('rtn', 'other')",
        "name not in {'descent'}",
        "name in {'rtn': 1}",
        "text.startswith('activation')",
        "text.startswith(('none', 'random:'))",
        "text.endswith('rotate-mlp')",
        "match name:\n    case 'other' | 'smooth':\n        pass",
    ],
)
def test_asking_for_a_name_is_noticed(code: str) -> None:
    assert any(is_open(text) for _, text in asked_names(ast.parse(code)))


@pytest.mark.parametrize("code", ["name == 'none'", "QUANTIZERS['rtn']", "text.startswith('rtnx')"])
def test_other_texts_may_be_asked_for(code: str) -> None:
    assert not any(is_open(text) for _, text in asked_names(ast.parse(code)))


@pytest.mark.parametrize("table", ALL_TABLES)
def test_every_line_of_a_table_leads_to_its_object(table: str) -> None:
    for name, place in ALL_TABLES[table].entries.items():
        assert ALL_TABLES[table].load(name) is not None, place
