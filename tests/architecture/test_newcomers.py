"""The pages for newcomers hold: the tutorial's commands run, the glossary names what exists, every example diff applies."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fracbit

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src/fracbit"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_commands_of_the_tutorial_run() -> None:
    words = [sys.executable, str(ROOT / "bench/tutorial.py"), "--check"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_reference_begins_with_everything_that_the_package_offers() -> None:
    page = (ROOT / "docs/api/fracbit.rst").read_text()
    named = re.findall(r"^\.\. auto(?:function|class):: fracbit\.(\w+)$", page, re.MULTILINE)
    assert sorted(named) == sorted(set(fracbit.__all__) - {"__version__"})


def glossary() -> list[tuple[str, str]]:
    """(word, where it belongs) of every line."""
    lines = re.findall(r"^\| (.+?) \|.*\| (.*?) ?\|$", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE)
    return [(word, where) for word, where in lines if word not in ("word", "---")]


def test_glossary_is_in_alphabetical_order_and_has_each_word_once() -> None:
    words = [word.lower() for word, _ in glossary()]
    assert len(words) > 80
    assert words == sorted(set(words))


@pytest.mark.parametrize(("word", "where"), glossary(), ids=[word for word, _ in glossary()])
def test_what_the_glossary_names_exists(word: str, where: str) -> None:
    for path in re.findall(r"(?<![\w/])[a-z]+/(?:[\w/]+\.py)?(?!\w)", where):
        assert (ROOT / path).exists() or (PACKAGE / path).exists(), f"{word}: there is no {path}"
    for names, path in re.findall(r"((?:`[\w.]+`(?:, )?)+), ([\w/]+\.py)", where):
        text = (PACKAGE / path).read_text()
        for name in re.findall(r"`(\w+)", names):
            assert re.search(rf"^(class|def) {name}\b|^{name}\b", text, re.MULTILINE), f"{path} has no {name}"


def example_diffs() -> list[tuple[str, str]]:
    """(kind of thing, diff) of every example of docs/architecture.md."""
    page = (ROOT / "docs/architecture.md").read_text()
    return re.findall(r"^### Add (.+?)\n.*?^```diff\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("kind", "diff"), example_diffs(), ids=[kind for kind, _ in example_diffs()])
def test_an_example_of_an_extension_applies(kind: str, diff: str) -> None:
    words = ["git", "apply", "--check", "-"]
    done = subprocess.run(words, cwd=ROOT, input=diff, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("kind", "diff"), example_diffs(), ids=[kind for kind, _ in example_diffs()])
def test_what_an_example_imports_exists(kind: str, diff: str) -> None:
    new = {path.replace("/", ".") for path in re.findall(r"^\+\+\+ b/src/(\S+)\.py", diff, re.MULTILINE)}
    for module, names in re.findall(r"^\+from (fracbit\.\S+) import (.+)$", diff, re.MULTILINE):
        for name in names.split(", "):
            assert module in new or hasattr(importlib.import_module(module), name), f"{module} has no {name}"


def test_there_is_an_example_for_every_kind() -> None:
    assert len(example_diffs()) >= 9
