"""From the CSV files of measure.py to the figures of docs/lens.md: python bench/lens/report.py."""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path

from fracbit.pipeline.study.lens import LensPoint, additivity, fragility
from fracbit.pipeline.study.pictures import draw_intensity, draw_panels, heat_map, write_csv

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def points(rows: list[Row], model: str) -> list[LensPoint]:
    return [
        LensPoint(
            row["kind"], row["target"], row["layers"], float(row["intensity"]), float(row["change"]), float(row["low"]),
            float(row["high"]), (),
        )
        for row in rows
        if row["model"] == model
    ]  # fmt: skip


def against_gaussian(some: list[LensPoint], target: str) -> dict[str, list[tuple[float, float]]]:
    base = [p.change for p in some if (p.kind, p.target) == ("gaussian", target)]
    lines: dict[str, list[tuple[float, float]]] = {}
    for kind in dict.fromkeys(p.kind for p in some):
        here = [p for p in some if (p.kind, p.target) == (kind, target)]
        lines[kind] = [(p.intensity, p.change / b) for p, b in zip(here, base, strict=True)]
    return lines


DRAWN = (("weights", "gaussian"), ("activations", "gaussian"), ("weights", "int3z/64"))


def draw_effects(folder: Path, model: str, rows: list[Row]) -> None:
    """Heat maps of single linears: blocks down, modules across, one for each error."""
    mine = points(rows, model)
    for target, kind in DRAWN:
        here = [p for p in mine if (p.target, p.kind) == (target, kind) and p.layers != "all"]
        cells = [(p.layers.split(".")[2], p.layers.split(".", 3)[3].split(".")[-1], p.change) for p in here]
        label = f"{target}-{kind}".replace("/", "-")
        heat_map(
            folder / f"linears-{model}-{label}.png", cells, f"nats, {kind} in {target}", "block", "{:.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("docs/lens"))
    folder = parser.parse_args().folder
    curves = read(folder / "intensity.csv")
    sums: list[dict[str, object]] = []
    for model in dict.fromkeys(row["model"] for row in curves):
        mine = points(curves, model)
        draw_intensity(folder / f"intensity-{model}.png", mine)
        panels = {
            f"{model}: noise in {target}, mean of five seeds": against_gaussian(mine, target)
            for target in ("weights", "activations")
        }
        draw_panels(
            folder / f"against-gaussian-{model}.png", panels, "relative intensity",
            "loss change over that of Gaussian noise", (True, False),
        )  # fmt: skip
    profiles = read(folder / "error-profiles.csv")
    panels = {}
    for model in dict.fromkeys(row["model"] for row in profiles if not row["model"].endswith("planted")):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in profiles:
            if row["model"] == model:
                lines.setdefault(row["type"], []).append((float(row["size"]), float(row["error"])))
        panels[model] = lines
    draw_panels(folder / "profiles.png", panels, "|w| / rms", "error / rms, 4 bits a row", (True, True))
    for name in ("linears", "modules", "blocks"):
        if not (folder / f"{name}.csv").exists():
            continue
        rows = read(folder / f"{name}.csv")
        for model in dict.fromkeys(row["model"] for row in rows):
            if name == "linears":
                draw_effects(folder, model, rows)
            mine = points(rows, model)
            write_csv(folder / f"fragility-{name}-{model}.csv", fragility(mine))
            sums += [
                {"model": model, "units": name, "target": each.target, "error": each.kind, "sum of parts": f"{each.parts:.4f}",
                 "all at once": f"{each.whole:.4f}", "ratio": "" if math.isnan(each.ratio) else f"{each.ratio:.2f}"}
                for each in additivity(mine)
            ]  # fmt: skip
    write_csv(folder / "additivity.csv", sums)


if __name__ == "__main__":
    main()
