"""`fracbit score`: the score of each layer, as a table and as JSON that can be edited and passed to `fracbit plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast, get_args

import typer

import fracbit
from fracbit.cli import options
from fracbit.cli.names import check_dtype, check_models, check_score, check_texts
from fracbit.cli.show import print_json, print_notes, print_table, progress
from fracbit.errors import RecipeError, check_choice
from fracbit.records.allocation import read_levels
from fracbit.records.files import check_file
from fracbit.records.scores import Losses, save_json
from fracbit.records.spending import LENGTH, SAMPLES, Granularity
from fracbit.records.tables import SCORES


def score(
    model: options.FloatModel,
    method: Annotated[
        str,
        typer.Option(
            help="lim, zd, first, weight-error, gram-error, fisher, oracle, ...; reverse:NAME reverses the order.",
            rich_help_panel=options.MEASURE,
        ),
    ] = "weight-error",
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="JSON file to write.", rich_help_panel=options.WRITE),
    ] = None,
    low: Annotated[
        str,
        typer.Option(help="Low level, for scores that depend on a scheme.", rich_help_panel=options.MEASURE),
    ] = "int2z/64",
    levels: Annotated[
        str | None,
        typer.Option(
            help="Measure losses under each of these schemes instead, for plan and quantize.",
            rich_help_panel=options.MEASURE,
        ),
    ] = None,
    granularity: options.Granularity = "block",
    fused: options.Fused = False,
    whole: options.Whole = False,
    text: options.ScoreText = None,
    samples: options.Samples = SAMPLES,
    length: options.Length = LENGTH,
    seed: options.StudySeed = 0,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Score every block or linear of MODEL; larger is more important."""
    check_score(method)
    for level in read_levels(levels or low):
        check_dtype(level)
    check_choice("granularity", granularity, get_args(Granularity))
    check_texts(read=[text])
    name = method.removeprefix("reverse:")
    if text is None and name in SCORES.reading:
        raise RecipeError(
            f"score {name} reads text; name one with --text, or take a data-free score such as zd"
        )
    if output is not None:
        check_file(output)
    check_models(model)
    from fracbit.pipeline.plan.sampling import sampling_notes

    with progress(json or quiet) as show:
        found = fracbit.score(
            model,
            method,
            levels=levels,
            low=low,
            granularity=cast(Granularity, granularity),
            fused=fused,
            whole=whole,
            text=text,
            samples=samples,
            length=length,
            seed=seed,
            trust_remote_code=trust_remote_code,
            progress=show,
        )
    if output is not None:
        save_json(found, output)
    if json:
        print_json(found.to_json())
        return
    print_notes(() if quiet else sampling_notes(found.protocol))
    if isinstance(found, Losses):
        rows = [[name, *(f"{loss:.6g}" for loss in row)] for name, row in found.rows.items()]
        print_table(["layer", *map(str, found.schemes)], rows, f"predicted losses: {found.method}")
        return
    rows = [[name, f"{found.values[name]:.6g}"] for name in found.order()]
    print_table(["layer", "score"], rows, f"{method}, the most important first")
