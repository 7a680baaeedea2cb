"""Measure what docs/calibrated.md reports: which of the papers' claims hold on small trained models.

    python bench/calibrated/measure.py PART [PART...] [--models NAME...] [--folder bench/results]

Each part writes calibrated-PART.json, from which report.py makes tables of that document: `tweak` those of norm tweaking (and
`iterations` its figures for passes and distances), `axis` and `predictor` those of AdaDim, the others those of their names.

Loss is nats per token on text that no run was calibrated with; `gap` is what a run adds to the float model's. Models: tales-s
and tales-xs of the shared folder and the bundled one.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from frame import RESULTS, Bed, Row, arguments, bed, write_json

import fracbit
from fracbit.checkpoint.load import load_tokenizer
from fracbit.data import Tokens, read_documents
from fracbit.evaluation import perplexity
from fracbit.models import tweak as tweaking
from fracbit.models.blocks import blocks, groups, weight_of
from fracbit.models.find import family_of
from fracbit.models.walk import advance, embed
from fracbit.pipeline.quantize.axis import choose_axes
from fracbit.pipeline.quantize.observe import observe_all
from fracbit.pipeline.study.float_model import load_float
from fracbit.pipeline.study.planted import plant_outliers
from fracbit.quantizers import quantizer
from fracbit.quantizers.adadim import predicted_axis
from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import Scheme

SAMPLES, LENGTH = 48, 256
JUDGED = "&first=120"


@cache
def tokens(where: Bed, text: str) -> Tokens:
    return read_documents(text, load_tokenizer(where.folder), where.vocabulary)


def nll(folder: Path, where: Bed) -> float:
    found = tokens(where, where.evaluation).documents
    return perplexity(fracbit.load(folder, "float32"), found[0] if len(found) == 1 else found).nll


@cache
def float_nll(where: Bed) -> float:
    return nll(where.folder, where)


def trial(
    where: Bed, scheme: Scheme, fill: str, look: Callable[[Path], Row] | None = None, columns: float = 0, **plan: Any
) -> Row:  # fmt: skip
    """Quantize, evaluate: the row of one run, and what `look` finds in the checkpoint; `columns`: a share in 16 bits."""
    settings = {"texts": (where.calibration,), "samples": SAMPLES, "length": LENGTH, "dtype": "float32"}
    recipe = Recipe(
        model=str(where.folder), scheme=scheme, quantizer=fill, search=fill == "descent",
        calibration=Calibration(**settings | plan), outliers=f"cost:{columns}" if columns else None,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "q"
        result = fracbit.quantize(recipe, folder, overwrite=True)
        lost, base, more = nll(folder, where), float_nll(where), look(folder) if look else {}
    row = {
        "model": where.name, "scheme": str(scheme), "quantizer": fill, **plan, "bits": round(result.bits_per_weight, 4),
        "float": round(base, 5), "loss": round(lost, 5), "gap": round(lost - base, 5),
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return row | more


def manifest(folder: Path) -> Row:
    return json.loads((folder / "fracbit.json").read_text())


def int_z(bits: int, axis: str = "in", block: int = 64) -> Scheme:
    return Scheme("int", bits, block, axis, "zero")  # type: ignore[arg-type]


def tweak(where: Bed) -> Iterator[Row]:
    """Norm tweaking: gap recovered at 2, 3 and 4 bits, both input chains, and the drift of channel means with depth."""
    for bits, fill in product((2, 3, 4), ("rtn", "gptq")):

        def look(folder: Path, bits: int = bits) -> Row:
            kept = [one["kept"] for one in manifest(folder).get("tweaks", ())]
            return {"kept": kept, "drift": drift(where, folder) if bits < 4 else None}

        hows = ("none", "adam", "closed", "auto")
        rows = [trial(where, int_z(bits), fill, look, tweak=how) for how in hows]
        yield from (row | {"recovered": round(1 - row["gap"] / rows[0]["gap"], 4)} for row in rows)
    if where.name == "tales-s":
        yield from (trial(where, int_z(2), "gptq", tweak=how, chain="float") for how in ("none", "auto"))


def walk(model: Any, ids: Tensor) -> list[Tensor]:
    """The states [tokens, width] after each block."""
    family = family_of(model)
    hidden, states = embed(model, family, ids), []
    for _, block in blocks(model, family):
        hidden = advance(block, hidden)
        states.append(hidden.states.flatten(0, 1))
    return states


def drift(where: Bed, folder: Path) -> list[float]:
    """After each block, mean over channels of |mean of (float - quantized)| in units of the channel's std."""
    found = tokens(where, where.evaluation).documents
    starts = [document[:128] for document in found[:16]]
    ids = torch.stack(starts) if len(found) > 1 else found[0][: 16 * 128].view(16, 128)
    walked = (walk(fracbit.load(path, "float32"), ids) for path in (where.folder, folder))
    return [round(float(((a - b).mean(0).abs() / a.std(0)).mean()), 5) for a, b in zip(*walked, strict=True)]


def mean_square(found: Tensor, wanted: Tensor) -> Tensor:
    return (found - wanted).square().mean()


def divergence(found: Tensor, wanted: Tensor) -> Tensor:
    """Of the channels of every token, each read as a distribution."""
    found, wanted = found.log_softmax(-1), wanted.log_softmax(-1)
    return torch.nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True)


def iterations(where: Bed) -> Iterator[Row]:
    """Norm tweaking by Adam: 1, 5, 20 and 50 passes at one learning rate, and three distances, each at three rates."""
    ours, rate, once = tweaking.distance, tweaking.LEARNING_RATE, tweaking.fit_by_adam
    distances = {"channel means and variances": ours, "mean square": mean_square, "divergence": divergence}
    tries = [("channel means and variances", passes, 1.0) for passes in (5, 20, 50)]
    tries += [(name, 1, factor) for name in distances for factor in (0.3, 1.0, 3.0)]
    without = trial(where, int_z(2), "gptq")
    yield without
    for distance, passes, factor in tries:

        def repeated(block: Any, family: Any, evidence: Any, lr: float, passes: int = passes) -> None:
            once(block, family, replace(evidence, train=list(evidence.train) * passes), lr)

        changed = {"distance": distances[distance], "fit_by_adam": repeated}
        with mock.patch.multiple(tweaking, **changed):
            row = trial(where, int_z(2), "gptq", tweak=f"adam:rate={factor * rate}")
        share = round(1 - row["gap"] / without["gap"], 4)
        yield row | {"distance": distance, "passes": passes, "rate": factor * rate, "recovered": share}


def axis(where: Bed) -> Iterator[Row]:
    """AdaDim: blocks along the input, along the output, and per layer whichever the unit around it notices less."""
    choices = {"in": ("in", "scheme"), "out": ("out", "scheme"), "ada by nearest": ("in", "nearest"),
               "ada by own loss": ("in", "gptq"), "predicted": ("in", "predicted")}  # fmt: skip
    for bits, fill, (choice, (along, how)) in product((3, 4), ("rtn", "gptq"), choices.items()):
        if (fill, choice) != ("rtn", "ada by own loss"):
            yield trial(where, int_z(bits, along), fill, on_out, axis=how) | {"choice": choice}


def on_out(folder: Path) -> Row:
    """How many linears of each kind have blocks along the output."""
    layers = manifest(folder)["layers"]
    out = [name for name, facts in layers.items() if (facts.get("scheme") or {}).get("axis") == "out"]
    kinds = sorted({name.rpartition(".")[2] for name in layers if "layers." in name})
    by_kind = {kind: sum(name.endswith(kind) for name in out) for kind in kinds}
    return {"out": len(out), "out_by_kind": by_kind}


def predictor(where: Bed) -> Iterator[Row]:
    """How often the scales of a weight alone tell the axis that a trial finds, for rounding to nearest and for GPTQ."""
    model = fracbit.load(where.folder, "float32")
    family = family_of(model)
    stream = tokens(where, where.calibration).stream
    hidden = embed(model, family, stream[: 16 * 128].view(16, 128))
    found: dict[tuple[int, str], list[tuple[str, str]]] = {}  # what was guessed, and what the trial found
    for path, block in blocks(model, family):
        order = groups(block, family)
        stats, after = observe_all(block, hidden, path, order, True, None)
        for bits, how, group in product((3, 4), ("nearest", "gptq"), order):
            own = stats[group[0]]
            schemes = {name: int_z(bits) for name in group}
            best = choose_axes(how, family, block, hidden, group, schemes, own, quantizer("gptq"))
            for name, scheme in best.items():
                guess = predicted_axis(weight_of(block.get_submodule(name)), int_z(bits), own.energy)
                found.setdefault((bits, how), []).append((guess, scheme.axis))
        hidden = after
    for (bits, how), pairs in found.items():
        row = {
            "model": where.name, "bits": bits, "by": how, "linears": len(pairs), "right": sum(a == b for a, b in pairs),
            "out": sum(best == "out" for _, best in pairs),
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        yield row


def text(where: Bed) -> Iterator[Row]:
    """Text to calibrate on: real, written by the model itself, random ids."""
    with tempfile.TemporaryDirectory() as temporary:
        noise = Path(temporary) / "noise.u16"
        ids = np.random.default_rng(0).integers(3, where.vocabulary, (SAMPLES, LENGTH), dtype=np.uint16)
        ids.tofile(noise)
        sources = {"real": where.calibration, "generated": "generated"}
        sources["random ids"] = f"{noise}?length={LENGTH}"
        for (bits, how), (label, source) in product(((3, "none"), (2, "none"), (2, "auto")), sources.items()):
            here = replace(where, calibration=source)
            yield trial(here, int_z(bits), "gptq", tweak=how) | {"calibration": label}


def planted(where: Bed) -> Iterator[Row]:
    """Activation outliers planted by a rescaling that leaves the function: what breaks at W3 and W8A8, and what mends it."""
    both = ("rotate", "rotate-mlp")
    arms: dict[str, tuple[str, tuple[str, ...]]] = {
        "in": ("in", ()), "out": ("out", ()), "smooth": ("in", ("smooth",)), "awq": ("in", ("awq",)),
        "rotate": ("in", ("rotate",)), "rotate both": ("in", both),
    }  # fmt: skip
    runs = [(inputs, ()) for inputs in ("int8/tensor", "int8/token", "power8/tensor", "power8/token")]
    runs += [("int8/tensor", ("smooth",)), ("int8/tensor", both), ("int8/token", both)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "planted"
        float_model = load_float(where.folder)
        plant_outliers(float_model, 60.0, 3)
        float_model.model.float().save_pretrained(folder)
        for file in where.folder.glob("tokenizer*"):
            shutil.copy(file, folder)
        for here in (where, replace(where, name=f"{where.name} planted", folder=folder)):
            for fill, (label, (along, transforms)) in product(("rtn", "gptq"), arms.items()):
                yield trial(here, int_z(3, along), fill, transforms=transforms) | {"arm": label}
            weights = {"W8A8": Scheme("int", 8, "row"), "W4A8": int_z(4)}
            for (label, scheme), (inputs, transforms) in product(weights.items(), runs):
                yield trial(here, scheme, "rtn", inputs=inputs, transforms=transforms) | {"arm": label}


def tables(where: Bed) -> Iterator[Row]:
    """The strongest quality per bit that the format can express: data types, tables and refinement at 2 to 4 bits."""
    for bits in (2, 3, 4):
        schemes = (
            int_z(bits), Scheme("nf", bits, 64), Scheme("kmeans", bits, 64), Scheme("kmeans:row", bits, "row"),
            Scheme("kmeans", bits, 32, scale="int8:256"),
        )  # fmt: skip
        yield from (trial(where, scheme, fill) for scheme in schemes for fill in ("gptq", "descent"))


def columns(where: Bed) -> Iterator[Row]:
    """Columns in 16 bits beside the same bits spent on smaller blocks."""
    for bits in (2, 3):
        for share in (0.0, 0.02, 0.05, 0.1):
            yield trial(where, int_z(bits), "descent", columns=share) | {"outliers": share}
        yield from (trial(where, int_z(bits, block=block), "descent") for block in (32, 16))


PARTS: dict[str, tuple[Callable[[Bed], Iterator[Row]], tuple[str, ...]]] = {
    "tweak": (tweak, ("tales-s", "tales-xs", "bundled")), "iterations": (iterations, ("tales-s", "bundled")),
    "axis": (axis, ("tales-s", "tales-xs", "bundled")), "text": (text, ("tales-s", "bundled")),
    "predictor": (predictor, ("tales-xs", "tales-s", "tales-m", "tales-l", "bundled")), "planted": (planted, ("tales-s",)),
    "tables": (tables, ("tales-s", "bundled")), "columns": (columns, ("tales-s", "bundled")),
}  # fmt: skip
"""What a part measures, and on which models."""


def main() -> None:
    parser = arguments(__doc__, folder=RESULTS, models=None)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    given = parser.parse_args()
    for part in given.parts:
        started = time.perf_counter()
        measure, models = PARTS[part]
        rows = [row for model in given.models or models for row in measure(bed(model, LENGTH, JUDGED))]
        found = {"seconds": round(time.perf_counter() - started, 1), "rows": rows}
        write_json(given.folder / f"calibrated-{part}.json", found)


if __name__ == "__main__":
    main()
