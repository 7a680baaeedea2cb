"""`fracbit score`: what each layer is worth, as a table and as JSON that can be edited and handed to `fracbit plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fracbit.cli.show import print_json, print_table, progress
from fracbit.records.allocation import read_level
from fracbit.records.scores import save_json


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
    granularity: Annotated[str, typer.Option(help="block or linear.")] = "block",
    fused: Annotated[
        bool, typer.Option("--fused", help="Keep linears that read one input together.")
    ] = False,
    text: Annotated[str | None, typer.Option(help="Text for scores that read some.")] = None,
    samples: Annotated[int, typer.Option(help="Samples of the text.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens of a sample.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of random orders and of the samples.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score every block or linear of MODEL; larger is more important."""
    from fracbit.importance import score_method
    from fracbit.pipeline.plan import check_granularity
    from fracbit.pipeline.score import make_scores
    from fracbit.pipeline.subject import load_subject, weights_on_disk
    from fracbit.pipeline.texts import samples_of

    unit = check_granularity(granularity)
    with progress(json) as show:
        if score_method(method).data_free or text is None:
            weights = weights_on_disk(model)
            found = make_scores(
                weights, weights.units(unit, fused), method, read_level(low), None, seed, show
            )
        else:
            subject = load_subject(model)
            ids = samples_of(text, model, subject, samples, length, seed)
            units = subject.weights.units(unit, fused)
            found = make_scores(subject, units, method, read_level(low), ids, seed, show)
    if output is not None:
        save_json(found, output)
    if json:
        print_json(found.to_json())
        return
    rows = [[name, f"{found.values[name]:.6g}"] for name in found.order()]
    print_table(["layer", "score"], rows, f"{method}, the most important first")
