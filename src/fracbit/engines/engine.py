"""`ServingEngine`: a program that runs exported files, in an environment of its own. Each is a file and a line of tables.py.

fracbit is not installed there. A runner, a script of the folder runners/, loads an export and answers with what the engine
makes of it: log-probabilities of a text, greedy tokens, decoded weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fracbit.checkpoint.export.exporter import Nearest
from fracbit.checkpoint.format import StoredLayer
from fracbit.records import tables
from fracbit.records.generating import Load, Speed
from fracbit.records.scheme import Scheme
from fracbit.records.tables import Table

RUNNERS = Path(__file__).resolve().parent / "runners"


class Forms(Protocol):
    """The forms of layers that an engine serves."""

    @property
    def embeddings(self) -> bool:
        """Whether embedding tables may be quantized."""
        ...

    @property
    def levels(self) -> Sequence[Scheme]:
        """Schemes near which a budget finds those that some layer may have."""
        ...

    def nearest(self, layer: StoredLayer) -> Nearest:
        """The nearest form of a layer."""
        ...

    def with_scales(self, kind: str) -> Forms:
        """The same with scales of this type alone."""
        ...


USUAL = Scheme("int:step", 4, 64, offset="zero")


@dataclass(frozen=True)
class ServingEngine:
    """An engine, how it is installed, and what it runs.

    - `title`: what people call it; `formats`: export formats that it runs, the usual one first.
    - `installs`: arguments of `pip install`, one call after another; `removes`: packages that must go afterwards.
    - `runner`: a file of runners/; `dtype`: what the engine computes in when its answers are compared,
      "" where it only decodes weights.
    - `variables`: environment variables that it needs; `build`: builds into its environment what pip does not install.
    - `serves`: what `--for` may quantize to; None: nothing is quantized for it. `usual`: near what, unless one asks.
    - `speed`: measures an export, (environment, export, what is run, threads) -> tokens per second.
    - `fused`: linears that read one input must have one scheme; `head`: the output head may be quantized; `casts_scales`:
      scales are cast to the type of the model.
    """

    title: str
    formats: tuple[str, ...]
    installs: tuple[tuple[str, ...], ...]
    runner: str
    dtype: str = "float32"
    removes: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    build: Callable[[Path], None] | None = None
    serves: Forms | None = None
    usual: Scheme = USUAL
    speed: Callable[[Path, Path, Load, int], Speed] | None = None
    fused: bool = False
    head: bool = False
    casts_scales: bool = False


ENGINES: Table[ServingEngine] = tables.ENGINES
