"""`Engine`: a program that runs exported files, in an environment of its own. One file and one line in records/tables.py each.

fracbit is not installed there. A runner, a script of the folder runners/, loads an export and answers with what the engine
makes of it: log-probabilities of a text, greedy tokens, decoded weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fracbit.records import tables
from fracbit.records.tables import Table

RUNNERS = Path(__file__).resolve().parent / "runners"


@dataclass(frozen=True)
class Engine:
    """An engine, how it is installed, and what it runs.

    - `title`: what people call it; `formats`: export formats that it runs, the usual one first.
    - `installs`: arguments of `pip install`, one call after another; `removes`: packages that must go afterwards.
    - `runner`: a file of runners/; `dtype`: what the engine computes in when its answers are compared,
      "" where it only decodes weights.
    - `variables`: environment variables that it needs.
    """

    title: str
    formats: tuple[str, ...]
    installs: tuple[tuple[str, ...], ...]
    runner: str
    dtype: str = "float32"
    removes: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


ENGINES: Table[Engine] = tables.ENGINES
