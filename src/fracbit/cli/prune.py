"""`fracbit prune`: drop the least important blocks and write a float checkpoint that transformers loads."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fracbit.cli.show import bytes_text, print_json, print_notes, print_table, progress
from fracbit.errors import RecipeError
from fracbit.records.allocation import read_level
from fracbit.records.scores import Scores, check_scores, load_scores


def prune(
    model: Annotated[str, typer.Argument(help="Folder or hub id of the float model.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder to write.")] = None,
    drop: Annotated[int, typer.Option(help="How many blocks to drop.")] = 1,
    score: Annotated[str, typer.Option(help="Name of a score, or a JSON file of scores of blocks.")] = "lim",
    text: Annotated[str | None, typer.Option(help="Text for scores that read some.")] = None,
    held_out: Annotated[
        str | None,
        typer.Option(help="Other text: compare with lowering blocks by the same order, at equal size."),
    ] = None,
    high: Annotated[str, typer.Option(help="Scheme of what stays, in the comparison.")] = "int4z/64",
    low: Annotated[str, typer.Option(help="Scheme of lowered blocks, in the comparison.")] = "int2z/64",
    picture: Annotated[
        Path | None, typer.Option(help="Picture of the comparison, such as prune.png.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples of each text.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens of a sample.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of random orders and of the samples.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Drop blocks of MODEL in the order of a score; with --held-out, beside quantizing them instead."""
    from fracbit.pipeline.plan.scoring import make_scores
    from fracbit.pipeline.study.float_model import load_float
    from fracbit.pipeline.study.pictures import check_picture, draw_lines
    from fracbit.pipeline.study.prune import at_equal_size, compare_with_quantizing, least_important
    from fracbit.pipeline.study.prune import prune as write
    from fracbit.pipeline.study.texts import samples_of

    if output is None and held_out is None:
        raise RecipeError(
            "nothing to do; name a folder to write with -o, or a text to compare on with --held-out"
        )
    if picture is not None:
        if held_out is None:
            raise RecipeError("the picture is of the comparison: name a text to compare on with --held-out")
        check_picture(picture)
    subject = load_float(model)
    units = subject.weights.units()
    names = [unit.name for unit in units]
    with progress(json) as show:
        ids = samples_of(text, model, subject, samples, length, seed) if text else None
        given = _given(score, names, subject.weights.model)
        scores = given or make_scores(subject, units, score, read_level(low), ids, seed, show)
        dropped = least_important(scores, drop, names)
        lines = None
        if held_out is not None:
            unseen = samples_of(held_out, model, subject, samples, length, seed)
            lines = compare_with_quantizing(
                subject, units, scores, read_level(high), read_level(low), unseen, show
            )
    if picture is not None and lines is not None:
        draw_lines(
            picture,
            lines,
            "stored bits per weight of the whole model",
            "loss, nats per token",
            title=f"{Path(model).name}: blocks by {scores.method} dropped, or lowered from {high} to {low}",
        )
    result = write(model, dropped, output, overwrite) if output is not None else None
    notes = [f"dropped by {scores.method}: {', '.join(dropped)}"]
    if json:
        found = {
            "score": scores.method,
            "dropped": list(dropped),
            "comparison": lines,
            "equal_size": at_equal_size(lines) if lines else None,
            "notes": notes,
        }
        print_json(found | (asdict(result) if result else {}))
        return
    print_notes(notes)
    if lines is not None:
        rows = [[name, f"{bits:.3f}", f"{nll:.4f}"] for name, line in lines.items() for bits, nll in line]
        print_table(["way", "bits per weight", "nats per token"], rows, "block after block")
        pairs = [
            [f"{point[0]:.3f}", f"{point[1]:.4f}", *([f"{other[0]:.3f}", f"{other[1]:.4f}"] if other else ["-", "-"])]
            for point, other in at_equal_size(lines)
        ]  # fmt: skip
        print_table(["pruned: bits", "nats", "quantized: bits, no more", "nats"], pairs, "at equal size")
    if result is not None:
        print(
            f"{result.output}: {result.blocks} blocks, {result.parameters:,} parameters, {bytes_text(result.bytes)}"
        )


def _given(score: str, names: list[str], model: str) -> Scores | None:
    """The scores of a JSON file, which must be of this model; None when `score` is the name of one."""
    if Path(score).suffix != ".json":
        return None
    loaded = load_scores(Path(score))
    if not isinstance(loaded, Scores):
        raise RecipeError(f"{score} holds losses; pruning takes scores, one number a block")
    check_scores(loaded, names, model)
    return loaded
