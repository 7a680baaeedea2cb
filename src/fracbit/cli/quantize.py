"""`fracbit quantize`: a model and a recipe in, a smaller checkpoint out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

import fracbit
from fracbit.checkpoint.export.one_file import made_in
from fracbit.checkpoint.place import check_model
from fracbit.cli import options
from fracbit.cli.asked import asked, known_settings
from fracbit.cli.names import check_format, check_names
from fracbit.cli.settings import asks_for_help
from fracbit.cli.show import (
    bytes_text,
    print_json,
    print_notes,
    print_said,
    print_settings,
    print_table,
    progress,
)
from fracbit.cli.stopped import keeping
from fracbit.errors import OutputError, RecipeError, SourceError
from fracbit.records.files import named_path
from fracbit.records.progress import rank
from fracbit.records.tables import SERVING

if TYPE_CHECKING:
    from fracbit.records.run import Result


@dataclass(frozen=True)
class Running:
    """Where the work is done, and in which portions.

    - `device`: where blocks are calibrated, one at a time: cpu, cuda, ...
    - `shard_mb`: largest weight file of a data-free run in MB; limits its memory.
    - `compare`: at the end, compare the predictions with the float model's, on spending.held_out or a small builtin text.
    """

    device: str = "cpu"
    shard_mb: int = 256
    compare: bool = True


def quantize(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Folder or hub id of the float model; not needed if the recipe names it.",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Argument(
            metavar="RECIPE",
            help="Recipe (TOML), or an allocation (JSON) that `fracbit plan -o` wrote; options override a recipe.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Folder to write; with --for llama.cpp also a file that ends in .gguf.",
            rich_help_panel=options.WRITE,
        ),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="Type, bits and block of the weights, such as nf4/64, int3z/128 (z: with a zero point) or 'int4/64 out' "
            "(blocks along the output channels).",
            rich_help_panel=options.WRITE,
        ),
    ] = None,
    quantizer: Annotated[
        str | None,
        typer.Option(
            help="How codes are chosen: rtn (nearest), or gptq or descent (with calibration text).",
            rich_help_panel=options.WRITE,
        ),
    ] = None,
    engine: options.Engine = None,
    keep: options.Keep = None,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    average_bits: options.AverageBits = None,
    size: options.Size = None,
    fits: options.Fits = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="fast (no data), good or best (with --calibration): the longer it takes, the less is lost.",
            rich_help_panel=options.SMALL,
        ),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            help="Text, ids, `builtin` or `generated`, for quantizers that read data; repeatable.",
            rich_help_panel=options.DATA,
        ),
    ] = None,
    allow_float: Annotated[
        float,
        typer.Option(
            help="Share of the blocks' matrices that may stay float without a warning.",
            min=0,
            max=1,
            rich_help_panel=options.RUN,
        ),
    ] = 0.1,
    settings: options.Settings = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Quantize MODEL into a folder that transformers loads once fracbit is imported."""
    if asks_for_help(settings):
        print_settings(known_settings(Running))
        return
    if (
        recipe is None
        and model is not None
        and model.endswith(".toml")
        and not named_path(model, SourceError).is_dir()
    ):
        recipe, model = Path(model), None
    allocation = recipe if recipe is not None and recipe.suffix == ".json" else None
    flags = {
        "model": model,
        "quantizer": quantizer,
        "trust_remote_code": trust_remote_code or None,
        "calibration.texts": calibration or None,
        "spending.preset": preset,
        "spending.engine": engine,
        "spending.average_bits": average_bits,
        "spending.size": size,
        "spending.fits": fits,
    }
    path = None if allocation else recipe
    made = asked(Running, settings or [], flags, scheme=scheme, keep=keep or [], path=path)
    check_names(made.recipe, made.spending)
    if output is None:
        raise RecipeError("no output folder; name one with -o OUT")
    if made.run.shard_mb < 1:
        raise RecipeError(f"run.shard_mb must be at least 1 (MB), got {made.run.shard_mb}")
    check_model(made.recipe.model, made.recipe.revision)
    engine = made.spending.engine
    made_in(named_path(output, OutputError), engine, resume=resume, overwrite=overwrite)
    check_format(SERVING.get(engine, "") if engine else "")
    long = made.recipe.calibration is not None or made.spending.preset is not None
    with keeping(output, beside=engine is not None), progress(json or quiet) as show:
        result = fracbit.quantize(
            made.recipe,
            output,
            spending=made.spending,
            allocation=allocation,
            overwrite=overwrite,
            resume=resume,
            device=made.run.device,
            shard_bytes=made.run.shard_mb << 20,
            allow_float=allow_float,
            compare=made.run.compare,
            progress=show,
            announce=print_said if long and not (json or quiet or resume) else None,
        )
    if rank():
        return
    if json:
        print_json(asdict(result))
        return
    print_notes(() if quiet else result.notes)
    _print_result(result, made.recipe.calibration is not None)
    if not quiet:
        print_said(f"next: {_onwards(result.output, made.spending.engine)}")


def _print_result(result: Result, calibrated: bool) -> None:
    if calibrated:
        from fracbit.checkpoint.summary import loss_table

        print_table(*loss_table(result.output), title="relative loss")
    weights = (
        "nothing quantized"
        if result.bits_per_weight is None
        else f"{result.bits_per_weight:.4f} bits per weight"
    )
    print(
        f"{result.output}: {weights}, {result.bits_per_parameter:.4f} bits per parameter, {bytes_text(result.bytes)} "
        f"(source {bytes_text(result.source_bytes)}), {result.seconds:.1f} s, peak {bytes_text(result.peak_rss_bytes)}"
    )
    print(result.share)
    if result.bought is not None:
        print(result.bought)


def _onwards(output: str, engine: str | None) -> str:
    """The commands that a user may want next."""
    if engine is not None:
        return f"fracbit prove {quote(output)}"
    rest = f"fracbit verify {quote(output)}, fracbit export {quote(output)} --to gguf -o model.gguf"
    return f"fracbit generate {quote(output)} 'Once upon a time', {rest}"
