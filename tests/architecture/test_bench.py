"""Benches keep up with the code: every script can be imported, which runs nothing, and takes its documented commands.

They run for minutes to hours, so CI cannot run them. What breaks them meanwhile is a renamed function or option: importing all,
in one fresh process without their peers, and parsing the documented commands, notices both.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in BENCH.rglob("*.py"))
README = (BENCH / "README.md").read_text()
LINES = re.findall(r"^\| ([\w/]+\.py) \|.*\| `python (.+)` \|$", README, re.MULTILINE)
GUIDES = "\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
COMMANDS = [command for _, command in LINES] + re.findall(r"^python (bench/[^#\n]+)", GUIDES, re.MULTILINE)
NEEDS_TRITON = ("bench/kernels/gpu.py", "bench/kernels/machine_code.py")

# Imports each script as Python would run it, but for its name; then parses commands without doing what they say.
PROGRAM = """
import argparse, json, runpy, sys

class Parsed(Exception): pass

def stop(parser, *words, kept=argparse.ArgumentParser.parse_args):
    kept(parser, *words)
    raise Parsed

found, path = {}, list(sys.path)
for script, commands in json.loads(sys.stdin.read()).items():
    sys.path[:] = [script.rpartition("/")[0], "bench", *path]
    try:
        names, found[script] = runpy.run_path(script, run_name="imported"), ""
        for words in commands:
            sys.argv, argparse.ArgumentParser.parse_args = [script, *words], stop
            try:
                names["main"]()
            except Parsed:
                pass
    except (ImportError, AttributeError, NameError, TypeError, SystemExit) as error:
        found[script] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes() -> Any:
    """Script -> what went wrong, empty where nothing did; what was printed on the way is there as ""."""
    wanted = [name for name in SCRIPTS if name not in NEEDS_TRITON or find_spec("triton")]
    commands = [shlex.split(command) for command in COMMANDS]
    order = json.dumps({name: [words for script, *words in commands if script == name] for name in wanted})
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, input=order, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    *printed, last = done.stdout.splitlines()
    return json.loads(last) | {"": "\n".join(printed)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_can_be_imported_and_takes_its_commands(script: str, outcomes: dict[str, str]) -> None:
    if script in NEEDS_TRITON and script not in outcomes:
        pytest.skip("Triton is not installed")
    assert not outcomes[script]


def test_importing_runs_nothing(outcomes: dict[str, str]) -> None:
    assert outcomes[""] == ""


def test_the_readme_names_every_script() -> None:
    named = [f"bench/{name}" for name, _ in LINES]
    own = [
        name for name in SCRIPTS if "/peers/" not in name and Path(name).name not in ("frame.py", "plain.py")
    ]
    assert sorted(named) == own
    assert named == [command.split()[0] for _, command in LINES]


def test_the_readme_names_documents_that_exist() -> None:
    for name in re.findall(r"(?<![\w/])((?:docs|bench|tests)/[\w/.-]*\w)", README):
        assert (ROOT / name).exists(), f"bench/README.md speaks of {name}"


@pytest.mark.parametrize("script", [name for name, _ in LINES])
def test_a_docstring_says_which_document_a_script_serves(script: str) -> None:
    """The documents of its line in the README stand in its docstring too."""
    (line,) = (line for line in README.splitlines() if line.startswith(f"| {script} |"))
    docstring = (BENCH / script).read_text().split('"""')[1]
    for document in set(re.findall(r"docs/\w+\.md|README\.md", line)):
        assert document in docstring, f"{script} does not say that it makes something of {document}"


@pytest.mark.parametrize("path", sorted((BENCH / "results").glob("*.json")), ids=lambda path: path.name)
def test_a_result_names_no_folder_of_the_machine_it_was_measured_on(path: Path) -> None:
    commands = re.findall(r'"command": "(.*)"', path.read_text())
    words = [word for command in commands for word in shlex.split(command)]
    assert not [word for word in words if Path(word).is_absolute() or word.startswith("..")]
