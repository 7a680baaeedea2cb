"""`fracbit prune`: drop the least important blocks and write a float checkpoint that transformers loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fracbit.checkpoint.folder import check_output
from fracbit.cli import options
from fracbit.cli.names import check_dtype, check_models, check_score, check_texts
from fracbit.cli.show import bytes_text, print_json, print_notes, print_table, progress
from fracbit.errors import OutputError, RecipeError
from fracbit.records.allocation import read_level
from fracbit.records.files import named_path
from fracbit.records.spending import LENGTH, SAMPLES
from fracbit.report.pictures import check_picture, draw_lines

if TYPE_CHECKING:
    from fracbit.pipeline.study.prune_comparison import Point


def prune(
    model: options.FloatModel,
    output: options.Folder = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Picture of the comparison, such as prune.png.", rich_help_panel=options.WRITE),
    ] = None,
    overwrite: options.Overwrite = False,
    drop: Annotated[
        int, typer.Option(help="How many blocks to drop.", min=1, rich_help_panel=options.SMALL)
    ] = 1,
    score: Annotated[
        str,
        typer.Option(
            help="Name of a score, or a JSON file of scores of blocks.", rich_help_panel=options.SMALL
        ),
    ] = "lim",
    high: Annotated[
        str, typer.Option(help="Scheme of other blocks, in the comparison.", rich_help_panel=options.SMALL)
    ] = "int4z/64",
    low: Annotated[
        str, typer.Option(help="Scheme of lowered blocks, in the comparison.", rich_help_panel=options.SMALL)
    ] = "int2z/64",
    text: options.ScoreText = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            help="Other text, for a comparison with lowering blocks in the same order, at equal size.",
            rich_help_panel=options.DATA,
        ),
    ] = None,
    samples: options.Samples = SAMPLES,
    length: options.Length = LENGTH,
    seed: options.StudySeed = 0,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Drop blocks of MODEL in the order of a score; with --held-out, compare this with quantizing them."""
    if output is None and held_out is None:
        raise RecipeError(
            "nothing to do; name a folder to write with -o, or a text to compare on with --held-out"
        )
    if picture is not None:
        if held_out is None:
            raise RecipeError("the picture shows the comparison: name a text to compare on with --held-out")
        check_picture(picture)
    check_score(score)
    for level in (high, low):
        check_dtype(read_level(level))
    if output is not None:
        check_output(named_path(output, OutputError), "", overwrite, resume=False)
    check_texts(read=[text], judged=[held_out])
    check_models(model)
    from fracbit.pipeline.plan.pruning import prune_by_score
    from fracbit.pipeline.study.prune_comparison import at_equal_size

    with progress(json or quiet) as show:
        done = prune_by_score(
            model,
            output,
            drop=drop,
            score=score,
            text=text,
            held_out=held_out,
            high=high,
            low=low,
            samples=samples,
            length=length,
            seed=seed,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=show,
        )
    lines, method, result = done.comparison, done.scores.method, done.written
    if picture is not None and lines is not None:
        draw_lines(
            picture,
            lines,
            "stored bits per weight of the whole model",
            "loss, nats per token",
            title=f"{Path(model).name}: blocks by {method} dropped, or lowered from {high} to {low}",
        )
    pairs = at_equal_size(lines) if lines else None
    notes = [f"dropped by {method}: {', '.join(done.dropped)}"]
    if json:
        found = {
            "score": method,
            "dropped": list(done.dropped),
            "comparison": lines,
            "equal_size": pairs,
            "notes": notes,
        }
        print_json(found | (asdict(result) if result else {}))
        return
    print_notes([] if quiet else notes)
    if lines is not None and pairs is not None:
        _print_comparison(lines, pairs)
    if result is not None:
        print(
            f"{result.output}: {result.blocks} blocks, {result.parameters:,} parameters, {bytes_text(result.bytes)}"
        )


def _print_comparison(
    lines: Mapping[str, Sequence[Point]], pairs: Sequence[tuple[Point, Point | None]]
) -> None:
    rows = [[name, f"{bits:.3f}", f"{nll:.4f}"] for name, line in lines.items() for bits, nll in line]
    print_table(["way", "bits per weight", "nats per token"], rows, "block after block")
    table = [
        [f"{point[0]:.3f}", f"{point[1]:.4f}", *([f"{other[0]:.3f}", f"{other[1]:.4f}"] if other else ["-", "-"])]
        for point, other in pairs
    ]  # fmt: skip
    print_table(["pruned: bits", "nats", "quantized: bits, no more", "nats"], table, "at equal size")
