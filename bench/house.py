"""What can be counted about the code itself: the table "Measured before and after" of docs/architecture.md.

    python bench/house.py [--root FOLDER] [--json]      --root: another checkout, such as the one before a change

- Lines are all lines of src/fracbit, blank ones and comments included.
- A function's length is that of all its lines: signature, docstring and body.
- A shape note is a line with a jaxtyping annotation (`Float[Tensor, "out in"]`) or a comment with a shape, `# [out, blocks]`.
- Implementations are counted as modules. "quantize a layer": modules of the pipeline and the sweeps that hand a layer to a
  quantizer. "load a float model": modules of the same, serving left out, that load a whole model. "prepare a source": modules
  of these and the checkpoint room that build the skeleton of a model.
- Files of an extension are those that its example in docs/architecture.md touches.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHAPE_NOTE = re.compile(
    r"\b(Float|Int|UInt8|Int32|Integer|Bool|Shaped|Num)\[\s*Tensor\b|#(?! type:)[^\"]*\[[a-z0-9]"
)
QUANTIZING = {"quantize_tensor", "quantize_group", "fill", "RoundToNearest()"}
ABOVE = ("pipeline", "sweep", "sweeps")


def measure(root: Path) -> dict[str, object]:
    """Every figure of the tree at `root`, by name."""
    source = root / "src/fracbit"
    python = {path: path.read_text() for path in sorted(source.rglob("*.py"))}
    native = [path for kind in ("*.cpp", "*.h") for path in (source / "kernels/native").rglob(kind)]
    lines = sum(len(text.splitlines()) for text in python.values())
    notes = sum(bool(SHAPE_NOTE.search(line)) for text in python.values() for line in text.splitlines())
    lengths = sorted(length for text in python.values() for length in lengths_of(text))
    names = {path.relative_to(source): text for path, text in python.items()}
    return {
        "python lines": lines,
        "native lines": sum(len(path.read_text().splitlines()) for path in native),
        "python files": len(python),
        "functions": len(lengths),
        "function length, median": statistics.median(lengths),
        "function length, 90 %": lengths[int(0.9 * len(lengths))],
        "shape notes": notes,
        "shape notes per 1000 lines": round(1000 * notes / lines, 1),
        "import contracts": len(contracts(root)),
        "quantize a layer": modules_calling(names, QUANTIZING, ABOVE),
        "load a float model": modules_calling(
            names, {"load", "load_opened"}, ABOVE, ("pipeline/serve", "pipeline/bench")
        ),
        "prepare a source": modules_calling(names, {"skeleton"}, ("checkpoint", *ABOVE)),
        "files of an extension": extensions(root),
    }


def lengths_of(text: str) -> Iterator[int]:
    """Lines of each function."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield (node.end_lineno or node.lineno) - node.lineno + 1


def modules_calling(
    names: dict[Path, str], called: set[str], rooms: tuple[str, ...], without: tuple[str, ...] = ()
) -> list[str]:
    """The modules of `rooms` that call a function called so."""
    found = []
    for path, text in names.items():
        name = path.as_posix()
        if path.parts[0] in rooms and not name.startswith(without) and called & set(calls(text)):
            found.append(name)
    return found


def calls(text: str) -> Iterator[str]:
    """The plain name of every call; `name()` for a call of what a call gave."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            made = node.func.func if isinstance(node.func, ast.Call) else node.func
            if isinstance(made, ast.Name):
                yield made.id + "()" * isinstance(node.func, ast.Call)


def contracts(root: Path) -> list[object]:
    """The import contracts of pyproject.toml."""
    return list(tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"])


def extensions(root: Path) -> dict[str, int]:
    """Files that each example of "Add ..." in docs/architecture.md touches."""
    page = root / "docs/architecture.md"
    text = page.read_text() if page.is_file() else ""
    parts = re.findall(r"^### Add (.+?)\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    return {name: len(set(re.findall(r"^\+\+\+ b/(\S+)", body, re.MULTILINE))) for name, body in parts}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    figures = measure(options.root)
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    for name, figure in figures.items():
        print(f"{name:28} {len(figure) if isinstance(figure, list) else figure}")
        for line in figure if isinstance(figure, list) else ():
            print(f"{'':28}   {line}")


if __name__ == "__main__":
    main()
