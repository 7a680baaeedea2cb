"""Environments of engines: virtual environments in one folder, made when they are first needed."""

from __future__ import annotations

import os
import subprocess
import venv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fracbit.engines.engine import ServingEngine
from fracbit.errors import EngineError

ENVIRONMENTS = Path("~/.cache/fracbit/engines")
DONE = ".installed"


def environment(
    name: str,
    engine: ServingEngine,
    folder: str | Path = ENVIRONMENTS,
    announce: Callable[[str], None] | None = None,
) -> Path:
    """The interpreter of an engine's environment, `folder`/`name`; a missing one is made, which `announce` is told before.

    Raises `EngineError` with pip's last words.
    """
    place = Path(folder).expanduser() / name
    return made(
        place,
        engine.installs,
        engine.removes,
        variables=engine.variables,
        build=engine.build,
        announce=announce,
    )


def made(
    place: Path,
    installs: Sequence[Sequence[str]],
    removes: Sequence[str] = (),
    *,
    variables: Mapping[str, str] | None = None,
    build: Callable[[Path], None] | None = None,
    announce: Callable[[str], None] | None = None,
) -> Path:
    """The interpreter of the virtual environment `place`, into which pip has installed everything, one call after another."""
    python, done = place / "bin" / "python", place / DONE
    wanted = "\n".join([*map(" ".join, installs), *(f"- {name}" for name in removes)])
    if done.is_file() and done.read_text() == wanted:
        return python
    if announce is not None:
        announce(
            f"making the environment {place}: pip install {'; '.join(' '.join(words) for words in installs)}"
        )
    venv.create(place, with_pip=True)
    for words in installs:
        _pip(place, ["install", "--quiet", *words], variables or {})
    if removes:
        _pip(place, ["uninstall", "--quiet", "--yes", *removes], {})
    if build is not None:
        build(place)
    done.write_text(wanted)
    return python


def _pip(place: Path, words: Sequence[str], variables: Mapping[str, str]) -> None:
    command = [str(place / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", *words]
    ran = subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    if ran.returncode:
        last = " ".join(ran.stderr.strip().splitlines()[-3:])
        raise EngineError(
            f"{place} cannot be made, `pip {' '.join(words)}` failed: {last}; install it by hand, or name a folder that has it "
            "with --environments"
        )
