"""`fracbit lens`: what errors of known strength and character cost a model, and where it is fragile."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fracbit.cli.show import print_json, print_table, progress
from fracbit.errors import RecipeError
from fracbit.records.files import check_file
from fracbit.records.scores import save_json


def lens(
    model: Annotated[str, typer.Argument(help="Folder or hub id of the float model.")],
    text: Annotated[str, typer.Option(help="Held-out text that losses are measured on.")],
    kinds: Annotated[
        str,
        typer.Option(
            help="gaussian, uniform, rademacher, growing, shrinking, growing-scaled, shrinking-scaled; clip:0.001; "
            "schemes, such as int3z/64."
        ),
    ] = "gaussian,rademacher,growing,shrinking",
    intensities: Annotated[
        str, typer.Option(help="Relative intensities |delta| / |x|.")
    ] = "0.02,0.05,0.1,0.2",
    target: Annotated[str, typer.Option(help="weights, activations or both (each by itself).")] = "both",
    granularity: Annotated[
        str, typer.Option(help="Units of the fragility table: block, linear or module.")
    ] = "block",
    at: Annotated[float, typer.Option(help="Intensity of the fragility table.")] = 0.1,
    seeds: Annotated[int, typer.Option(help="Draws of each noise.")] = 5,
    plant: Annotated[
        float | None,
        typer.Option(
            help="First plant activation outliers of this factor, which leaves the model's function as it is."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples of the text.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens of a sample.")] = 256,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for pictures and CSV files.")
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(help="Write weight sensitivities as a score for `fracbit plan`.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Put noise into MODEL's weights and activations and see what each kind costs."""
    from fracbit.pipeline.study.float_model import load_float
    from fracbit.pipeline.study.lens import SEEDS, additivity, fragility, plant_outliers, sensitivity_scores
    from fracbit.pipeline.study.lens_report import draw_report, make_report
    from fracbit.pipeline.study.texts import known_samples_of

    if seeds < SEEDS:
        raise RecipeError(f"{seeds} seeds say little about noise; take at least {SEEDS}")
    if scores is not None and granularity == "module":
        raise RecipeError(
            "an allocation chooses for blocks or linears; take --granularity block or linear with --scores"
        )
    if scores is not None:
        check_file(scores)
    subject = load_float(model)
    planted = 0 if plant is None else plant_outliers(subject, plant)
    if plant is not None and planted == 0:
        raise RecipeError(
            f"{model} has no norm that linears alone read: no outliers can be planted without changing it"
        )
    ids, seen = known_samples_of(text, model, subject, samples, length)
    with progress(json) as show:
        report = make_report(
            subject, ids, _split(kinds), _numbers(intensities), target, granularity, at, range(seeds), show
        )  # fmt: skip
    lines, sums = fragility(report.effects), additivity(report.effects)
    if output is not None:
        draw_report(report, output)
    if scores is not None:
        weights = [point for point in report.effects if point.target == "weights"]
        kind = weights[0].kind if weights else ""
        if not kind:
            raise RecipeError(
                "sensitivities for an allocation are those of weights; take --target weights or both"
            )
        save_json(
            sensitivity_scores(
                subject, weights, kind, {"intensity": at, "seeds": seeds, "tokens": ids.numel(), "text": seen}
            ),
            scores,
        )
    if json:
        print_json(
            {
                "model": model,
                "planted_norms": planted,
                "float_nll": report.base,
                "tokens": report.tokens,
                "curves": [asdict(point) for point in report.curves],
                "effects": [asdict(point) for point in report.effects],
                "fragility": lines,
                "additivity": [{**asdict(each), "ratio": each.ratio} for each in sums],
            }
        )
        return
    rows = [
        [f"{p.target}: {p.kind}", f"{p.intensity:.3f}", f"{p.change:+.4f}", f"{p.low:+.4f} .. {p.high:+.4f}"]
        for p in report.curves
    ]
    print_table(
        ["noise", "intensity", "loss change", "95 % interval"],
        rows,
        f"{model}: float {report.base:.4f} nats per token"
        + (f", outliers planted at {planted} norms" if planted else ""),
    )
    table = [
        [str(line["unit"]), str(line["most fragile to"]), f"{float(line['sensitivity']):.4g}"]
        for line in lines
    ]
    print_table(
        ["unit", "most fragile to", "nats per squared intensity"], table, f"one at a time, at intensity {at}"
    )
    added = [[f"{s.target}: {s.kind}", f"{s.parts:+.4f}", f"{s.whole:+.4f}", f"{s.ratio:.2f}"] for s in sums]
    print_table(["noise", "sum of units alone", "all at once", "ratio"], added, "do losses add up?")


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in _split(text)]
    except ValueError as error:
        raise RecipeError(
            f"--intensities takes numbers with commas between them, such as 0.02,0.1; got {text!r}"
        ) from error
