"""From the CSV files of measure.py to the figures and tables of docs/importance.md: python bench/importance/report.py."""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from scipy.stats import spearmanr

from fracbit.pipeline.study.pictures import draw_panels, write_csv

Row = dict[str, str]
Losses = Mapping[str, float]
SHOWN = ("best tried", "oracle", "lim", "zd", "first", "mean of random", "reverse:lim", "worst tried")
KNEE = 0.05


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    return float(spearmanr(a, b).statistic)


def scores_of(rows: list[Row], model: str, low: str, granularity: str) -> dict[str, list[float]]:
    """Score -> values in the order of the units. Dropping has no scheme: scores that need one are those of 2 bits."""
    wanted = ("", "int2z/64" if low == "dropped" else low)
    found: dict[str, list[float]] = {}
    for row in rows:
        if (row["model"], row["granularity"]) == (model, granularity) and row["low"] in wanted:
            found.setdefault(row["score"], []).append(float(row["value"]))
    return found


def path_of(values: Sequence[float], sign: int = 1) -> list[str]:
    """Masks by number of lowered blocks, the least important first."""
    order = sorted(range(len(values)), key=lambda i: sign * values[i])
    return ["".join("01"[i in order[:count]] for i in range(len(values))) for count in range(len(values) + 1)]


def lines_of(scores: Mapping[str, Sequence[float]], losses: Losses) -> dict[str, list[float]]:
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


def pairs_of(subsets: list[Row], model: str) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["high"], row["low"]) for row in subsets if row["model"] == model))


def losses_of(subsets: list[Row], model: str, high: str, low: str, column: str) -> dict[str, float]:
    found = {
        row["mask"]: float(row[column])
        for row in subsets
        if (row["model"], row["high"], row["low"]) == (model, high, low)
    }
    return found


def summarize(scores: list[Row], subsets: list[Row], model: str) -> Iterator[dict[str, object]]:
    for high, low in pairs_of(subsets, model):
        found = scores_of(scores, model, low, "block")
        whole, even, odd = (
            lines_of(found, losses_of(subsets, model, high, low, column))
            for column in ("nll", "even half", "odd half")
        )
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
            for name, values in found.items():
                if name != "oracle" and not name.startswith("random") and "oracle" in found:
                    yield {
                        "model": model, "low": low, "granularity": granularity, "score": name,
                        "spearman with the oracle": f"{spearman(values, found['oracle']):+.2f}", "units": len(values),
                    }  # fmt: skip


def bits_of(subsets: list[Row], model: str, high: str, low: str) -> list[float]:
    """Stored bits per weight by number of lowered blocks; blocks are of one size."""
    found = {
        row["mask"].count("1"): float(row["bits"])
        for row in subsets
        if (row["model"], row["high"], row["low"]) == (model, high, low)
    }
    return [found[count] for count in sorted(found)]


def draw_orders(folder: Path, model: str, scores: list[Row], subsets: list[Row]) -> None:
    panels = {}
    for high, low in pairs_of(subsets, model):
        if low != "dropped":
            losses = losses_of(subsets, model, high, low, "nll")
            lines = lines_of(scores_of(scores, model, low, "block"), losses)
            bits = bits_of(subsets, model, high, low)
            panels[f"{model}: {high} to {low}"] = {
                name: list(zip(bits, lines[name], strict=True)) for name in SHOWN
            }
    draw_panels(folder / f"orders-{model}.png", panels, "stored bits per weight", "loss, nats per token")


def draw_pruning(folder: Path, model: str, scores: list[Row], subsets: list[Row]) -> None:
    """Blocks dropped, or lowered to 3 or 2 bits, the rest at 4 bits: by LIM, and the best choice of as many."""
    lines = {}
    start = losses_of(subsets, model, "int4z/64", "int2z/64", "nll")
    for low in ("int3z/64", "int2z/64", "dropped"):
        if ("int4z/64", low) not in pairs_of(subsets, model):
            continue
        losses = losses_of(subsets, model, "int4z/64", low, "nll") | {
            mask: loss for mask, loss in start.items() if "1" not in mask
        }
        found = lines_of(scores_of(scores, model, low, "block"), losses)
        bits = bits_of(subsets, model, "int4z/64", low)
        what = "dropped" if low == "dropped" else f"lowered to {low}"
        for order in ("best tried", "lim"):
            lines[f"{what}, {order}"] = list(zip(bits, found[order], strict=True))
    title = f"{model}: blocks dropped or lowered, the rest int4z/64"
    draw_panels(
        folder / f"pruning-{model}.png", {title: lines}, "stored bits per weight of the whole model", "loss, nats per token"
    )  # fmt: skip


def draw_depths(folder: Path, models: Sequence[str], scores: list[Row], subsets: list[Row]) -> None:
    """Loss over the share of lowered blocks, a panel for each depth."""
    panels = {}
    for model in sorted(models, key=lambda name: int(name.rpartition("-")[2])):
        losses = losses_of(subsets, model, "int4z/64", "int2z/64", "nll")
        lines = lines_of(scores_of(scores, model, "int2z/64", "block"), losses)
        blocks = len(next(iter(losses)))
        panels[f"{blocks} blocks: int4z/64 to int2z/64"] = {
            name: [(n / blocks, loss - line[0]) for n, loss in enumerate(line)]
            for name in SHOWN for line in [lines[name]]
        }  # fmt: skip
    draw_panels(
        folder / "depths.png", panels, "share of the blocks lowered", "rise of the loss, nats per token"
    )


def main() -> None:
    """Write summary.csv, spearman.csv and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("docs/importance"))
    folder = parser.parse_args().folder
    scores, subsets = read(folder / "scores.csv"), read(folder / "subsets.csv")
    models = list(dict.fromkeys(row["model"] for row in subsets))
    write_csv(folder / "summary.csv", [row for model in models for row in summarize(scores, subsets, model)])
    write_csv(folder / "spearman.csv", [row for model in models for row in correlate(scores, model)])
    depths = [model for model in models if model.startswith("depth-")]
    for model in models:
        if model not in depths:
            draw_orders(folder, model, scores, subsets)
            if ("int4z/64", "dropped") in pairs_of(subsets, model):
                draw_pruning(folder, model, scores, subsets)
    if depths:
        draw_depths(folder, depths, scores, subsets)


if __name__ == "__main__":
    main()
