"""`fracbit tweak`: the norms of a checkpoint that another program has quantized, moved to where they serve its codes."""

from __future__ import annotations

from typing import Annotated

import typer

import fracbit
from fracbit.cli import options
from fracbit.cli.names import check_better, check_models
from fracbit.cli.show import print_improved, progress
from fracbit.cli.stopped import keeping
from fracbit.records.norm_methods import check_norm_method


def tweak(
    checkpoint: options.Foreign,
    calibration: options.CalibrationTexts,
    output: options.Better,
    against: Annotated[
        str | None,
        typer.Option(
            help="The float model that CHECKPOINT was made of. Without it, norms learn to predict the text.",
            rich_help_panel=options.DATA,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="With --against: predictions (all blocks at once, in memory; default), or block by block adam (the paper's), "
            "closed, or auto (the better of both or neither).",
            rich_help_panel=options.DATA,
        ),
    ] = None,
    samples: options.Samples = 128,
    length: options.SampleLength = None,
    seed: options.StudySeed = 0,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    device: options.Device = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Move the norms of CHECKPOINT, made by another program; all else stays, so that its engines run the output."""
    check_norm_method(method, against)
    check_better(output, calibration, overwrite=overwrite, resume=resume)
    check_models(checkpoint, against)
    with keeping(output), progress(json or quiet) as show:
        made = fracbit.tweak(
            checkpoint, output, calibration, against=against, method=method, samples=samples, length=length, seed=seed,
            overwrite=overwrite, resume=resume, device=device, trust_remote_code=trust_remote_code, progress=show,
        )  # fmt: skip
    print_improved(made, json=json, quiet=quiet)
