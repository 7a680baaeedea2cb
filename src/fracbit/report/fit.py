"""The results of a study: scaling curves, offsets between precisions, the Pareto front, and a recommendation.

arXiv:2212.09720, Sec. 4: bivariate power functions of parameters and bits fit poorly. Instead, straight lines over
log2(total model bits) join the points of each precision. The curves are nearly parallel, so a precision is described by
its offset from another. Both are computed here, so that readers can see which one fits their rows.

Confidence intervals resample the windows of the text, the same windows for every row: differences between rows are paired.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.stats import pearsonr

from fracbit.records.row import Row, label, run_key
from fracbit.report.slices import Slice, slice_of

Floats = NDArray[np.float64]

FLOAT_BITS = 16
LEVEL = 0.95
DRAWS = 400


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class CurveOffset:
    """How a precision differs from the reference precision, within one slice.

    `loss`: nats per token above the reference curve at equal total bits (negative: better), the mean over the sizes
    that both curves cover; None if there are none. `shift`: log2 of the factor of total bits that it needs for the
    reference's loss (negative: it needs fewer); None if no shift makes the curves overlap.
    """

    bits: int
    reference: int
    loss: Interval | None
    shift: Interval | None


@dataclass(frozen=True)
class PowerLaw:
    """nll = floor + scale * parameters^-alpha * bits^-beta, by least squares; `rms` of its residuals in nats.

    `interpolation_rms`: of interpolating each inner point of each precision from its neighbours, for comparison on the
    same rows; None with fewer than three models.
    """

    floor: float
    scale: float
    alpha: float
    beta: float
    rms: float
    spread: float
    interpolation_rms: float | None


@dataclass(frozen=True)
class Advice:
    """The recommendation for a memory size: `sentence` states it; `doubt` names another choice that may be as good."""

    budget_bits: float
    row: Row
    sentence: str
    doubt: str = ""


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Finished rows in comparable groups, by their text (its hash) and windows.

    Of runs that differ only in their zero-shot tasks, the one with the most tasks is used.
    """
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row.status == "done" and row.nll is not None:
            group = found[f"{row.text_sha256[:12]}/{len(row.window_nll)}/{sum(row.window_tokens)}"]
            run = _without_tasks(row)
            if run not in group or len(group[run].accuracies) < len(row.accuracies):
                group[run] = row
    return {name: list(members.values()) for name, members in found.items()}


def _without_tasks(row: Row) -> str:
    """The key that the row's run would have without tasks."""
    evaluation = row.run.evaluation.model_copy(update={"tasks": (), "limit": None})
    return run_key(row.run.model_copy(update={"evaluation": evaluation}))


def bits_of(row: Row) -> int:
    """The precision of a row: bits per code, 16 for a float model."""
    return row.run.recipe.scheme.bits if row.run.quantized else FLOAT_BITS


def slices(rows: Sequence[Row], precisions: int = 3, models: int = 2) -> dict[Slice, list[Row]]:
    """Slices with at least so many precisions and models, each with the float rows added; the largest first."""
    found: dict[Slice, list[Row]] = defaultdict(list)
    seen: set[tuple[Slice, str, str | None, int]] = set()
    for row in rows:
        recipe = row.run.recipe
        point = (slice_of(row), recipe.model, recipe.revision, bits_of(row))
        if row.run.quantized and point not in seen:  # one seed of several
            seen.add(point)
            found[point[0]].append(row)
    floats = [row for row in rows if not row.run.quantized]
    enough = {
        part: [*members, *floats]
        for part, members in found.items()
        if len({bits_of(row) for row in members}) >= precisions
        and len({row.run.recipe.model for row in members}) >= models
    }
    # Of slices of equal size, the usual choices come first: blocks of 64, and int.
    return dict(
        sorted(enough.items(), key=lambda i: (-len(i[1]), i[0].block != "64", i[0].dtype != "int", str(i[0])))
    )


def size_of(row: Row) -> float:
    """log2 of the total bits of the model."""
    return math.log2(row.model_bits)


def front(rows: Sequence[Row]) -> list[Row]:
    """The Pareto front by size: no other row has a smaller loss with at most as many bits."""
    best, kept = math.inf, []
    for row in sorted(rows, key=lambda row: (row.model_bits, row.nll or 0.0)):
        if row.nll is not None and row.nll < best:
            best = row.nll
            kept.append(row)
    return kept


def offsets(rows: Sequence[Row], reference: int = 4, draws: int = DRAWS, seed: int = 0) -> list[CurveOffset]:
    """Offsets of every precision of a slice from the `reference` precision, with bootstrap intervals over windows.

    Both curves use only the models that both precisions have, because a missing model would bend one of them.
    """
    if reference not in {bits_of(row) for row in rows}:
        return []
    points = sorted(rows, key=size_of)
    losses = resampled(points, draws, seed)  # [1 + draws, rows], the first as measured
    precision = np.array([bits_of(row) for row in points])
    sizes = np.array([size_of(row) for row in points])
    models = np.array([row.run.recipe.model for row in points])
    found = []
    for bits in sorted(set(precision.tolist()) - {reference}):
        shared = set(models[precision == bits]) & set(models[precision == reference])
        both = np.isin(models, list(shared))
        own, base = (np.flatnonzero(both & (precision == width)) for width in (bits, reference))
        if not shared:
            found.append(CurveOffset(bits, reference, None, None))
            continue
        curves = (sizes[own], losses[:, own], sizes[base], losses[:, base])
        found.append(CurveOffset(bits, reference, _interval(_gaps(*curves)), _interval(_shifts(*curves))))
    return found


def resampled(rows: Sequence[Row], draws: int, seed: int) -> Floats:
    """Losses [1 + draws, rows] in nats per token: as measured, then of `draws` resamplings of the windows of the text.

    Every draw takes the same windows for all rows. Rows must share their windows (`groups`).
    """
    sums = np.array([row.window_nll for row in rows])  # [rows, windows]
    tokens = np.array(rows[0].window_tokens, dtype=np.float64)
    count = len(tokens)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
    weights = np.vstack([np.ones((1, count)), weights])
    return np.asarray(weights @ sums.T / (weights @ tokens)[:, None], dtype=np.float64)


def difference(row: Row, other: Row, draws: int = 2000, seed: int = 0) -> Interval:
    """Loss of `row` above that of `other` in nats per token, paired over windows."""
    losses = resampled([row, other], draws, seed)
    found = _interval(losses[:, 0] - losses[:, 1])
    assert found is not None
    return found


def power_law(rows: Sequence[Row]) -> PowerLaw | None:
    """The bivariate power law of a slice, and the error of straight lines on it; None with fewer than six rows."""
    if len(rows) < 6:
        return None
    size = np.log([row.parameters for row in rows])
    bits = np.log([bits_of(row) for row in rows])
    loss = np.array([row.nll for row in rows], dtype=np.float64)

    def residual(p: Floats) -> Floats:
        return np.asarray(p[0] + np.exp(p[1] - p[2] * (size - size.mean()) - p[3] * bits) - loss)

    starts = [(loss.min() * share, math.log(max(float(np.ptp(loss)), 1e-3)), alpha, beta)
              for share in (0.5, 0.9) for alpha in (0.1, 0.5) for beta in (1.0, 4.0)]  # fmt: skip
    bounds = ([0.0, -20.0, 0.0, 0.0], [np.inf, 20.0, 5.0, 20.0])
    tries = [least_squares(residual, start, bounds=bounds, max_nfev=2000) for start in starts]
    best = min(tries, key=lambda fit: float(fit.cost))
    floor, log_scale, alpha, beta = (float(value) for value in best.x)
    scale = math.exp(min(700.0, log_scale + alpha * float(size.mean())))
    rms = math.sqrt(2 * float(best.cost) / len(rows))
    return PowerLaw(
        floor,
        scale,
        alpha=alpha,
        beta=beta,
        rms=rms,
        spread=float(loss.std()),
        interpolation_rms=_left_out(rows),
    )


def correlation(rows: Sequence[Row], task: str) -> tuple[float, int] | None:
    """Pearson correlation of loss and accuracy of a task, and the number of rows; None with fewer than three."""
    pairs = [
        (row.nll, row.accuracies[task]) for row in rows if row.nll is not None and task in row.accuracies
    ]
    if len(pairs) < 3 or len({pair[1] for pair in pairs}) == 1:
        return None
    return float(pearsonr(*zip(*pairs, strict=True)).statistic), len(pairs)


def advise(rows: Sequence[Row], budget_bits: float) -> Advice | None:
    """The best row of at most `budget_bits` in total, in words; None when nothing fits."""
    fitting = sorted((row for row in rows if row.model_bits <= budget_bits), key=lambda row: row.nll or 0.0)
    if not fitting:
        return None
    best = fitting[0]
    found = f"perplexity {_perplexity(best)} in {size_text(best.model_bits)}"
    sentence = f"for {size_text(budget_bits)} of memory, use {in_words(best)}: {found}"
    other = next((row for row in fitting if _choice(row) != _choice(best)), None)
    return Advice(budget_bits, best, sentence, _doubt(best, other) if other else "")


def in_words(row: Row) -> str:
    """`tales-m at 4 bits (nf, block 64)`, or `tales-m in 16-bit float`."""
    name = row.run.recipe.model.rstrip("/").rsplit("/", 1)[-1]
    return (
        f"{name} at {bits_of(row)} bits ({slice_of(row)})" if row.run.quantized else f"{name} in 16-bit float"
    )


def size_text(bits: float) -> str:
    """Bits as kB, MB or GB, decimal."""
    size = bits / 8
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"


def _choice(row: Row) -> tuple[str, int]:
    return row.run.recipe.model, bits_of(row)


def _doubt(best: Row, other: Row) -> str:
    apart = difference(other, best)
    if apart.low > 0:
        return ""
    return f"{in_words(other)} is not distinguishable from it on this text ({apart.low:+.4f} to {apart.high:+.4f} nats)"


def _perplexity(row: Row) -> str:
    return label(row.run) if row.nll is None else f"{math.exp(min(row.nll, 700)):.4g}"


def _gaps(x: Floats, y: Floats, base_x: Floats, base_y: Floats) -> Floats:
    """Mean height of an interpolated curve over another where both have points, for every row of `y` and `base_y`.

    `x` [points] ascending, `y` [draws, points]; returns [draws], nan where the curves do not overlap.
    """
    low, high = max(x[0], base_x[0]), min(x[-1], base_x[-1])
    if len(x) < 2 or len(base_x) < 2 or low >= high:
        return np.full(len(y), math.nan)
    at = np.linspace(low, high, 65)
    return np.asarray((y @ _reader(x, at) - base_y @ _reader(base_x, at)).mean(1))


def _shifts(x: Floats, y: Floats, base_x: Floats, base_y: Floats) -> Floats:
    """The shift along the size axis that fits a curve best to another, with an overlap of half the shorter one."""
    if len(x) < 2 or len(base_x) < 2:
        return np.full(len(y), math.nan)
    need = 0.5 * min(x[-1] - x[0], base_x[-1] - base_x[0])
    tried = np.arange(-4.0, 4.0001, 0.02)
    misfits = np.array(
        [_misfits(x - shift, y, base_x=base_x, base_y=base_y, need=need) for shift in tried]
    )  # [shifts, draws]
    possible = np.flatnonzero(np.isfinite(misfits[:, 0]))
    best = misfits.argmin(0)
    # A best shift at the limit of the overlap means that the curves do not fit each other.
    inside = (
        (best > possible.min()) & (best < possible.max())
        if len(possible)
        else np.zeros(len(best), dtype=bool)
    )
    return np.asarray(np.where(inside, tried[best], math.nan))


def _misfits(x: Floats, y: Floats, base_x: Floats, base_y: Floats, need: float) -> Floats:
    low, high = max(x[0], base_x[0]), min(x[-1], base_x[-1])
    if high - low < need:
        return np.full(len(y), math.inf)
    at = np.linspace(low, high, 33)
    return np.asarray(np.square(y @ _reader(x, at) - base_y @ _reader(base_x, at)).mean(1))


def _reader(x: Floats, at: Floats) -> Floats:
    """Linear interpolation as a matrix [points, positions]: values at `x` times this matrix are values at `at`."""
    return np.array([np.interp(at, x, unit) for unit in np.eye(len(x))])


def _interval(values: Floats) -> Interval | None:
    """The first value, with percentiles of the others without NaN; None when the first is NaN."""
    if math.isnan(values[0]):
        return None
    drawn = values[1:][~np.isnan(values[1:])]
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(drawn, [tail, 100 - tail]) if len(drawn) else (math.nan, math.nan)
    return Interval(float(values[0]), float(low), float(high))


def _left_out(rows: Sequence[Row]) -> float | None:
    errors: list[float] = []
    key: Callable[[Row], int] = bits_of
    for bits in {key(row) for row in rows}:
        points = sorted((row for row in rows if key(row) == bits), key=size_of)
        x, y = (
            np.array([size_of(row) for row in points]),
            np.array([row.nll for row in points], dtype=np.float64),
        )
        for inner in range(1, len(points) - 1):
            rest = np.arange(len(points)) != inner
            errors.append(float(np.interp(x[inner], x[rest], y[rest]) - y[inner]))
    return math.sqrt(float(np.mean(np.square(errors)))) if errors else None
