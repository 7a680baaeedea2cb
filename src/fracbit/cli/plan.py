"""`fracbit plan`: which scheme each layer gets within a budget, and what the run will need. No weights are written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import fracbit
from fracbit.checkpoint.place import check_model
from fracbit.cli import options
from fracbit.cli.asked import asked, known_settings
from fracbit.cli.names import check_names
from fracbit.cli.settings import asks_for_help
from fracbit.cli.show import bytes_text, print_json, print_notes, print_settings, print_table, progress
from fracbit.errors import BudgetError, RecipeError
from fracbit.records.allocation import save_allocation
from fracbit.records.files import check_file, write_text
from fracbit.records.recipe import Recipe, recipe_toml
from fracbit.records.spending import ONE_BUDGET
from fracbit.report.pictures import check_picture, draw_bits, draw_plan

if TYPE_CHECKING:
    from fracbit.pipeline.plan.plan import Plan


@dataclass(frozen=True)
class Planning:
    """A plan has no settings of its own beside the recipe's and the budget's."""


def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="Folder or hub id of the float model. [required]", show_default=False
        ),
    ] = None,  # checked below, so that `--set help` needs none
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Write the allocation: .json, or .toml, a recipe for `fracbit quantize`.",
            rich_help_panel=options.WRITE,
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            help="Heat map of bits, such as plan.png; the curve goes beside it.",
            rich_help_panel=options.WRITE,
        ),
    ] = None,
    engine: options.Engine = None,
    keep: options.Keep = None,
    average_bits: options.AverageBits = None,
    size: options.Size = None,
    fits: options.Fits = None,
    levels: options.Levels = None,
    score: Annotated[
        str | None,
        typer.Option(
            help="Name of a score, or a JSON file of scores or losses.", rich_help_panel=options.SMALL
        ),
    ] = None,
    text: options.ScoreText = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            help="Other text, for a comparison with the best uniform scheme.", rich_help_panel=options.DATA
        ),
    ] = None,
    whole: options.Whole = False,
    settings: options.Settings = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Plan how to spend a budget on MODEL, before any weights are written."""
    if asks_for_help(settings):
        print_settings(known_settings(Planning))
        return
    flags = {
        "model": model,
        "trust_remote_code": trust_remote_code or None,
        "spending.engine": engine,
        "spending.average_bits": average_bits,
        "spending.size": size,
        "spending.fits": fits,
        "spending.levels": levels,
        "spending.score": score,
        "spending.text": text,
        "spending.held_out": held_out,
    }
    made = asked(Planning, settings or [], flags, keep=keep or [])
    check_names(made.recipe, made.spending)
    if not made.spending.asked:
        raise BudgetError(ONE_BUDGET)
    if picture is not None:
        check_picture(picture)
    if output is not None:
        _check_output(output, bool(made.recipe.embeddings or made.recipe.head or made.recipe.towers))
    check_model(made.recipe.model, made.recipe.revision)
    with progress(json or quiet) as show:
        found = fracbit.plan(
            made.recipe,
            made.spending,
            whole=whole,
            curve=picture is not None,
            progress=show,
        )
    if output is not None:
        _write(output, found)
    if picture is not None:
        _draw(picture, found)
    if json:
        print_json(found.to_json())
        return
    print_notes(() if quiet else (*found.notes, *_left_out(output, made.recipe)))
    _print(found)


def _write(output: Path, made: Plan) -> None:
    """The whole recipe, or the schemes alone."""
    if output.suffix == ".toml":
        write_text(recipe_toml(made.recipe, made.notes), output)
    else:
        save_allocation(made.spelled_out, output)


def _left_out(output: Path | None, recipe: Recipe) -> tuple[str, ...]:
    """A note where a JSON file, which holds schemes alone, leaves settings of the recipe out."""
    settings = sorted(recipe.model_fields_set - {"model", "revision", "trust_remote_code", "overrides"})
    if output is None or output.suffix == ".toml" or not settings:
        return ()
    return (
        f"{output} holds the schemes alone, without {', '.join(settings)}; -o {output.stem}.toml is the whole recipe",
    )


def _draw(picture: Path, made: Plan) -> None:
    """The heat map of bits, and the curve beside it."""
    draw_bits(picture, made.spelled_out.schemes, made.bits_per_weight, made.problem.weights.blocks)
    curve = picture.with_name(f"{picture.stem}-curve{picture.suffix}")
    chosen = (made.chosen.bits_per_weight, made.chosen.predicted_loss or 0.0)
    draw_plan(curve, made.curve, chosen, made.losses.method)


def _print(made: Plan) -> None:
    rows = [
        [
            c.name,
            f"{c.bits_per_weight:.4f}",
            bytes_text(c.file_bytes),
            f"{c.predicted_loss or 0:.5g}",
            str(c.allocation),
        ]
        for c in made.candidates
    ]
    columns = [
        "solver",
        "bits per weight",
        "weight files",
        f"predicted loss ({made.losses.method})",
        "layers",
    ]
    print_table(columns, rows, f"{made.problem.recipe.model}: {made.budget}")
    if made.problem.budget.question != "average bits":
        _print_neighbours(made)
    print(f"the run: {made.needs}")
    print(made.share)


def _print_neighbours(made: Plan) -> None:
    """What else would fit, or would not: one scheme for every layer."""
    rows = [
        [str(each.scheme or "float"), f"{each.bits_per_weight:.4f}", bytes_text(each.bytes), f"{each.predicted_loss:.5g}",
         "yes" if each.fits else "no"]
        for each in made.neighbours
    ]  # fmt: skip
    running = made.problem.budget.question == "device memory"
    takes = "memory when running" if running else "weight files"
    columns = ["scheme", "bits per weight", takes, f"predicted loss ({made.losses.method})", "fits"]
    print_table(columns, rows, "the same scheme for every layer")


def _check_output(output: Path, ends: bool) -> None:
    """Raises `RecipeError` for a JSON file, which holds only linears, if head, embeddings or towers get a scheme too."""
    check_file(output)
    if ends and output.suffix != ".toml":
        raise RecipeError(
            f"{output} would hold only the linears, without embeddings, head and towers; write a recipe: -o {output.stem}.toml"
        )
