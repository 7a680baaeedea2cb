"""The documentation site, built by Sphinx with the Furo theme: `make docs` writes build/site.

The source folder is the root of the repository, so that links between README.md, CONTRIBUTING.md and docs/ work on the site as
they do in the repository. Pages are Markdown (MyST). Those in docs/api are made from docstrings, which are plain text with
names in backticks. A link or a docstring that does not resolve is a warning, and `make docs` turns warnings into errors.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
import typing
from collections.abc import Iterator

from docutils import nodes
from pydantic import BaseModel
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import stringify_annotation

import fracbit.checkpoint.load  # noqa: F401  registers fracbit before autodoc imports modules one by one
from fracbit.records.version import __version__

project = "fracbit"
version = release = __version__
project_copyright = "The fracbit authors"

extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc = "docs/index"
include_patterns = ["CHANGELOG.md", "CONTRIBUTING.md", "README.md", "docs/**"]
exclude_patterns = ["docs/conf.py"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"fracbit {version}"
html_copy_source = False
html_show_sphinx = False
html_extra_path = ["site/index.html"]  # leads to the front page
html_static_path = ["site/wide.css"]
html_css_files = ["wide.css"]
html_theme_options = {"top_of_page_buttons": []}

default_role = "py:obj"  # `name` in a docstring is a link where the name is known, else code
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "exclude-members": "model_config"}
autodoc_mock_imports = ["triton", "vllm"]
python_use_unqualified_type_names = True
maximum_signature_line_length = 90
suppress_warnings = ["ref.python"]  # a name that is in two packages: the link goes to the first


class Room(SphinxDirective):
    """`.. room:: fracbit.records`: the docstring of a package and of each module in it, with what they define."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The nodes of one `automodule` for each module."""
        lines = []
        for name, inside in modules_of(self.arguments[0]):
            title = f"``{name}``"
            lines += [title, "-" * len(title), "", f".. automodule:: {name}"]
            lines += ["   :ignore-module-all:", f"   :exclude-members: {', '.join(inside)}"] if inside else []
            lines += [""]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def modules_of(room: str) -> Iterator[tuple[str, list[str]]]:
    """(name, names of the modules inside) of a package and of each public module in it.

    A package shows what it defines itself: not what it takes from its modules, nor a function that has the name of one.
    """
    folder = getattr(importlib.import_module(room), "__path__", ())
    yield room, [found.name for found in pkgutil.iter_modules(folder)]
    for found in pkgutil.walk_packages(folder, f"{room}."):
        if not found.name.rpartition(".")[2].startswith("_"):
            path = importlib.import_module(found.name).__path__ if found.ispkg else ()
            yield found.name, [inner.name for inner in pkgutil.iter_modules(path)]


def fields_of(
    app: Sphinx,
    what: str,
    name: str,
    obj: object,
    options: object,
    signature: str | None,
    returns: str | None,
) -> tuple[str, str | None] | None:
    """The signature of a record: its fields with their types and defaults; None leaves any other object's as it is."""
    if not isinstance(obj, type) or not obj.__module__.startswith("fracbit"):
        return None
    if not dataclasses.is_dataclass(obj) and not issubclass(obj, BaseModel):
        return None
    try:
        hints = typing.get_type_hints(obj)
    except NameError:  # a type that is imported for type checkers alone
        hints = inspect.get_annotations(obj)
    parts = []
    for field, default in defaults_of(obj):
        kind = stringify_annotation(hints[field], "smart")
        parts.append(f"{field}: {kind}" + ("" if default is inspect.Parameter.empty else f" = {default!r}"))
    return f"({', '.join(parts)})", returns


def defaults_of(record: type) -> Iterator[tuple[str, object]]:
    """(name, default) of each field of a record; a field without a default has `inspect.Parameter.empty`."""
    if issubclass(record, BaseModel):
        for name, info in record.model_fields.items():
            yield (
                name,
                inspect.Parameter.empty
                if info.is_required()
                else info.get_default(call_default_factory=True),
            )
        return
    for field in dataclasses.fields(record):
        if field.init and field.default_factory is not dataclasses.MISSING:
            yield field.name, field.default_factory()
        elif field.init:
            missing = field.default is dataclasses.MISSING
            yield field.name, inspect.Parameter.empty if missing else field.default


def as_rest(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Turn a docstring, which is plain text, into reStructuredText: signs are escaped, indented parts and lists set apart."""
    text, literal = [], False
    for line in lines:
        indented = line.startswith("    ")
        if indented and not literal and (not text or not text[-1]):
            text += ["::", ""]
            literal = True
        literal = literal and (indented or not line)
        starts_item = line.startswith("- ") and text and text[-1] and not text[-1].startswith(("- ", "  "))
        text += [""] if starts_item else []
        text.append(line if literal else escaped(line))
    lines[:] = text


def escaped(line: str) -> str:
    """The line with `*`, `|` and trailing `_` made plain wherever they stand outside of backticks."""
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(p if p.startswith("`") else re.sub(r"([*|\\]|_(?=\W|$))", r"\\\1", p) for p in parts)


def setup(app: Sphinx) -> None:
    """Make the directive and the reading of docstrings known to Sphinx."""
    app.add_directive("room", Room)
    app.connect("autodoc-process-docstring", as_rest)
    app.connect("autodoc-process-signature", fields_of)
