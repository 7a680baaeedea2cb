"""The speed of a checkpoint beside that of an engine on its export: in one run, in turns, so that a busy machine hits both.

A turn measures both, as `measure` does; ratios are of turns. The export is made for the measurement and removed.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fracbit.checkpoint.export.exporter import export
from fracbit.checkpoint.load import load
from fracbit.engines.engine import ENGINES, ServingEngine
from fracbit.engines.environments import ENVIRONMENTS, environment
from fracbit.errors import RecipeError
from fracbit.pipeline.serve.generation import check_room, choose_activations
from fracbit.pipeline.serve.speed import activations_of, prompt_of, speed_of
from fracbit.records.generating import Load, Speed

TURNS = 5


@dataclass(frozen=True)
class Turn:
    """Both speeds, measured one after the other."""

    own: Speed
    engine: Speed


@dataclass(frozen=True)
class BesideEngine:
    """A checkpoint beside an engine: every turn, on so many threads, and the bytes of both files.

    `step`: how fracbit made a token.
    """

    engine: str
    turns: tuple[Turn, ...]
    threads: int
    step: str
    file_bytes: int

    @property
    def prefill(self) -> tuple[float, float, float]:
        """Our speed of reading prompts over the engine's: median, least and largest of the turns."""
        return _spread([turn.own.prefill / turn.engine.prefill for turn in self.turns])

    @property
    def decode(self) -> tuple[float, float, float]:
        """Our speed of new tokens over the engine's: median, least and largest of the turns."""
        return _spread([turn.own.decode / turn.engine.decode for turn in self.turns])

    def to_json(self) -> dict[str, Any]:
        """All turns and the ratios."""
        return asdict(self) | {"prefill_ratio": list(self.prefill), "decode_ratio": list(self.decode)}

    def __str__(self) -> str:
        return "\n".join([
            f"beside {self.engine} ({len(self.turns)} turns, threads: {self.threads}), medians in tokens/s:",
            self._line("prefill", self.prefill),
            self._line("decode", self.decode),
        ])  # fmt: skip

    def _line(self, what: str, ratio: tuple[float, float, float]) -> str:
        own, theirs = (
            statistics.median(getattr(getattr(turn, who), what) for turn in self.turns)
            for who in ("own", "engine")
        )
        middle, least, most = ratio
        return (
            f"  {what} {own:.1f} beside {theirs:.1f}: {middle:.2f} times as fast ({least:.2f} to {most:.2f})"
        )


def check_benched(name: str) -> None:
    """Raises `RecipeError` for an engine whose speed cannot be measured, or that does not exist."""
    if ENGINES[name].speed is None:
        known = [each for each, engine in ENGINES.items() if engine.speed is not None]
        raise RecipeError(f"the speed of {name} is not measured here; of {', '.join(known)} it is")


def beside_engine(
    checkpoint: str,
    name: str,
    load_: Load,
    *,
    turns: int = TURNS,
    activations: str = "float",
    dtype: str = "auto",
    trust: bool = False,
    environments: str | Path = ENVIRONMENTS,
    announce: Callable[[str], None] | None = None,
) -> BesideEngine:
    """Export a fracbit checkpoint for an engine and measure both, in turns, after one that does not count.

    The engine's environment is made where it is missing. Raises `FormatError` for a layer that its format cannot hold,
    `RecipeError`, `EngineError`, `DataError`.
    """
    check_benched(name)
    path, engine = activations_of(activations), ENGINES[name]
    with tempfile.TemporaryDirectory(prefix="fracbit-") as folder:
        made = export(
            checkpoint, Path(folder) / "export", engine.formats[0], trust_remote_code=trust, progress=None
        )
        place = environment(name, engine, environments, announce).parent.parent
        model = load(checkpoint, dtype, trust_remote_code=trust)
        check_room(model, load_.prompt_tokens, load_.new_tokens)
        choose_activations(model, path)
        ids, threads = prompt_of(model, load_.prompt_tokens), torch.get_num_threads()
        found: list[Turn] = []
        for _ in range(turns + 1):
            own, _, step = speed_of(model, ids, load_.new_tokens, load_.kv_bits)
            found.append(Turn(own, _of_engine(engine, place, Path(made.output), load_, threads=threads)))
    return BesideEngine(engine.title, tuple(found[1:]), threads, step=step, file_bytes=made.bytes)


def _of_engine(engine: ServingEngine, place: Path, export: Path, load_: Load, *, threads: int) -> Speed:
    assert engine.speed is not None
    return engine.speed(place, export, load_, threads)


def _spread(ratios: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(ratios), min(ratios), max(ratios)
