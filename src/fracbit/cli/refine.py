"""`fracbit refine`: codes and scales of a checkpoint that another program has quantized, moved towards the float model."""

from __future__ import annotations

from typing import Annotated

import typer

import fracbit
from fracbit.cli import options
from fracbit.cli.names import check_better, check_models
from fracbit.cli.show import print_improved, progress
from fracbit.cli.stopped import keeping


def refine(
    checkpoint: options.Foreign,
    calibration: options.CalibrationTexts,
    output: options.Better,
    against: Annotated[
        str,
        typer.Option(
            help="The float model that CHECKPOINT was made of.",
            rich_help_panel=options.DATA,
        ),
    ],
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
    """Move codes and scales of CHECKPOINT (GPTQ, AWQ, compressed-tensors, GGUF) towards the float model, in its own format."""
    check_better(output, calibration, overwrite=overwrite, resume=resume)
    check_models(checkpoint, against)
    with keeping(output), progress(json or quiet) as show:
        made = fracbit.refine(
            checkpoint, output, calibration, against, samples=samples, length=length, seed=seed, overwrite=overwrite,
            resume=resume, device=device, trust_remote_code=trust_remote_code, progress=show,
        )  # fmt: skip
    print_improved(made, json=json, quiet=quiet)
