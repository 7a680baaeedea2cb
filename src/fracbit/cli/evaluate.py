"""`fracbit eval`: perplexity of any checkpoint, how far it is from the float model, and zero-shot accuracies."""

from __future__ import annotations

from typing import Annotated

import typer

import fracbit
from fracbit.cli import options
from fracbit.cli.names import check_models, check_tasks, check_texts, check_types
from fracbit.cli.show import print_json, print_notes, progress
from fracbit.errors import DataError


def evaluate(
    model: options.AnyModel,
    text: Annotated[
        str | None,
        typer.Option(
            help="Text, jsonl, parquet or id file, datasets:NAME, or bundled; options after ?, see docs/guide.md.",
            rich_help_panel=options.MEASURE,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Zero-shot tasks with commas between them: names of lm-eval, `paper` (the scaling paper's four), .yaml files.",
            callback=check_tasks,
            rich_help_panel=options.MEASURE,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Float model: also KL divergence and top-1 agreement.",
            rich_help_panel=options.MEASURE,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Only this many questions of each task.", min=1, rich_help_panel=options.DATA),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Tokens seen at once; default: the model's positions, at most 2048.",
            min=2,
            rich_help_panel=options.DATA,
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Tokens the window moves by; default: the window.", min=1, rich_help_panel=options.DATA
        ),
    ] = None,
    bos: Annotated[
        int | None, typer.Option(help="Token id put before every window.", rich_help_panel=options.DATA)
    ] = None,
    batch: Annotated[int, typer.Option(help="Windows run together.", min=1, rich_help_panel=options.RUN)] = 8,
    dtype: options.Dtype = "auto",
    device: options.Device = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure perplexity on a text, print its protocol, and measure accuracy on tasks."""
    if text is None and (tasks is None or against is not None):
        raise DataError("nothing to measure: give --text for perplexity, --tasks for accuracy, or both")
    check_types(dtype)
    check_texts(judged=[text])
    check_models(model, against)
    with progress(json or quiet) as show:
        found = fracbit.evaluate(
            model,
            text,
            tasks=() if tasks is None else tasks.split(","),
            limit=limit,
            against=against,
            window=window,
            stride=stride,
            bos=bos,
            batch=batch,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=show,
        )
    if json:
        print_json(found.to_json())
        return
    print_notes([] if quiet else found.notes)
    print("\n".join(found.figures))
