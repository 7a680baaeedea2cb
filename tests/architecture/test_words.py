"""One word, one meaning: names of classes, files, packages and verbs; each failure says what to do."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import fracbit
from source import MODULES, ROOMS, SOURCE, module_name, relative, tree

SIBLINGS = {
    "attention": "models/ exchanges the attention of a model for the kernel in kernels/",
    "awq": "the method and the format of files that its authors named after it",
    "bundled": "data/ reads the texts that the package bundled/ names",
    "columns": "pipeline/quantize chooses columns ahead of a run by the rules in quantizers/",
    "compressed_tensors": "the format as it is read and as it is written",
    "export": "the command and the folder of export formats that it calls",
    "gguf": "the format as it is read and as it is written",
    "gptq": "the method and the format of files that its authors named after it",
    "lens": "the command, the study that it calls and the record that comes out",
    "mlx": "the format as it is read and as it is written, and the engine",
    "plan": "the command, and the subpackage with the function that it calls",
    "prove": "the command and the function that it calls",
    "prune": "the command and the study that it calls",
    "quantize": "the command and the subpackage that it calls",
    "report": "the command and the package that it calls",
    "run": "the record of a run and what makes it",
    "serve": "the command and the subpackage that it calls",
    "study": "the subpackage and the record that its files share",
    "tweak": "the command and the method that it runs",
    "verify": "the command and the function that it calls",
}
"""Files and folders that have one name since they are one thing, seen from several packages."""
OPTIONS = "cli/options.py"  # an option has the name of the setting that it sets


def named_types(path: Path) -> Iterator[str]:
    """Classes and public type aliases that a module defines."""
    for node in tree(path).body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if "TypeAlias" in ast.unparse(node.annotation):
                yield node.target.id
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, ast.unparse(node.value)
            if name[0].isupper() and not name.isupper() and not value.startswith("TypeVar("):
                yield name


def test_a_type_has_one_meaning() -> None:
    places = defaultdict(list)
    for path in MODULES:
        for name in named_types(path) if relative(path) != OPTIONS else ():
            places[name].append(relative(path))
    twice = {name: where for name, where in places.items() if len(where) > 1 and not name.startswith("_")}
    assert not twice, f"two types of one name: rename one to say what sets it apart, or share it: {twice}"


def test_a_file_name_has_one_meaning() -> None:
    places = defaultdict(list)
    for path in MODULES:
        name = path.parent.name if path.stem == "__init__" else path.stem
        places[name].append(relative(path))
    twice = {name: where for name, where in places.items() if len(where) > 1}
    unknown = {name: where for name, where in twice.items() if name not in SIBLINGS}
    assert not unknown, (
        f"two files of one name: rename one, or say in SIBLINGS why they are one thing: {unknown}"
    )
    gone = SIBLINGS.keys() - twice.keys()
    assert not gone, f"no longer two files: take {sorted(gone)} out of SIBLINGS"


def verbs() -> list[str]:
    """The functions of the package's interface."""
    return [name for name in fracbit.__all__ if name[0].islower()]


def test_no_verb_has_the_name_of_a_room() -> None:
    assert len(verbs()) >= 7
    rooms = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    rooms |= {path.stem for path in SOURCE.glob("*.py")}
    both = rooms & set(verbs())
    assert not both, (
        f"`import fracbit.{next(iter(both), '')}` would put the module in the verb's place: rename the package"
    )


EVERYTHING = """
import importlib, sys
import fracbit
from fracbit.evaluation import perplexity
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fracbit"):
            raise
import types
for verb in fracbit.__all__:
    found = getattr(fracbit, verb)
    assert not isinstance(found, types.ModuleType), f"fracbit.{verb} is a module"
    assert verb[0] in "_ABCDEFGHIJKLMNOPQRSTUVWXYZ" or callable(found), f"fracbit.{verb} is no function"
"""


def test_verbs_stay_functions_whatever_is_imported() -> None:
    names = [module_name(path) for path in MODULES if path.stem != "__main__"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EVERYTHING, *names],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_no_two_files_call_themselves_the_loop() -> None:
    loops = [relative(path) for path in MODULES if "THE LOOP" in path.read_text(encoding="utf-8")]
    assert len(loops) < 2, f"only one can be THE LOOP; say what each of them walks over instead: {loops}"


def test_every_room_is_a_word_of_its_own() -> None:
    """No subpackage, and no folder anywhere below, has the name of another package."""
    wings = [path.parent for path in SOURCE.glob("*/**/__init__.py") if path.parent.parent != SOURCE]
    again = [relative(wing) for wing in wings if wing.name in ROOMS]
    assert not again, f"a folder has the name of a package: rename {again}"
    assert all(importlib.import_module(f"fracbit.{room}") for room in ROOMS)
