"""Environments of engines: virtual environments in one folder, made when they are first needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import venv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fracbit.engines.engine import ServingEngine
from fracbit.errors import EngineError

ENVIRONMENTS = Path("~/.cache/fracbit/engines")
DONE = ".installed"
MAKING = ".making"
"""Begins to stand in a folder before anything else, so that what a killed run left is known as such."""


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
    """The interpreter of the virtual environment `place`, into which pip has installed everything, one call after another.

    One that was not finished, or of other packages, is made again from nothing. Raises `EngineError`.
    """
    python, done = place / "bin" / "python", place / DONE
    wanted = "\n".join([*map(" ".join, installs), *(f"- {name}" for name in removes)])
    if done.is_file() and done.read_text() == wanted:
        return python
    if announce is not None:
        announce(
            f"making the environment {place}: pip install {'; '.join(' '.join(words) for words in installs)}"
        )
    _empty(place)
    venv.create(place, with_pip=True)
    for words in installs:
        _pip(place, ["install", "--quiet", *words], variables or {})
    if removes:
        _pip(place, ["uninstall", "--quiet", "--yes", *removes], {})
    if build is not None:
        build(place)
    done.write_text(wanted)
    (place / MAKING).unlink()
    return python


def _empty(place: Path) -> None:
    """Make the folder, without what an earlier run left. Raises `EngineError` for a folder that is no environment."""
    if place.exists() and not place.is_dir():
        raise EngineError(f"{place} is a file; remove it, or name another folder with --environments")
    known = any((place / name).is_file() for name in (MAKING, DONE, "pyvenv.cfg"))
    if place.is_dir() and any(place.iterdir()):
        if not known:
            raise EngineError(
                f"{place} holds something that is no environment; move it, or name another folder with --environments"
            )
        shutil.rmtree(place)
    place.mkdir(parents=True, exist_ok=True)
    (place / MAKING).touch()


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
