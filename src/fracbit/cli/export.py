"""`fracbit export`: a fracbit checkpoint in a format that other programs read."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import fracbit
from fracbit.cli import options
from fracbit.cli.names import check_export, check_models, check_texts
from fracbit.cli.show import bytes_text, print_json, print_notes, progress
from fracbit.cli.stopped import keeping
from fracbit.records.tables import FORMATS


def export(
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT", help="Folder or hub id of a fracbit checkpoint."),
    ],
    to: Annotated[
        str,
        typer.Option(
            help=f"Format: {', '.join(FORMATS.names)}; some take a parameter after a colon, such as float:fp32.",
            rich_help_panel=options.WRITE,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="Folder for the export, or a file that ends in .gguf.",
            rich_help_panel=options.WRITE,
        ),
    ],
    requantize: Annotated[
        bool,
        typer.Option(
            "--requantize",
            help="Round layers that the format cannot hold again, to the nearest scheme that it can (or store floats), and say "
            "what that costs.",
            rich_help_panel=options.WRITE,
        ),
    ] = False,
    held_out: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="With --requantize: text on which the cost is also measured in predictions (mean KL from CHECKPOINT).",
            rich_help_panel=options.MEASURE,
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write CHECKPOINT in another format. If it cannot hold a layer, the error says so and nothing is written."""
    check_export(output, to, overwrite=overwrite, resume=resume)
    check_texts(judged=[held_out])
    check_models(checkpoint)
    with keeping(output), progress(json or quiet) as show:
        made = fracbit.export(
            checkpoint, output, to, requantize=requantize, held_out=held_out, overwrite=overwrite, resume=resume,
            trust_remote_code=trust_remote_code, progress=show,
        )  # fmt: skip
    print_notes(() if quiet else made.notes)
    if json:
        print_json(
            {
                **asdict(made),
                "requantized": {name: layer.to_json() for name, layer in made.requantized.items()},
            }
        )
    else:
        print(f"{made.output}: {made.format}, {bytes_text(made.bytes)}")
