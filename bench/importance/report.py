"""From the CSV files of measure.py to the figures and tables of docs/importance.md: python bench/importance/report.py."""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Sequence
from pathlib import Path

from fracbit.pipeline.pictures import draw_lines, write_csv

Row = dict[str, str]
SHOWN = ("lim", "zd", "first", "weight-error", "gram-error", "fisher", "oracle")


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=lambda i: values[i])
    found = [0.0] * len(values)
    for place, index in enumerate(order):
        found[index] = float(place)
    return found


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    return statistics.correlation(ranks(a), ranks(b))


def scores_of(rows: list[Row], model: str, low: str, granularity: str) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["model"] == model and row["granularity"] == granularity and row["low"] in ("", low):
            found.setdefault(row["score"], {})[row["unit"]] = float(row["value"])
    return found


def curve(values: dict[str, float], losses: dict[str, float], reverse: bool = False) -> list[float]:
    """Loss by number of low blocks when the least important go first."""
    names = list(values)
    order = sorted(range(len(names)), key=lambda i: -values[names[i]] if reverse else values[names[i]])
    line = []
    for count in range(len(names) + 1):
        low = set(order[:count])
        line.append(losses["".join("1" if i in low else "0" for i in range(len(names)))])
    return line


def all_curves(scores: dict[str, dict[str, float]], losses: dict[str, float]) -> dict[str, list[float]]:
    """Every order's curve, the mean over random orders, and the least and greatest loss of any choice of as many blocks."""
    lines = {name: curve(values, losses) for name, values in scores.items() if not name.startswith("random")}
    lines["reverse:lim"] = curve(scores["lim"], losses, reverse=True)
    blocks = len(next(iter(losses)))
    by_count = [[loss for mask, loss in losses.items() if mask.count("1") == n] for n in range(blocks + 1)]
    lines["best of all"] = [min(some) for some in by_count]
    lines["mean of all"] = [
        statistics.fmean(some) for some in by_count
    ]  # what a random order gives on average, exactly
    lines["worst of all"] = [max(some) for some in by_count]
    return lines


def knee(line: Sequence[float], rise: float = 0.05) -> int:
    """How many blocks can be lowered before the loss has risen by more than 5 %."""
    return next((n - 1 for n, loss in enumerate(line) if loss > line[0] * (1 + rise)), len(line) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("docs/importance"))
    folder = parser.parse_args().folder
    scores, subsets, pruned = (read(folder / f"{name}.csv") for name in ("scores", "subsets", "pruned"))
    summary: list[dict[str, object]] = []
    correlations: list[dict[str, object]] = []
    for model in dict.fromkeys(row["model"] for row in subsets):
        base = next(float(row["nll"]) for row in subsets if row["model"] == model and row["high"] == "float")
        for high, low in dict.fromkeys(
            (row["high"], row["low"]) for row in subsets if row["mask"] and row["model"] == model
        ):
            mine = [row for row in subsets if (row["model"], row["high"], row["low"]) == (model, high, low)]
            losses = {row["mask"]: float(row["nll"]) for row in mine}
            bits = {row["mask"]: float(row["bits"]) for row in mine}
            found = scores_of(scores, model, low, "block")
            lines = all_curves(found, losses)
            blocks = len(next(iter(losses)))
            for name, line in lines.items():
                middle = statistics.fmean(line[1:blocks])
                gap = (statistics.fmean(lines["mean of all"][1:blocks]) - middle) / (
                    statistics.fmean(lines["mean of all"][1:blocks])
                    - statistics.fmean(lines["best of all"][1:blocks])
                )
                summary.append(
                    {"model": model, "pair": f"{high} -> {low}", "order": name, "mean loss": f"{middle:.4f}",
                     "share of the gap to the best": f"{gap:.2f}", "knee": f"{knee(line)} of {blocks}", "float": f"{base:.4f}"}
                )  # fmt: skip
            axis = [bits["1" * n + "0" * (blocks - n)] for n in range(blocks + 1)]
            shown = {name: list(zip(axis, lines[name], strict=True)) for name in
                     ("worst of all", "mean of all", "reverse:lim", "lim", "zd", "first", "fisher", "best of all")}  # fmt: skip
            label = f"{model}-{low.replace('/', '-')}"
            draw_lines(folder / f"orders-{label}.png", shown, "stored bits per weight", "loss, nats per token",
                       title=f"{model}: blocks lowered from {high} to {low}, float {base:.3f}")  # fmt: skip
            for granularity in ("block", "linear"):
                units = scores_of(scores, model, low, granularity)
                for name, values in units.items():
                    if name != "oracle" and not name.startswith("random"):
                        keys = list(values)
                        rho = spearman([values[k] for k in keys], [units["oracle"][k] for k in keys])
                        correlations.append({"model": model, "low": low, "granularity": granularity, "score": name,
                                             "spearman with the oracle": f"{rho:+.2f}", "units": len(keys)})  # fmt: skip
        if any(row["model"] == model for row in pruned):
            draw_pruning(folder, model, scores, subsets, pruned)
    write_csv(folder / "summary.csv", summary)
    write_csv(folder / "spearman.csv", correlations)


def draw_pruning(folder: Path, model: str, scores: list[Row], subsets: list[Row], pruned: list[Row]) -> None:
    found = scores_of(scores, model, "int2z/64", "block")
    lines = {}
    dropped = {
        row["mask"]: (float(row["bits"]), float(row["nll"])) for row in pruned if row["model"] == model
    }
    whole = {row["mask"]: (float(row["bits"]), float(row["nll"])) for row in subsets
             if row["model"] == model and row["low"] == "int2z/64"}  # fmt: skip
    blocks = len(next(iter(dropped)))
    dropped["0" * blocks] = whole["0" * blocks]
    for low in ("int2z/64", "int3z/64"):
        points = {row["mask"]: (float(row["bits"]), float(row["nll"])) for row in subsets
                  if row["model"] == model and row["low"] == low and row["mask"]}  # fmt: skip
        for name in ("lim", "best"):
            lines[f"lowered to {low}, {name}"] = path_of(found, points, name)
    for name in ("lim", "best"):
        lines[f"dropped, {name}"] = path_of(found, dropped, name)
    draw_lines(folder / f"pruning-{model}.png", lines, "stored bits per weight of the whole model", "loss, nats per token",
               title=f"{model}: dropping blocks against lowering them, the rest int4z/64")  # fmt: skip


def path_of(
    scores: dict[str, dict[str, float]], points: dict[str, tuple[float, float]], name: str
) -> list[tuple[float, float]]:
    """(bits, loss) by number of blocks: in the order of a score, or the best choice of as many."""
    masks = {mask: loss for mask, (_, loss) in points.items()}
    blocks = len(next(iter(masks)))
    if name == "best":
        best = [
            min((m for m in masks if m.count("1") == n), key=lambda m: masks[m], default=None)
            for n in range(blocks + 1)
        ]
        return [points[mask] for mask in best if mask is not None]
    names = list(scores[name])
    order = sorted(range(len(names)), key=lambda i: scores[name][names[i]])
    found = []
    for count in range(len(names) + 1):
        mask = "".join("1" if i in order[:count] else "0" for i in range(len(names)))
        if mask in points:
            found.append(points[mask])
    return found


if __name__ == "__main__":
    main()
