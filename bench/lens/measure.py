"""Measure everything that docs/lens.md reports, into CSV files: python bench/lens/measure.py MODEL [MODEL...]."""

from __future__ import annotations

import argparse
import csv
import os
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from fracbit.lens import PERTURBATIONS, best_exponent, error_profile, scheme_error
from fracbit.pipeline.lens import (
    LensPoint,
    clip,
    intensity_curves,
    noise,
    noise_like,
    noise_like_clipping,
    per_module,
    perturbed,
    plant_outliers,
    probe,
    rounding,
    unit_effects,
)
from fracbit.pipeline.subject import Subject, load_subject, measure, replaced
from fracbit.records.allocation import read_level
from fracbit.records.scheme import Scheme

SHARED = Path(os.environ.get("FRACBIT_SHARED", "../shared"))
INTENSITIES = (0.03, 0.06, 0.12, 0.25)
SEEDS = (0, 1, 2, 3, 4)
TYPES = ("int", "nf", "power:1/3", "power:1/2", "kmeans")


def tokens(kind: str, documents: int, length: int) -> torch.Tensor:
    rows = np.fromfile(SHARED / "data" / f"tales-{kind}.u16", dtype="<u2").reshape(-1, 512)
    return torch.from_numpy(rows[:documents, :length].astype(np.int64))


def append(path: Path, rows: list[dict[str, object]]) -> None:
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def points(path: Path, model: str, some: list[LensPoint]) -> None:
    append(path, [{"model": model, **point.row()} for point in some])


def curves(subject: Subject, name: str, ids: torch.Tensor, out: Path) -> None:
    for target in ("weights", "activations"):
        for kind in PERTURBATIONS:
            points(
                out / "intensity.csv",
                name,
                intensity_curves(subject, ids, [kind], INTENSITIES, target, seeds=SEEDS),
            )


def schemes(subject: Subject, name: str, ids: torch.Tensor, out: Path) -> None:
    """The error a scheme really makes beside noise of its strength in every block."""
    base = measure(subject, ids).nll
    for label in ("int3z/64", "nf3/64", "int4z/row"):
        scheme = read_level(label)
        assert scheme is not None
        found = [probe(subject, ids, rounding(scheme), f"{label} itself", seeds=(0,), base=base)]
        found += [
            probe(subject, ids, noise_like(kind, scheme), f"{label} as {kind}", seeds=SEEDS, base=base)
            for kind in ("gaussian", "uniform", "rademacher", "growing", "shrinking")
        ]
        points(out / "schemes.csv", name, found)


def clipped(subject: Subject, name: str, ids: torch.Tensor, out: Path) -> None:
    base = measure(subject, ids).nll
    for target in ("weights", "activations"):
        for share in (0.0001, 0.001, 0.01):
            for kind, error, seeds in (
                ("clip", clip(share, "tensor"), (0,)),
                ("noise there", noise_like_clipping(share, "tensor"), SEEDS),
            ):
                found = probe(
                    subject, ids, error, f"{kind} {100 * share:g} %", target, seeds=seeds, base=base
                )
                points(out / "clipping.csv", name, [found])
                if kind == "clip":
                    everywhere = noise("gaussian", found.intensity, "tensor")
                    label = f"noise everywhere {100 * share:g} %"
                    points(
                        out / "clipping.csv",
                        name,
                        [probe(subject, ids, everywhere, label, target, seeds=SEEDS, base=base)],
                    )


def effects(subject: Subject, name: str, ids: torch.Tensor, out: Path) -> None:
    linears = {layer: [layer] for layer in subject.weights.layers}
    errors = {"gaussian": noise("gaussian", 0.15)}
    for target in ("weights", "activations"):
        points(out / "linears.csv", name, unit_effects(subject, ids, linears, errors, target, SEEDS))
        many = {kind: noise(kind, 0.15) for kind in ("gaussian", "growing", "shrinking")}
        points(
            out / "modules.csv", name, unit_effects(subject, ids, per_module(subject), many, target, SEEDS)
        )
    real = {label: rounding(read_level(label)) for label in ("int4z/64", "int3z/64", "int2z/64")}  # type: ignore[arg-type]
    points(out / "linears.csv", name, unit_effects(subject, ids, linears, real, "weights", (0,)))
    blocks = {unit.name: list(unit.shapes) for unit in subject.weights.units()}
    points(out / "blocks.csv", name, unit_effects(subject, ids, blocks, real, "weights", (0,)))


def nonuniform(subject: Subject, name: str, ids: torch.Tensor, out: Path) -> None:
    """W4 by type and granularity, the exponent also searched per tensor; W8A8 and W4A8 by type and activation granularity."""
    base = measure(subject, ids).nll
    rows: list[dict[str, object]] = []
    for block in ("tensor", "row", 64):
        for dtype in (*TYPES, "searched"):
            noisy, used = {}, []
            for layer in subject.weights.layers:
                weight = subject.weights.read(layer)
                plain = Scheme("int" if dtype == "searched" else dtype, 4, block)
                scheme = best_exponent(weight, plain) if dtype == "searched" else plain
                noisy[layer] = weight + scheme_error(weight, scheme)
                used.append(scheme.dtype)
            with replaced(subject, noisy):
                change = measure(subject, ids).nll - base
            exponents = " ".join(sorted(set(used))) if dtype == "searched" else ""
            rows.append(
                {
                    "model": name,
                    "setting": "W4",
                    "granularity": str(block),
                    "type": dtype,
                    "change": change,
                    "used": exponents,
                }
            )
    append(out / "nonuniform.csv", rows)
    rows = []
    for setting, weight_bits, bits in (("W8A8", 8, 8), ("W4A8", 4, 8), ("W8A4", 8, 4)):
        for block in ("tensor", "row"):
            for dtype in ("int", "power:1/3", "power:1/2", "nf"):
                everything = list(subject.weights.layers)
                with ExitStack() as stack:
                    stack.enter_context(
                        perturbed(
                            subject, rounding(Scheme(dtype, weight_bits, "row")), "weights", everything, 0
                        )
                    )
                    stack.enter_context(
                        perturbed(subject, rounding(Scheme(dtype, bits, block)), "activations", everything, 0)
                    )
                    change = measure(subject, ids).nll - base
                shared = f"activations per {'token' if block == 'row' else 'tensor'}"
                rows.append({"model": name, "setting": setting, "granularity": shared, "type": dtype,
                             "change": change, "used": ""})  # fmt: skip
    append(out / "nonuniform.csv", rows)


def profiles(subject: Subject, name: str, out: Path) -> None:
    """Error against |x| of the weights of all linears, W4 per row."""
    rows: list[dict[str, object]] = []
    for dtype in TYPES:
        sums: dict[int, list[float]] = {}
        for layer in subject.weights.layers:
            weight = subject.weights.read(layer)
            for index, (size, error, _) in enumerate(
                error_profile(weight, scheme_error(weight, Scheme(dtype, 4, "row")), "row", 12)
            ):
                sums.setdefault(index, []).append(size)
                sums.setdefault(100 + index, []).append(error)
        rows += [
            {
                "model": name,
                "type": dtype,
                "size": float(np.mean(sums[i])),
                "error": float(np.mean(sums[100 + i])),
            }
            for i in range(12)
        ]
    append(out / "profiles.csv", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--out", type=Path, default=Path("docs/lens"))
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--parts", default="nonuniform,curves,schemes,clipping,effects")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ids = tokens("evaluation", arguments.documents, arguments.length)
    for model in arguments.models:
        folder = SHARED / "models" / model
        subject = load_subject(folder if folder.is_dir() else model)
        name, parts, started = Path(model).name, arguments.parts.split(","), time.perf_counter()
        if "nonuniform" in parts:
            nonuniform(subject, name, ids, arguments.out)
            profiles(subject, name, arguments.out)
            planted = load_subject(folder if folder.is_dir() else model)
            plant_outliers(planted, 50.0, 2)
            nonuniform(planted, f"{name} planted", ids, arguments.out)
        if "curves" in parts:
            curves(subject, name, ids, arguments.out)
        if "schemes" in parts:
            schemes(subject, name, ids, arguments.out)
        if "clipping" in parts:
            clipped(subject, name, ids, arguments.out)
            planted = load_subject(folder if folder.is_dir() else model)
            plant_outliers(planted, 50.0, 2)
            clipped(planted, f"{name} planted", ids, arguments.out)
        if "effects" in parts:
            effects(subject, name, ids, arguments.out)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
