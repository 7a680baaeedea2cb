"""`fracbit verify`: whether the bytes of a checkpoint are those that were written."""

from __future__ import annotations

from dataclasses import asdict

import typer

from fracbit.cli import options
from fracbit.cli.names import check_models
from fracbit.cli.show import bytes_text, print_json, progress


def verify(
    model: options.AnyModel,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare every tensor and file of MODEL with the hashes in its manifest. A float model must be whole and finite.

    Exit code 1 when something is wrong; every fault is a line.
    """
    check_models(model)
    import fracbit

    with progress(json or quiet) as show:
        found = fracbit.verify(model, progress=show)
    if json:
        print_json(asdict(found))
    else:
        for fault in found.faults:
            print(fault)
        how = "by their hashes" if found.hashed else "without hashes: the manifest has none"
        print(
            f"{found.tensors} tensors in {found.files} files, {bytes_text(found.bytes)}, checked {how}: "
            f"{len(found.faults) or 'no'} fault{'s' if len(found.faults) != 1 else ''}"
        )
    if found.faults:
        raise typer.Exit(1)
