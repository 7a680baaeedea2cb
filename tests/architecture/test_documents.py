"""Every path, link and command in the README and the guides exists.

Commands are the lines of unlabelled, bash, sh and console blocks that start with a program named in CHECKS;
`fracbit` lines are parsed by the program's own parser, so that a renamed command or option fails here. Python
blocks must compile, and what they take from fracbit must exist.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
# A log speaks of what is gone; its links still have to work.
COMMANDED = [path for path in GUIDES if path.name != "LOG.md"]
SHELL = {"", "bash", "sh", "shell", "console"}
CONNECTIVES = {"|", "||", "&&", ";", ">", ">>", "2>", "&"}
FOLDERS = ("src", "docs", "tests", "bench", "examples", ".ci")


def document_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, body) of every fenced block."""
    for found in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield found[1], found[2]


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The words of every simple command in the shell blocks."""
    found: list[list[str]] = []
    for language, body in blocks(text):
        if language in SHELL:
            for line in body.replace("\\\n", " ").splitlines():
                found += split_line(line.strip().removeprefix("$ "))
    return found


def split_line(line: str) -> list[list[str]]:
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # prose or output in a block, with a lone apostrophe
        return []
    parts: list[list[str]] = [[]]
    for word in words:
        if word in CONNECTIVES:
            parts.append([])
        elif parts[-1] or not re.fullmatch(r"\w+=.*", word):  # a leading NAME=value is not the program
            parts[-1].append(word)
    return [part for part in parts if part]


def check_fracbit(words: list[str]) -> None:
    import typer.main

    from fracbit.cli import app

    parse(typer.main.get_command(app), "fracbit", words)


def parse(command: Any, name: str, words: list[str]) -> None:
    """Parse `words` as `command` would, subcommands included, without converting values or running it."""
    context = command.context_class(command, info_name=name)
    _, rest, _ = command.make_parser(context).parse_args(args=list(words))
    subcommands = getattr(command, "commands", None)
    if subcommands is None:
        assert not rest, f"{name} takes no {rest}"
    elif rest:
        assert rest[0] in subcommands, f"{name} has no command {rest[0]!r}, only {sorted(subcommands)}"
        parse(subcommands[rest[0]], f"{name} {rest[0]}", rest[1:])


def check_make(words: list[str]) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for word in words:
        assert "=" in word or word in targets, f"the Makefile has no target {word!r}"


def check_python(words: list[str]) -> None:
    if words[:2] == ["-m", "fracbit"]:
        check_fracbit(words[2:])
    elif words and words[0].endswith(".py"):
        assert (ROOT / words[0]).is_file(), f"there is no {words[0]}"


def check_bash(words: list[str]) -> None:
    assert (ROOT / words[0]).is_file(), f"there is no {words[0]}"


def check_pip(words: list[str]) -> None:
    extras = set(re.findall(r"^([\w-]+) = \[", optional_dependencies(), re.MULTILINE))
    for word in words:
        named = re.fullmatch(r"(?:\.|fracbit)\[(.+)\]", word)
        unknown = set(named[1].split(",")) - extras if named else set()
        assert not unknown, f"pyproject.toml has no extra {sorted(unknown)}, only {sorted(extras)}"


def optional_dependencies() -> str:
    text = (ROOT / "pyproject.toml").read_text()
    return text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "fracbit": check_fracbit,
    "make": check_make,
    "python": check_python,
    "python3": check_python,
    "bash": check_bash,
    "pip": check_pip,
}


@pytest.mark.parametrize("path", COMMANDED, ids=document_id)
def test_every_command_is_one_that_exists(path: Path) -> None:
    for program, *words in commands(path.read_text()):
        check = CHECKS.get(program.rpartition("/")[2])
        if check:
            check(words)


@pytest.mark.parametrize("path", GUIDES, ids=document_id)
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)|(?:src|srcset|href)=\"([^\"]+)\"", prose(path.read_text()))
    for target in (first or second for first, second in targets):
        if not re.match(r"[a-z]+:|#", target):
            assert (path.parent / target.partition("#")[0]).exists(), f"{document_id(path)} links to {target}"


@pytest.mark.parametrize("path", COMMANDED, ids=document_id)
def test_every_path_of_the_repository_exists(path: Path) -> None:
    text = prose(path.read_text())
    for named in re.findall(rf"(?<![\w/.])((?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*\w)", text):
        assert (ROOT / named).exists(), f"{document_id(path)} speaks of {named}"


@pytest.mark.parametrize("path", COMMANDED, ids=document_id)
def test_python_blocks_use_what_exists(path: Path) -> None:
    for language, body in blocks(path.read_text()):
        if language == "python":
            for node in ast.walk(ast.parse(body)):
                check_names(node)


def check_names(node: ast.AST) -> None:
    if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "fracbit":
        module = importlib.import_module(node.module or "")
        for alias in node.names:
            assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fracbit":
        assert hasattr(importlib.import_module("fracbit"), node.attr), f"fracbit has no {node.attr}"


def test_readme_gives_the_two_commands() -> None:
    readme = commands((ROOT / "README.md").read_text())
    assert ["make", "demo"] in readme
    assert ["make", "test"] in readme


def test_the_parser_refuses_what_the_program_would() -> None:
    """The checker itself: unknown commands, options and surplus arguments fail, good lines pass."""
    import typer
    import typer.main

    app = typer.Typer()

    @app.command()
    def squeeze(model: str, bits: int = typer.Option(4, "--bits", "-b")) -> None: ...

    @app.command()
    def show() -> None: ...

    command = typer.main.get_command(app)
    parse(command, "fracbit", ["squeeze", "MODEL", "--bits", "3"])
    parse(command, "fracbit", ["squeeze", "--help"])
    for words in (["crush"], ["squeeze", "MODEL", "--bit-width", "3"], ["show", "MODEL"]):
        with pytest.raises(Exception, match=r"no command|[Nn]o such option|takes no"):
            parse(command, "fracbit", words)


def test_lines_are_split_like_a_shell_would() -> None:
    assert split_line("FRACBIT_SHARED=x make test | tail -1  # comment") == [["make", "test"], ["tail", "-1"]]
    assert split_line("it doesn't parse") == []
