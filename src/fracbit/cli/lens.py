"""`fracbit lens`: what errors of known strength and kind cost a model, and where it is fragile."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fracbit.cli import options
from fracbit.cli.names import check_errors, check_models, check_texts
from fracbit.cli.show import print_json, print_table, progress
from fracbit.errors import RecipeError, check_choice
from fracbit.records.files import check_file
from fracbit.records.lens import GRANULARITIES, TARGETS, LensReport, additivity, fragility
from fracbit.records.scores import save_json
from fracbit.records.spending import LENGTH
from fracbit.report.pictures import draw_lens


def lens(
    model: options.FloatModel,
    text: Annotated[
        str, typer.Option(help="Held-out text that losses are measured on.", rich_help_panel=options.DATA)
    ],
    samples: options.Samples = 16,
    length: options.Length = LENGTH,
    kinds: Annotated[
        str,
        typer.Option(
            help="gaussian, uniform, rademacher, growing, shrinking, growing-scaled, shrinking-scaled; clip:0.001; "
            "schemes, such as int3z/64.",
            rich_help_panel=options.MEASURE,
        ),
    ] = "gaussian,rademacher,growing,shrinking",
    intensities: Annotated[
        str, typer.Option(help="Relative intensities |delta| / |x|.", rich_help_panel=options.MEASURE)
    ] = "0.02,0.05,0.1,0.2",
    target: Annotated[
        str,
        typer.Option(help="weights, activations or both (each by itself).", rich_help_panel=options.MEASURE),
    ] = "both",
    granularity: Annotated[
        str,
        typer.Option(
            help="Units of the fragility table: block, linear or module.", rich_help_panel=options.MEASURE
        ),
    ] = "block",
    at: Annotated[
        float, typer.Option(help="Intensity of the fragility table.", rich_help_panel=options.MEASURE)
    ] = 0.1,
    seeds: Annotated[int, typer.Option(help="Draws of each noise.", rich_help_panel=options.MEASURE)] = 5,
    plant: Annotated[
        float | None,
        typer.Option(
            help="First plant activation outliers of this factor; the model's outputs do not change.",
            rich_help_panel=options.MEASURE,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="Folder for pictures and CSV files.", rich_help_panel=options.WRITE
        ),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            help="Write weight sensitivities as a score for `fracbit plan`.", rich_help_panel=options.WRITE
        ),
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Add noise to MODEL's weights and activations and measure what each kind costs."""
    if scores is not None:
        _check_scores(scores, granularity, target)
    check_choice("target", target, TARGETS)
    check_choice("granularity", granularity, GRANULARITIES)
    strengths = _numbers(intensities)
    check_errors(_split(kinds))
    check_texts(judged=[text])
    check_models(model)
    from fracbit.perturbation import PERTURBATIONS
    from fracbit.pipeline.study.lens_report import lens_report

    with progress(json or quiet) as show:
        report = lens_report(
            model,
            text,
            kinds=_split(kinds),
            intensities=strengths,
            target=target,
            granularity=granularity,
            at=at,
            seeds=seeds,
            plant=plant,
            samples=samples,
            length=length,
            trust_remote_code=trust_remote_code,
            progress=show,
        )
    if output is not None:
        draw_lens(report, output, noise=PERTURBATIONS)
    if scores is not None:
        save_json(report.scores(), scores)
    if json:
        print_json(_as_json(model, report))
        return
    _print(model, report, at)


def _check_scores(scores: Path, granularity: str, target: str) -> None:
    """Refuse, before any work, scores that no allocation could use. Raises `RecipeError`, `OutputError`."""
    if granularity == "module":
        raise RecipeError(
            "an allocation chooses for blocks or linears; take --granularity block or linear with --scores"
        )
    if target == "activations":
        raise RecipeError(
            "scores for an allocation are sensitivities of weights; take --target weights or both"
        )
    check_file(scores)


def _as_json(model: str, report: LensReport) -> dict[str, Any]:
    return {
        "model": model,
        "planted_norms": report.planted,
        "float_nll": report.base,
        "tokens": report.tokens,
        "curves": [asdict(point) for point in report.curves],
        "effects": [asdict(point) for point in report.effects],
        "fragility": fragility(report.effects),
        "additivity": [{**asdict(each), "ratio": each.ratio} for each in additivity(report.effects)],
    }


def _print(model: str, report: LensReport, at: float) -> None:
    rows = [
        [f"{p.target}: {p.kind}", f"{p.intensity:.3f}", f"{p.change:+.4f}", f"{p.low:+.4f} .. {p.high:+.4f}"]
        for p in report.curves
    ]
    print_table(
        ["noise", "intensity", "loss change", "95 % interval"],
        rows,
        f"{model}: float {report.base:.4f} nats per token"
        + (f", outliers planted at {report.planted} norms" if report.planted else ""),
    )
    table = [
        [str(line["unit"]), str(line["most fragile to"]), f"{float(line['sensitivity']):.4g}"]
        for line in fragility(report.effects)
    ]
    print_table(
        ["unit", "most fragile to", "nats per squared intensity"], table, f"one at a time, at intensity {at}"
    )
    added = [
        [f"{each.target}: {each.kind}", f"{each.parts:+.4f}", f"{each.whole:+.4f}", f"{each.ratio:.2f}"]
        for each in additivity(report.effects)
    ]
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
