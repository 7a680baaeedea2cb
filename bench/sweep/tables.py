"""The tables of docs/scaling.md, all but that of rate.py, from the rows of a study.

python bench/sweep/tables.py docs/scaling/rows
"""

from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from frame import arguments, table

from fracbit.records.row import Row
from fracbit.report import fit
from fracbit.sweeps.parquet import import_parquet

MODELS = ("tales-xs", "tales-s", "tales-m", "tales-l", "bundled")
Point = tuple[str, str, int, str]  # model, data type with what sets it apart, bits, block


def name_of(row: Row) -> str:
    """The model's short name."""
    return row.run.recipe.model.rsplit("/", 1)[-1]


def kind_of(row: Row) -> str:
    """The data type, and everything that sets a run apart but bits and block."""
    part, plan = fit.slice_of(row), row.run.recipe.calibration
    words = (
        part.dtype,
        part.offset,
        part.axis,
        part.quantizer,
        "search" * part.search,
        part.correction,
        "float-chain" * (part.chain == "float"),
        *(() if plan is None else (*plan.transforms, str(plan.inputs or ""))),
    )
    return " ".join(word for word in (*words, part.outliers) if word not in ("", "none", "in", "rtn"))


class Study:
    """Rows by what they are; several seeds of one point are averaged."""

    def __init__(self, rows: Iterable[Row]) -> None:
        """Rows of any texts; those of one text are found by their model."""
        self.rows = [row for members in fit.groups(list(rows)).values() for row in members]
        self.floats = {name_of(row): row for row in self.rows if not row.run.quantized}
        self.points: dict[Point, list[Row]] = defaultdict(list)
        for row in self.rows:
            if row.run.quantized:
                scheme = row.run.recipe.scheme
                self.points[name_of(row), kind_of(row), scheme.bits, str(scheme.block)].append(row)

    def above(self, model: str, kind: str, bits: int, block: str = "64") -> float | None:
        """Nats per token above the float model; None where it was not run."""
        rows = self.points.get((model, kind, bits, block))
        if not rows or model not in self.floats:
            return None
        return mean((row.nll or 0) - (self.floats[model].nll or 0) for row in rows)

    def width(self, model: str, kind: str, bits: int, block: str = "64") -> float | None:
        """Stored bits per quantized weight."""
        rows = self.points.get((model, kind, bits, block))
        return rows[0].bits_per_weight if rows else None


def number(value: float | None, places: int = 3) -> str:
    """A figure of a table; nothing for what is not there."""
    return "" if value is None else f"{value:.{places}f}"


def show(head: str | Sequence[str], lines: Iterable[Sequence[str]], title: str) -> None:
    """Print a table; lines without a figure are left out."""
    table(head, (line for line in lines if any(line[1:])), title)


def offsets(study: Study, models: Sequence[str], title: str) -> None:
    """Height above the 4-bit curve at equal total bits, and the shift of total bits at equal loss."""
    kinds = ["int", "int zero", "float", "nf", "quantile", "kmeans", "dynamic", "power:1/2", "power"]
    lines, laws = [], []
    for measure, kind in product(("loss", "shift"), kinds):
        rows = [study.floats[model] for model in models if model in study.floats]
        rows += [row for (model, of, _, block), found in study.points.items()
                 if model in models and of == kind and block == "64" for row in found]  # fmt: skip
        models_at = Counter(fit.bits_of(row) for row in rows)
        everywhere = [item for item in fit.offsets(rows) if models_at[item.bits] == len(models)]
        found = {item.bits: getattr(item, measure) for item in everywhere}
        lines.append([f"{kind}, {measure}", *(interval(found.get(bits)) for bits in (2, 3, 5, 6, 7, 8, 16))])
        law = fit.power_law(rows) if measure == "loss" else None
        if law is not None:
            laws.append([kind, number(law.rms), number(law.spread), number(law.interpolation_rms),
                         number(law.alpha, 2), number(law.beta, 2)])  # fmt: skip
    show(" | 2 | 3 | 5 | 6 | 7 | 8 | float", lines, f"offsets from 4 bits, {title}")
    show(" | law's residual | spread | lines, left out | alpha | beta", laws, f"power law, {title}")


def interval(found: fit.Interval | None) -> str:
    """Value and half its 95 % interval."""
    return "" if found is None else f"{found.value:+.3f} ± {(found.high - found.low) / 2:.3f}"


def by(study: Study, kinds: Sequence[str], widths: Sequence[int], block: str, title: str) -> None:
    """Loss above float, a line a model and width, a column a kind."""
    lines = ([model, str(bits), *(number(study.above(model, kind, bits, block), 4) for kind in kinds)]
             for model in MODELS for bits in widths)  # fmt: skip
    show(["model", "bits", *kinds], (line if any(line[2:]) else [line[0]] for line in lines), title)


def blocks(study: Study, kinds: Sequence[str], widths: Sequence[int]) -> None:
    """Loss above float and bits per weight, a line a model, kind and width, a column a block."""
    sizes = ["tensor", "flat:1024", "flat:256", "flat:64", "row", "256", "128", "64", "32", "16", "8"]
    figures: list[tuple[str, Callable[..., float | None]]] = [("", study.above), ("bits of ", study.width)]
    lines = ([f"{word}{model} {kind} {bits}", *(number(of(model, kind, bits, size)) for size in sizes)]
             for model in MODELS for kind in kinds for bits in widths for word, of in figures)  # fmt: skip
    show(["", *sizes], lines, "blocks")


def fronts(study: Study, group: Sequence[str], title: str) -> None:
    """What lies on the front, and the sentences for some budgets."""
    rows = [row for row in study.rows if name_of(row) in group]
    best = fit.front(rows)
    lines = ([fit.in_words(row), fit.size_text(row.model_bits), number(row.nll)] for row in best)
    show(["front", "size", "nats"], lines, title)
    for kilobytes in (140, 160, 180, 200, 250, 300, 500, 1000):
        advice = fit.advise(rows, kilobytes * 8e3)
        if advice is not None:
            print(f"- {advice.sentence}. {advice.doubt}")


def accuracies(study: Study) -> None:
    """Loss and accuracy, and their correlation: over all rows asked, and over those that are not broken."""
    asked = [row for row in study.rows if row.accuracies]
    tasks = sorted({task for row in asked for task in row.accuracies})
    lines = [[f"{name_of(row)} {fit.bits_of(row)} {kind_of(row) if row.run.quantized else 'float'}",
              number(row.nll), *(number(row.accuracies.get(task)) for task in tasks)]
             for row in sorted(asked, key=lambda row: row.nll or 0)]  # fmt: skip
    show(["", "nats", *tasks], lines, "accuracy")
    for task in tasks:
        capped = [row.model_copy(update={"nll": min(row.nll or 0, math.log(100))}) for row in asked]
        own = {name: fit.correlation([row for row in asked if name_of(row) == name], task) for name in MODELS}
        print(f"- Pearson of {task} and loss: {fit.correlation(asked, task)}; perplexity capped at 100: "
              f"{fit.correlation(capped, task)}; by model {own}")  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("rows", type=Path)
    rows = import_parquet(parser.parse_args().rows)
    study = Study(row for row in rows if row.status == "done")
    failed = sum(row.status == "failed" for row in rows)
    print(f"{len(rows)} rows, {failed} failed, {len(study.rows)} runs that differ\n")
    types = ["int", "float", "quantile", "nf", "int zero", "kmeans", "dynamic", "power:1/2", "power"]
    offsets(study, MODELS[1:4], "tales-s, -m, -l")
    offsets(study, MODELS[:4], "with tales-xs")
    for block in ("64", "row"):
        by(study, types, (2, 3, 4, 5, 6, 7, 8), block, f"data types, block {block}")
    by(study, ["float", "float:e2m0", "float:e3m0"], (3, 4), "64", "float splits")
    blocks(study, ["int", "nf", "float"], (3, 4))
    for share, dtype in product(("0.02", "0.05"), ("int", "nf")):
        columns = [
            dtype,
            *(f"{dtype} {chosen}:{share}" for chosen in ("random", "proxy")),
            f"{dtype} float-chain activation:{share}",
        ]
        by(study, columns, (2, 3, 4), "64", f"16-bit columns, {share}")
    widths = ((model, study.width(model, kind, 3))
              for model in MODELS for kind in ("int", "int proxy:0.02", "int proxy:0.05"))  # fmt: skip
    print([(model, number(value)) for model, value in widths])
    by(study, ["int", "int mean", "nf", "nf mean"], (2, 3, 4, 5), "64", "centering")
    by(study, ["int", "int out", "nf", "nf out"], (2, 3, 4), "64", "axis, block 64")
    by(study, ["int", "int search", "nf", "nf search"], (2, 3, 4), "64", "searched ranges")
    tweaks = ["", " closed", " adam", " auto"]
    for chain in ("", " float-chain"):
        corrected = [f"int zero{name}{how}" for name in ("", " gptq") for how in tweaks]
        corrected += ["int zero descent search", "int zero descent search auto"]
        chained = [kind if kind == "int zero" else kind + chain for kind in corrected]
        by(study, chained, (2, 3, 4), "64", f"quantizers and corrections{chain}")
    fronts(study, MODELS[:4], "front of the stories")
    fronts(study, MODELS[4:], "front of the bundled model")
    accuracies(study)
    for model in MODELS:
        own = [
            row for row in study.rows if name_of(row) == model and row.run.quantized and not row.accuracies
        ]
        shares = [row.evaluation_seconds / row.seconds for row in own if row.evaluation_seconds]
        if shares:
            print(f"{model}: {median(shares):.3f} of a run is its evaluation")


if __name__ == "__main__":
    main()
