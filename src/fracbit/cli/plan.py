"""`fracbit plan`: what a budget buys, who gets what, what the run will need. No weights are written."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fracbit.cli.show import bytes_text, print_json, print_notes, print_table, progress
from fracbit.errors import RecipeError
from fracbit.records.allocation import read_levels, recipe_text, save_allocation
from fracbit.records.files import check_file, write_text
from fracbit.records.recipe import Override, Recipe
from fracbit.records.scheme import parse_scheme


def plan(
    model: Annotated[str, typer.Argument(help="Folder or hub id of the float model.")],
    average_bits: Annotated[
        float | None, typer.Option(help="Stored bits per quantized weight, any fraction.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Size of all weight files, such as 1.2GB.")] = None,
    fits: Annotated[str | None, typer.Option(help="Memory of a device, such as 8GB; see --context.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of context that must fit beside the weights.")] = 2048,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    levels: Annotated[
        str, typer.Option(help="Schemes to choose from, such as nf4/64,nf2/64.")
    ] = "int4z/64,int3z/64,int2z/64",
    score: Annotated[
        str, typer.Option(help="Name of a score, or a JSON file of scores or losses.")
    ] = "weight-error",
    solver: Annotated[
        str, typer.Option(help="exact (least predicted loss) or order (the paper's).")
    ] = "exact",
    granularity: Annotated[str, typer.Option(help="block or linear.")] = "linear",
    fused: Annotated[
        bool, typer.Option("--fused", help="Keep linears that read one input together.")
    ] = False,
    whole: Annotated[
        bool, typer.Option("--whole", help="Read all of large weights instead of a sample of their rows.")
    ] = False,
    embeddings: Annotated[str | None, typer.Option(help="Scheme of the embeddings, such as int8:64.")] = None,
    head: Annotated[str | None, typer.Option(help="Scheme of the output head, such as int8:64.")] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Pattern of layer names that stay float; repeatable.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Text for scores that read some.")] = None,
    held_out: Annotated[
        str | None, typer.Option(help="Other text: measure against the best uniform scheme on it.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples of each text.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens of a sample.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of random orders and of the samples.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="Write the allocation: .json, or .toml, a recipe for `fracbit quantize`."
        ),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Heat map of bits, such as plan.png; the curve goes beside it.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Plan how MODEL would spend a budget, before anything is written."""
    from fracbit.importance import read_size
    from fracbit.pipeline.plan.problem import (
        UNCHECKED,
        Ask,
        check_granularity,
        check_solver,
        contest,
        make_plan,
        make_problem,
    )
    from fracbit.pipeline.plan.spending import named_scores
    from fracbit.pipeline.study.float_model import load_float
    from fracbit.pipeline.study.pictures import check_picture, draw_bits, draw_plan
    from fracbit.pipeline.study.texts import known_samples_of, samples_of, seen_notes

    ask = Ask(
        average_bits, read_size(size) if size else None, read_size(fits) if fits else None, context, batch
    )
    if picture is not None:
        check_picture(picture)
    if output is not None:
        _check_output(output, bool(embeddings or head))
    given = named_scores(score)
    if text is not None and text == held_out:
        raise RecipeError(
            "--held-out is the text that scores saw; name another, or the comparison flatters the allocation"
        )
    recipe = Recipe(
        model=model,
        seed=seed,
        embeddings=parse_scheme(embeddings) if embeddings else None,
        head=parse_scheme(head) if head else None,
        overrides=tuple(Override(layers=pattern, keep=True) for pattern in keep or ()),
    )
    problem = make_problem(recipe, read_levels(levels), ask, check_granularity(granularity), fused, whole)
    with progress(json) as show:
        subject = load_float(model) if text or held_out else None
        ids, seen = None, None
        if text and subject:
            ids, seen = known_samples_of(text, model, subject, samples, length, seed)
        made = make_plan(
            problem, given, check_solver(solver), subject if text else None, ids, picture is not None, show
        )
        chosen = made.chosen
        allocation, measured = chosen.allocation, None
        overlap: tuple[str, ...] = ()
        if held_out and subject:
            unseen = samples_of(held_out, model, subject, samples, length, seed)
            measured = contest(
                subject, problem.units, allocation, unseen, problem.levels, problem.budget.bits
            )
            allocation = measured.winner
            overlap = seen_notes(held_out, seen or made.losses.protocol.get("text"), model, subject)
    allocation = problem.spelled_out(allocation)
    if output is not None and output.suffix == ".toml":
        write_text(recipe_text(allocation, recipe), output)
    elif output is not None:
        save_allocation(allocation, output)
    if picture is not None:
        shapes = {name: (layer.out, layer.width) for name, layer in problem.weights.layers.items()}
        draw_bits(picture, allocation.schemes, shapes, problem.weights.blocks)
        curve = picture.with_name(f"{picture.stem}-curve{picture.suffix}")
        draw_plan(
            curve, made.curve, (chosen.bits_per_weight, chosen.predicted_loss or 0.0), made.losses.method
        )
    unchecked = () if held_out else (UNCHECKED,)
    notes = (
        *made.notes,
        *(note for note in allocation.notes if note not in made.notes),
        *overlap,
        *unchecked,
    )
    if json:
        print_json(
            {
                "model": model,
                "budget": made.budget,
                "candidates": [
                    {k: v for k, v in asdict(c).items() if k != "allocation"} for c in made.candidates
                ],
                "allocation": allocation.to_json(),
                "needs": asdict(made.needs),
                "held_out": None
                if measured is None
                else {k: v for k, v in asdict(measured).items() if k != "winner"},
                "notes": list(notes),
            }
        )
        return
    print_notes(notes)
    rows = [
        [
            c.name,
            f"{c.bits_per_weight:.4f}",
            bytes_text(c.file_bytes),
            f"{c.predicted_loss or 0:.5g}",
            _used(c.allocation),
        ]
        for c in made.candidates
    ]
    print_table(["solver", "bits per weight", "weight files", f"predicted loss ({made.losses.method})", "layers"], rows,
                f"{model}: {made.budget}")  # fmt: skip
    needs = made.needs
    print(
        f"the run: about {bytes_text(needs.memory_bytes)} of memory, {bytes_text(needs.disk_bytes)} on disk, "
        f"{needs.seconds:.2g} s for round-to-nearest"
    )


def _used(allocation: Any) -> str:
    return ", ".join(f"{count} x {scheme or 'float'}" for scheme, count in allocation.used().items())


def _check_output(output: Path, ends: bool) -> None:
    """Raises `RecipeError` for an allocation in JSON, which holds linears alone, where head or embeddings get a scheme too."""
    check_file(output)
    if ends and output.suffix != ".toml":
        raise RecipeError(
            f"{output} would hold the linears alone, without --embeddings and --head; write a recipe: -o {output.stem}.toml"
        )
