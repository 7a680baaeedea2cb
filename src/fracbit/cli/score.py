"""`fracbit score`: what each layer is worth, as a table and as JSON that can be edited and handed to `fracbit plan`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fracbit.cli.show import print_json, print_notes, print_table, progress
from fracbit.records.allocation import read_level, read_levels
from fracbit.records.files import check_file
from fracbit.records.scores import Losses, Scores, save_json


def score(
    model: Annotated[str, typer.Argument(help="Folder or hub id of the float model.")],
    method: Annotated[
        str,
        typer.Option(
            help="lim, zd, first, weight-error, gram-error, fisher, oracle, ...; reverse:NAME turns one round."
        ),
    ] = "weight-error",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="JSON file to write.")] = None,
    low: Annotated[
        str, typer.Option(help="Low level, for scores that look at what a scheme does.")
    ] = "int2z/64",
    levels: Annotated[
        str | None, typer.Option(help="Losses under each of these schemes instead, for plan and quantize.")
    ] = None,
    granularity: Annotated[str, typer.Option(help="block or linear.")] = "block",
    fused: Annotated[
        bool, typer.Option("--fused", help="Keep linears that read one input together.")
    ] = False,
    whole: Annotated[
        bool, typer.Option("--whole", help="Read all of large weights instead of a sample of their rows.")
    ] = False,
    text: Annotated[str | None, typer.Option(help="Text for scores that read some.")] = None,
    samples: Annotated[int, typer.Option(help="Samples of the text.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens of a sample.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of random orders and of the samples.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score every block or linear of MODEL; larger is more important."""
    from fracbit.importance import score_method
    from fracbit.pipeline.plan.problem import check_granularity
    from fracbit.pipeline.plan.sampling import sampling_notes
    from fracbit.pipeline.plan.scoring import make_losses, make_scores
    from fracbit.pipeline.study.float_model import load_float, weights_on_disk
    from fracbit.pipeline.study.texts import known_samples_of

    unit = check_granularity(granularity)
    if output is not None:
        check_file(output)
    found: Scores | Losses
    with progress(json) as show:
        weights: Any
        if score_method(method).data_free or text is None:
            weights, ids, seen = weights_on_disk(model, whole=whole), None, {}
            units = weights.units(unit, fused)
        else:
            weights = load_float(model)
            ids, entry = known_samples_of(text, model, weights, samples, length, seed)
            seen = {"text": entry}
            units = weights.weights.units(unit, fused)
        if levels is None:
            found = make_scores(weights, units, method, read_level(low), ids, seed, show)
        else:
            found = make_losses(weights, units, method, read_levels(levels), ids, seed, show)
    found = replace(found, protocol={**found.protocol, **seen})
    if output is not None:
        save_json(found, output)
    if json:
        print_json(found.to_json())
        return
    print_notes(sampling_notes(found.protocol))
    if isinstance(found, Losses):
        rows = [[name, *(f"{loss:.6g}" for loss in row)] for name, row in found.rows.items()]
        print_table(["layer", *map(str, found.schemes)], rows, f"predicted losses: {found.method}")
        return
    rows = [[name, f"{found.values[name]:.6g}"] for name in found.order()]
    print_table(["layer", "score"], rows, f"{method}, the most important first")
