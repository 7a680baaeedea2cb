"""From the CSV files of measure.py to the figures of docs/lens.md: a few seconds.

python bench/lens/report.py [--folder docs/lens]

intensity-MODEL.png, against-gaussian-MODEL.png    findings 1 and 2
profiles.png                                       non-uniform quantization: error against size
additivity.csv                                     do the losses of single layers add up?
linears-MODEL-*.png, fragility-*.csv               which layers are fragile
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from frame import ROOT, arguments, read_csv

from fracbit.perturbation import PERTURBATIONS
from fracbit.records.lens import LensPoint, additivity, fragility
from fracbit.report.pictures import draw_intensity, draw_panels, heat_map, write_csv

Row = dict[str, str]
Lines = dict[str, list[tuple[float, float]]]
DRAWN = (("weights", "gaussian"), ("activations", "gaussian"), ("weights", "int3z/64"))


def by_model(rows: list[Row]) -> dict[str, list[Row]]:
    models = dict.fromkeys(row["model"] for row in rows)
    return {model: [row for row in rows if row["model"] == model] for model in models}


def points(rows: list[Row]) -> list[LensPoint]:
    names, figures = ("kind", "target", "layers"), ("intensity", "change", "low", "high")
    return [LensPoint(*(row[n] for n in names), *(float(row[n]) for n in figures), ()) for row in rows]


def against_gaussian(some: list[LensPoint], target: str) -> Lines:
    base = [p.change for p in some if (p.kind, p.target) == ("gaussian", target)]
    lines: Lines = {}
    for kind in dict.fromkeys(p.kind for p in some):
        here = [p for p in some if (p.kind, p.target) == (kind, target)]
        lines[kind] = [(p.intensity, p.change / b) for p, b in zip(here, base, strict=True)]
    return lines


def draw_curves(folder: Path, rows: list[Row]) -> None:
    for model, own in by_model(rows).items():
        mine = points(own)
        draw_intensity(folder / f"intensity-{model}.png", mine, noise=PERTURBATIONS)
        panels = {f"{model}: noise in {target}, mean of five seeds": against_gaussian(mine, target)
                  for target in ("weights", "activations")}  # fmt: skip
        draw_panels(
            folder / f"against-gaussian-{model}.png", panels, "relative intensity",
            "loss change over that of Gaussian noise", (True, False),
        )  # fmt: skip


def draw_profiles(folder: Path, rows: list[Row]) -> None:
    panels: dict[str, Lines] = {}
    for row in (row for row in rows if not row["model"].endswith("planted")):
        line = panels.setdefault(row["model"], {}).setdefault(row["type"], [])
        line.append((float(row["size"]), float(row["error"])))
    draw_panels(folder / "profiles.png", panels, "|w| / rms", "error / rms, 4 bits a row", (True, True))


def draw_effects(folder: Path, model: str, mine: list[LensPoint]) -> None:
    """Heat maps of single linears: blocks down, modules across, one for each error."""
    for target, kind in DRAWN:
        here = [p for p in mine if (p.target, p.kind) == (target, kind) and p.layers != "all"]
        cells = [(p.layers.split(".")[2], p.layers.rpartition(".")[2], p.change) for p in here]
        path = folder / f"linears-{model}-{target}-{kind.replace('/', '-')}.png"
        heat_map(path, cells, f"nats, {kind} in {target}", "block", "{:.3f}")


def main() -> None:
    folder = arguments(__doc__, folder=ROOT / "docs" / "lens").parse_args().folder
    draw_curves(folder, read_csv(folder / "intensity.csv"))
    draw_profiles(folder, read_csv(folder / "error-profiles.csv"))
    sums: list[dict[str, object]] = []
    for name in ("linears", "modules", "blocks"):
        for model, own in by_model(read_csv(folder / f"{name}.csv")).items():
            mine = points(own)
            if name == "linears":
                draw_effects(folder, model, mine)
            write_csv(folder / f"fragility-{name}-{model}.csv", fragility(mine))
            sums += [
                {"model": model, "units": name, "target": each.target, "error": each.kind, "sum of parts": f"{each.parts:.4f}",
                 "all at once": f"{each.whole:.4f}", "ratio": "" if math.isnan(each.ratio) else f"{each.ratio:.2f}"}
                for each in additivity(mine)
            ]  # fmt: skip
    write_csv(folder / "additivity.csv", sums)


if __name__ == "__main__":
    main()
