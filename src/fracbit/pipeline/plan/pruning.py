"""Pruning by a score: which blocks are dropped, a comparison with fewer bits for them, and the smaller checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fracbit.checkpoint.opened import open_float
from fracbit.errors import RecipeError
from fracbit.pipeline.plan.scoring import LOW, make_scores
from fracbit.pipeline.study.prune import Pruned, least_important, prune
from fracbit.pipeline.study.prune_comparison import Point, compare_with_quantizing
from fracbit.pipeline.study.study import Study
from fracbit.records.allocation import read_level
from fracbit.records.progress import Progress
from fracbit.records.scheme import Scheme
from fracbit.records.scores import Scores, check_scores, load_scores
from fracbit.records.spending import LENGTH, SAMPLES
from fracbit.records.text_source import check_source

HIGH = "int4z/64"


@dataclass(frozen=True)
class Pruning:
    """Scores of blocks, the dropped blocks, and the comparison and the written model if they were requested."""

    scores: Scores
    dropped: tuple[str, ...]
    comparison: Mapping[str, Sequence[Point]] | None
    written: Pruned | None


def prune_by_score(
    model: str | Path,
    output: str | Path | None = None,
    *,
    drop: int = 1,
    score: str = "lim",
    text: str | None = None,
    held_out: str | None = None,
    high: Scheme | str | None = HIGH,
    low: Scheme | str | None = LOW,
    samples: int = SAMPLES,
    length: int = LENGTH,
    seed: int = 0,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Pruning:
    """Write a float model without its `drop` least important blocks into the folder `output`.

    - `score`: the name of a score, or a JSON file of scores of blocks; `text`: the text that it reads, if any.
    - `held_out`: other text, on which dropping is compared with lowering blocks from `high` to `low` in the same order.
    - `trust_remote_code`: run the model's own code.

    Raises `RecipeError`, `SourceError`, `DataError`, `OutputError`.
    """
    if text is not None:
        check_source(text, written=True)
    if held_out is not None:
        check_source(held_out)
    study = Study(open_float(model, trust_remote_code=trust_remote_code), seed, progress)
    float_model = study.float_model
    units = float_model.weights.units("block")
    names = [unit.name for unit in units]
    # Choose the blocks to drop.
    scores = _given(score, names, float_model.weights.fingerprint)
    if scores is None:
        ids = study.seen(text, samples, length).ids if text else None
        scores = make_scores(
            float_model, units, score, scheme=read_level(low), ids=ids, seed=seed, progress=progress
        )
    dropped = least_important(scores, drop, names)
    # Compare with lowering them.
    lines = None
    if held_out is not None:
        lines = compare_with_quantizing(
            float_model,
            units,
            scores,
            high=read_level(high),
            low=read_level(low),
            held_out=study.held_out(held_out, samples, length).ids,
            progress=progress,
        )
    written = None if output is None else prune(study.opened, dropped, output, overwrite)
    return Pruning(scores, dropped, lines, written)


def _given(score: str, names: Sequence[str], model: str) -> Scores | None:
    """The scores of a JSON file, which must be of this model; None when `score` is the name of a score."""
    if Path(score).suffix != ".json":
        return None
    loaded = load_scores(Path(score))
    if not isinstance(loaded, Scores):
        raise RecipeError(f"{score} holds losses; pruning needs scores, one number per block")
    check_scores(loaded, names, model)
    return loaded
