"""Measure what docs/calibrated.md reports: which of the papers' claims hold on small trained models.

    python bench/calibrated/measure.py PART [PART...] [--models NAME...] [-o bench/results]

Parts: tweak, iterations, axis, predictor, text, planted, tables, columns. Each writes calibrated-PART.json, a list of rows.
Loss is nats per token on text that no run was calibrated with; `gap` is what a run adds to the float model's. Models: tales-s
and tales-xs of the shared folder (FRACBIT_SHARED, or ../shared) and the bundled one.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from fracbit.bundled import bundled_model
from fracbit.checkpoint.load import load, load_tokenizer
from fracbit.data import read_documents
from fracbit.evaluation import perplexity
from fracbit.models import tweak as tweaking
from fracbit.models.blocks import blocks, groups, weight_of
from fracbit.models.find import family_of
from fracbit.models.walk import advance, embed
from fracbit.pipeline.quantize.axis import choose_axes
from fracbit.pipeline.quantize.calibrated import run_calibrated
from fracbit.pipeline.quantize.observe import observe_all
from fracbit.pipeline.study.float_model import load_float
from fracbit.pipeline.study.lens import plant_outliers
from fracbit.quantizers import quantizer
from fracbit.quantizers.adadim import predicted_axis
from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Override, Recipe
from fracbit.records.scheme import Scheme

SHARED = Path(os.environ.get("FRACBIT_SHARED", "../shared"))
SAMPLES, LENGTH = 48, 256
MODELS: list[str] = []
"""Only these models, when there are any: `--models`."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Bed:
    """A model, a text to calibrate on and one to judge by."""

    name: str
    folder: Path
    calibration: str
    evaluation: str


def bed(name: str) -> Bed:
    if name == "bundled":
        return Bed(name, bundled_model(), "bundled:train", "bundled:held-out")
    data = SHARED / "data"
    return Bed(
        name,
        SHARED / "models" / name,
        f"{data / 'tales-calibration.u16'}?length=512&keep={LENGTH}",
        f"{data / 'tales-evaluation.u16'}?length=512&first=120&keep={LENGTH}",
    )


@cache
def evaluation(where: Bed) -> tuple[Tensor, ...]:
    tokenizer = load_tokenizer(where.folder)
    vocabulary = json.loads((where.folder / "config.json").read_text())["vocab_size"]
    documents = read_documents(where.evaluation, tokenizer, vocabulary).documents
    return documents


def nll(folder: Path, where: Bed) -> float:
    documents = evaluation(where)
    return perplexity(load(folder, "float32"), documents[0] if len(documents) == 1 else documents).nll


@cache
def float_nll(where: Bed) -> float:
    return nll(where.folder, where)


def trial(
    where: Bed, scheme: Scheme, fill: str, keep: str = "", folder: Path | None = None, **plan: Any
) -> Row:
    """Quantize, evaluate: the row of one run; `manifest` has the rest."""
    settings = {
        "texts": (where.calibration,),
        "samples": SAMPLES,
        "length": LENGTH,
        "dtype": "float32",
    } | plan
    overrides = (Override(layers=keep, keep=True),) if keep else ()
    recipe = Recipe(
        model=str(where.folder), scheme=scheme, quantizer=fill, search=fill == "descent",
        calibration=Calibration(**settings), overrides=overrides,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        target = folder or Path(temporary) / "q"
        result = run_calibrated(recipe, target, overwrite=True)
        lost = nll(target, where)
        manifest = json.loads((target / "fracbit.json").read_text())
    base = float_nll(where)
    row = {
        "model": where.name, "scheme": str(scheme), "quantizer": fill, **plan, "bits": round(result.bits_per_weight, 4),
        "float": round(base, 5), "loss": round(lost, 5), "gap": round(lost - base, 5),
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return {**row, "manifest": manifest}


def plain(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "manifest"}


def int_z(bits: int, axis: str = "in", block: int = 64) -> Scheme:
    return Scheme("int", bits, block, axis, "zero")  # type: ignore[arg-type]


def tweak() -> list[Row]:
    """Norm tweaking: gap recovered at 2, 3 and 4 bits, both input chains, and the drift of channel means with depth."""
    rows: list[Row] = []
    for name in MODELS or ("tales-s", "tales-xs", "bundled"):
        where = bed(name)
        for bits in (2, 3, 4):
            for fill in ("rtn", "gptq"):
                gaps: dict[str, float] = {}
                for how in ("none", "adam", "closed", "auto"):
                    with tempfile.TemporaryDirectory() as temporary:
                        folder = Path(temporary) / "q"
                        row = trial(where, int_z(bits), fill, folder=folder, tweak=how)
                        gaps[how] = row["gap"]
                        moved = drift(where, folder) if bits < 4 else None
                    kept = [one["kept"] for one in row["manifest"].get("tweaks", ())]
                    share = 1 - gaps[how] / gaps["none"]
                    rows.append(plain(row) | {"recovered": round(share, 4), "kept": kept, "drift": moved})
        if name == "tales-s":
            rows += [
                plain(trial(where, int_z(2), "gptq", tweak=how, chain="float")) for how in ("none", "auto")
            ]
    return rows


def drift(where: Bed, folder: Path) -> list[float]:
    """After each block, mean over channels of |mean of (float - quantized)| in units of the channel's std."""
    ids = (
        torch.stack([document[:128] for document in evaluation(where)[:16]])
        if len(evaluation(where)) > 1
        else (evaluation(where)[0][: 16 * 128].view(16, 128))
    )
    walked = []
    for path in (where.folder, folder):
        model = load(path, "float32")
        family = family_of(model)
        hidden, states = embed(model, family, ids), []
        for _, block in blocks(model, family):
            hidden = advance(block, hidden)
            states.append(hidden.states.flatten(0, 1))
        walked.append(states)
    return [round(float(((a - b).mean(0).abs() / a.std(0)).mean()), 5) for a, b in zip(*walked, strict=True)]


def mean_square(found: Tensor, wanted: Tensor) -> Tensor:
    return (found - wanted).square().mean()


def divergence(found: Tensor, wanted: Tensor) -> Tensor:
    """Of the channels of every token, each read as a distribution."""
    return torch.nn.functional.kl_div(
        found.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True
    )


def iterations() -> list[Row]:
    """Norm tweaking by Adam: 1, 5, 20 and 50 passes at one learning rate, and three distances, each at three rates."""
    rows: list[Row] = []
    ours, rate, once = tweaking.distance, tweaking.LEARNING_RATE, tweaking.adam
    distances = {"channel means and variances": ours, "mean square": mean_square, "divergence": divergence}
    tries = [("channel means and variances", passes, 1.0) for passes in (5, 20, 50)]
    tries += [(name, 1, factor) for name in distances for factor in (0.3, 1.0, 3.0)]
    for name in MODELS or ("tales-s", "bundled"):
        where = bed(name)
        without = plain(trial(where, int_z(2), "gptq"))
        rows.append(without)
        for distance, passes, factor in tries:

            def repeated(block: Any, family: Any, evidence: Any, lr: float, passes: int = passes) -> None:
                once(block, family, replace(evidence, train=list(evidence.train) * passes), lr)

            with (
                mock.patch.object(tweaking, "distance", distances[distance]),
                mock.patch.object(tweaking, "LEARNING_RATE", factor * rate),
                mock.patch.object(tweaking, "adam", repeated),
            ):
                row = plain(trial(where, int_z(2), "gptq", tweak="adam"))
            share = round(1 - row["gap"] / without["gap"], 4)
            rows.append(
                row | {"distance": distance, "passes": passes, "rate": factor * rate, "recovered": share}
            )
    return rows


def axis() -> list[Row]:
    """AdaDim: blocks along the input, along the output, and per layer whichever the unit around it notices less."""
    rows: list[Row] = []
    for name in MODELS or ("tales-s", "tales-xs", "bundled"):
        where = bed(name)
        for bits in (3, 4):
            for fill in ("rtn", "gptq"):
                for label, along, how in (
                    ("in", "in", "scheme"), ("out", "out", "scheme"), ("ada by nearest", "in", "nearest"),
                    ("ada by own loss", "in", "gptq"), ("predicted", "in", "predicted"),
                ):  # fmt: skip
                    if fill == "rtn" and label == "ada by own loss":
                        continue
                    row = trial(where, int_z(bits, along), fill, axis=how)
                    out = [n for n, facts in row["manifest"]["layers"].items() if _axis(facts) == "out"]
                    kinds = sorted(
                        {n.rpartition(".")[2] for n in row["manifest"]["layers"] if "layers." in n}
                    )
                    shares = {kind: sum(n.endswith(kind) for n in out) for kind in kinds}
                    rows.append(plain(row) | {"choice": label, "out": len(out), "out_by_kind": shares})
    return rows


def _axis(facts: Row) -> str:
    return (facts.get("scheme") or {}).get("axis", "")


def predictor() -> list[Row]:
    """How often the scales of a weight alone tell the axis that a trial finds, for rounding to nearest and for GPTQ."""
    rows: list[Row] = []
    for name in MODELS or ("tales-xs", "tales-s", "tales-m", "tales-l", "bundled"):
        where = bed(name)
        model = load(where.folder, "float32")
        family = family_of(model)
        documents = read_documents(
            where.calibration, load_tokenizer(where.folder), model.config.vocab_size
        ).stream
        hidden = embed(model, family, documents[: 16 * 128].view(16, 128))
        agreed: dict[tuple[str, int], list[bool]] = {}
        chosen_out: dict[tuple[str, int], int] = {}
        for path, block in blocks(model, family):
            order = groups(block, family)
            stats, after = observe_all(block, hidden, path, order, True, None)
            for bits in (3, 4):
                for how in ("nearest", "gptq"):
                    for group in order:
                        schemes = {n: int_z(bits) for n in group}
                        own = stats[group[0]]
                        best = choose_axes(how, family, block, hidden, group, schemes, own, quantizer("gptq"))
                        for n, scheme in best.items():
                            guess = predicted_axis(weight_of(block.get_submodule(n)), int_z(bits), own.energy)
                            agreed.setdefault((how, bits), []).append(guess == scheme.axis)
                            chosen_out[how, bits] = chosen_out.get((how, bits), 0) + (scheme.axis == "out")
            hidden = after
        for (how, bits), right in agreed.items():
            row = {
                "model": name, "bits": bits, "by": how, "linears": len(right), "right": sum(right),
                "out": chosen_out[how, bits],
            }  # fmt: skip
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def text() -> list[Row]:
    """Text to calibrate on: real, written by the model itself, random ids; three seeds each through the draw of samples."""
    rows: list[Row] = []
    for name in MODELS or ("tales-s", "bundled"):
        where = bed(name)
        vocabulary = json.loads((where.folder / "config.json").read_text())["vocab_size"]
        with tempfile.TemporaryDirectory() as temporary:
            noise = Path(temporary) / "noise.u16"
            size = (SAMPLES, LENGTH)
            np.random.default_rng(0).integers(3, vocabulary, size, dtype=np.uint16).tofile(noise)
            for bits, how in ((3, "none"), (2, "none"), (2, "auto")):
                for label, source in (
                    ("real", where.calibration), ("generated", "generated"), ("random ids", f"{noise}?length={LENGTH}"),
                ):  # fmt: skip
                    row = plain(trial(replace(where, calibration=source), int_z(bits), "gptq", tweak=how))
                    rows.append(row | {"calibration": label})
    return rows


def planted() -> list[Row]:
    """Activation outliers planted by a rescaling that leaves the function: what breaks at W3 and W8A8, and what mends it."""
    rows: list[Row] = []
    for name in MODELS or ("tales-s",):
        where = bed(name)
        with tempfile.TemporaryDirectory() as temporary:
            subject = load_float(str(where.folder))
            plant_outliers(subject, 60.0, 3)
            subject.model.float().save_pretrained(Path(temporary) / "planted")
            for file in where.folder.glob("tokenizer*"):
                (Path(temporary) / "planted" / file.name).write_bytes(file.read_bytes())
            bad = replace(where, name=f"{name} planted", folder=Path(temporary) / "planted")
            for here in (where, bad):
                for fill in ("rtn", "gptq"):
                    for label, along, transforms in (
                        ("in", "in", ()), ("out", "out", ()), ("smooth", "in", ("smooth",)), ("awq", "in", ("awq",)),
                        ("rotate", "in", ("rotate",)), ("rotate both", "in", ("rotate", "rotate-mlp")),
                    ):  # fmt: skip
                        rows.append(
                            plain(trial(here, int_z(3, along), fill, transforms=transforms)) | {"arm": label}
                        )
                for weights, label in ((Scheme("int", 8, "row"), "W8A8"), (int_z(4), "W4A8")):
                    for inputs, transforms in (
                        ("int8/tensor", ()), ("int8/token", ()), ("power8/tensor", ()), ("power8/token", ()),
                        ("int8/tensor", ("smooth",)), ("int8/tensor", ("rotate", "rotate-mlp")),
                        ("int8/token", ("rotate", "rotate-mlp")),
                    ):  # fmt: skip
                        row = plain(trial(here, weights, "rtn", inputs=inputs, transforms=transforms))
                        rows.append(row | {"arm": label})
    return rows


def tables() -> list[Row]:
    """The strongest quality per bit that the format can express: data types, tables and refinement at 2 to 4 bits."""
    rows: list[Row] = []
    for name in MODELS or ("tales-s", "bundled"):
        where = bed(name)
        for bits in (2, 3, 4):
            for scheme in (
                int_z(bits), Scheme("nf", bits, 64), Scheme("kmeans", bits, 64), Scheme("kmeans:row", bits, "row"),
                Scheme("kmeans", bits, 32, scale="int8:256"),
            ):  # fmt: skip
                rows += [plain(trial(where, scheme, fill)) for fill in ("gptq", "descent")]
    return rows


def columns() -> list[Row]:
    """Columns in 16 bits beside the same bits spent on smaller blocks or wider codes."""
    rows: list[Row] = []
    for name in MODELS or ("tales-s", "bundled"):
        where = bed(name)
        for bits in (2, 3):
            shares = (0.0, 0.02, 0.05, 0.1)
            rows += [plain(trial(where, int_z(bits), "descent", outliers=share)) for share in shares]
            rows += [plain(trial(where, int_z(bits, block=block), "descent")) for block in (32, 16)]
    return rows


PARTS: dict[str, Callable[[], list[Row]]] = {
    "tweak": tweak, "iterations": iterations, "axis": axis, "predictor": predictor, "text": text,
    "planted": planted, "tables": tables, "columns": columns,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("-o", "--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--models", nargs="*", default=[], help="only these models")
    arguments = parser.parse_args()
    MODELS.extend(arguments.models)
    for part in arguments.parts:
        started = time.perf_counter()
        rows = PARTS[part]()
        found = {
            "seconds": round(time.perf_counter() - started, 1),
            "torch": str(torch.__version__),
            "rows": rows,
        }
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / f"calibrated-{part}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
