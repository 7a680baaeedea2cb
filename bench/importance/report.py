"""From the CSV files of measure.py to the figures of docs/importance.md: a few seconds.

python bench/importance/report.py [--folder docs/importance]

summary.csv                  claims 1 and 2 (mean loss, share of the gap, knee of every order) and claim 3
spearman.csv                 claim 5
orders-MODEL.png             claim 1
depths.png                   claim 3
pruning-MODEL.png            claim 4
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from frame import ROOT, arguments, read_csv

from fracbit.report.pictures import draw_panels, write_csv

Row = dict[str, str]
Losses = Mapping[str, float]
Lines = dict[str, list[float]]
SHOWN = ("best tried", "oracle", "lim", "zd", "first", "mean of random", "reverse:lim", "worst tried")
KNEE = 0.05
HIGH = "int4z/64"


def scores_of(rows: list[Row], model: str, low: str, granularity: str = "block") -> Lines:
    """Score -> values in the order of the units. Dropping has no scheme: scores that need one are those of 2 bits."""
    wanted = ("", "int2z/64" if low == "dropped" else low)
    found: Lines = {}
    for row in rows:
        if (row["model"], row["granularity"]) == (model, granularity) and row["low"] in wanted:
            found.setdefault(row["score"], []).append(float(row["value"]))
    return found


class Subsets:
    """The rows of subsets.csv: what each choice of lowered blocks costs."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows: dict[tuple[str, str, str], list[Row]] = {}
        for row in rows:
            self.rows.setdefault((row["model"], row["high"], row["low"]), []).append(row)
        self.models = list(dict.fromkeys(model for model, _, _ in self.rows))

    def pairs(self, model: str) -> list[tuple[str, str]]:
        return [(high, low) for name, high, low in self.rows if name == model]

    def losses(self, model: str, high: str, low: str, column: str = "nll") -> dict[str, float]:
        return {row["mask"]: float(row[column]) for row in self.rows[model, high, low]}

    def bits(self, model: str, high: str, low: str) -> list[float]:
        """Stored bits per weight by number of lowered blocks; blocks are of one size."""
        found = {row["mask"].count("1"): float(row["bits"]) for row in self.rows[model, high, low]}
        return [found[count] for count in sorted(found)]


def path_of(values: Sequence[float], sign: int = 1) -> list[str]:
    """Masks by number of lowered blocks, the least important first."""
    order = sorted(range(len(values)), key=lambda i: sign * values[i])
    return ["".join("01"[i in order[:count]] for i in range(len(values))) for count in range(len(values) + 1)]


def lines_of(scores: Mapping[str, Sequence[float]], losses: Losses) -> Lines:
    """Every order's loss by number of lowered blocks, the mean over random orders, and the extremes of all that was tried.

    When all choices were tried, the mean of random is over all of them: what a random order gives on average, exactly.
    """
    paths = {name: path_of(values) for name, values in scores.items()}
    paths["reverse:lim"] = path_of(scores["lim"], -1)
    blocks = len(next(iter(losses)))
    dropped_all = "1" * blocks not in losses  # a model without blocks is not measured
    paths = {name: path[:-1] if dropped_all else path for name, path in paths.items()}
    measured = {name: path for name, path in paths.items() if all(mask in losses for mask in path)}
    lines = {name: [losses[mask] for mask in path] for name, path in measured.items()}
    by_count = [[loss for mask, loss in losses.items() if mask.count("1") == n] for n in range(blocks + 1)]
    by_count = [some for some in by_count if some]
    every = len(losses) >= 2**blocks - 1
    random = [line for name, line in lines.items() if name.startswith("random")]
    drawn = [statistics.fmean(column) for column in zip(*random, strict=True)]
    lines["mean of random"] = [statistics.fmean(some) for some in by_count] if every else drawn
    lines["best tried"] = [min(some) for some in by_count]
    lines["worst tried"] = [max(some) for some in by_count]
    return {name: line for name, line in lines.items() if not name.startswith("random")}


def share(line: Sequence[float], lines: Mapping[str, Sequence[float]]) -> float:
    """Of the way from random to the best, the mean over the numbers of lowered blocks between none and all."""
    inner = slice(1, len(lines["best tried"]) - 1)
    mean, best = (statistics.fmean(lines[name][inner]) for name in ("mean of random", "best tried"))
    return (mean - statistics.fmean(line[inner])) / (mean - best)


def knee(line: Sequence[float], rise: float = KNEE) -> int:
    """How many blocks can be lowered before the loss has risen by more than 5 %."""
    return next((n - 1 for n, loss in enumerate(line) if loss > line[0] * (1 + rise)), len(line) - 1)


def summarize(scores: list[Row], subsets: Subsets, model: str) -> Iterator[dict[str, object]]:
    for high, low in subsets.pairs(model):
        found = scores_of(scores, model, low)
        columns = [subsets.losses(model, high, low, column) for column in ("nll", "even half", "odd half")]
        whole, even, odd = (lines_of(found, losses) for losses in columns)
        blocks = len(found["lim"])
        best = statistics.fmean(whole["best tried"][1:blocks])
        for name, line in whole.items():
            yield {
                "model": model, "pair": f"{high} -> {low}", "order": name,
                "mean loss": f"{statistics.fmean(line[1:blocks]):.4f}",
                "distance to the best": f"{statistics.fmean(line[1:blocks]) - best:.4f}",
                "share of the gap": f"{share(line, whole):.2f}",
                "even half": f"{share(even[name], even):.2f}", "odd half": f"{share(odd[name], odd):.2f}",
                "knee": f"{knee(line)} of {blocks}",
            }  # fmt: skip


def correlate(scores: list[Row], model: str) -> Iterator[dict[str, object]]:
    for granularity in ("block", "linear"):
        for low in ("int2z/64", "int3z/64", "int4z/64"):
            found = scores_of(scores, model, low, granularity)
            oracle = found.pop("oracle", None)
            for name, values in found.items() if oracle else ():
                if not name.startswith("random"):
                    yield {
                        "model": model, "low": low, "granularity": granularity, "score": name,
                        "spearman with the oracle": f"{spearmanr(values, oracle).statistic:+.2f}", "units": len(values),
                    }  # fmt: skip


def draw_orders(folder: Path, model: str, scores: list[Row], subsets: Subsets) -> None:
    panels = {}
    for high, low in subsets.pairs(model):
        if low != "dropped":
            lines = lines_of(scores_of(scores, model, low), subsets.losses(model, high, low))
            bits = subsets.bits(model, high, low)
            shown = {name: list(zip(bits, lines[name], strict=True)) for name in SHOWN}
            panels[f"{model}: {high} to {low}"] = shown
    draw_panels(folder / f"orders-{model}.png", panels, "stored bits per weight", "loss, nats per token")


def draw_pruning(folder: Path, model: str, scores: list[Row], subsets: Subsets) -> None:
    """Blocks dropped, or lowered to 3 or 2 bits, the rest at 4 bits: by LIM, and the best choice of as many."""
    lines = {}
    start = {mask: loss for mask, loss in subsets.losses(model, HIGH, "int2z/64").items() if "1" not in mask}
    for low in ("int3z/64", "int2z/64", "dropped"):
        if (HIGH, low) in subsets.pairs(model):
            found = lines_of(scores_of(scores, model, low), subsets.losses(model, HIGH, low) | start)
            what = "dropped" if low == "dropped" else f"lowered to {low}"
            bits = subsets.bits(model, HIGH, low)
            for order in ("best tried", "lim"):
                lines[f"{what}, {order}"] = list(zip(bits, found[order], strict=True))
    draw_panels(
        folder / f"pruning-{model}.png", {f"{model}: blocks dropped or lowered, the rest {HIGH}": lines},
        "stored bits per weight of the whole model", "loss, nats per token",
    )  # fmt: skip


def draw_depths(folder: Path, models: Sequence[str], scores: list[Row], subsets: Subsets) -> None:
    """Loss over the share of lowered blocks, a panel for each depth."""
    panels = {}
    for model in sorted(models, key=lambda name: int(name.rpartition("-")[2])):
        losses = subsets.losses(model, HIGH, "int2z/64")
        lines = lines_of(scores_of(scores, model, "int2z/64"), losses)
        blocks = len(next(iter(losses)))
        shown = {
            name: [(n / blocks, loss - lines[name][0]) for n, loss in enumerate(lines[name])]
            for name in SHOWN
        }
        panels[f"{blocks} blocks: {HIGH} to int2z/64"] = shown
    up = "rise of the loss, nats per token"
    draw_panels(folder / "depths.png", panels, "share of the blocks lowered", up)


def main() -> None:
    folder = arguments(__doc__, folder=ROOT / "docs" / "importance").parse_args().folder
    scores, subsets = read_csv(folder / "scores.csv"), Subsets(read_csv(folder / "subsets.csv"))
    write_csv(
        folder / "summary.csv", [row for model in subsets.models for row in summarize(scores, subsets, model)]
    )
    write_csv(folder / "spearman.csv", [row for model in subsets.models for row in correlate(scores, model)])
    depths = [model for model in subsets.models if model.startswith("depth-")]
    for model in (model for model in subsets.models if model not in depths):
        draw_orders(folder, model, scores, subsets)
        if (HIGH, "dropped") in subsets.pairs(model):
            draw_pruning(folder, model, scores, subsets)
    if depths:
        draw_depths(folder, depths, scores, subsets)


if __name__ == "__main__":
    main()
