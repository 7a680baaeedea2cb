"""`fracbit prove`: whether an engine computes what an export stores."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from fracbit.cli import options
from fracbit.cli.names import check_models, check_texts
from fracbit.cli.show import print_json, print_notes
from fracbit.records.tables import ENGINES


def prove(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="EXPORT",
            help="Folder or .gguf file that fracbit wrote for an engine.",
        ),
    ],
    engine: Annotated[
        str | None,
        typer.Option(
            "--for", help=f"Engine: {', '.join(ENGINES.names)}. Default: the first that runs the format."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="The fracbit checkpoint that EXPORT was made from, if it has moved."),
    ] = None,
    text: Annotated[str, typer.Option(help="Text to predict.")] = "bundled:held-out",
    samples: Annotated[int, typer.Option(help="Samples of the text.", min=1)] = 2,
    length: Annotated[int, typer.Option(help="Ids in a sample.", min=2)] = 128,
    environments: Annotated[
        str, typer.Option(help="Folder with an environment for each engine; a missing one is made.")
    ] = "~/.cache/fracbit/engines",
    json: options.Json = False,
) -> None:
    """Run EXPORT in an engine, in an environment of its own, and compare with the checkpoint. Writes proof.json beside it.

    Exit code 1 where a decoded weight differs.
    """
    import fracbit

    if engine is not None:
        ENGINES.check(engine)
    check_texts(judged=[text])
    check_models(folder, against)
    found = fracbit.prove(
        folder, engine, against=against, text=text, samples=samples, length=length, environments=environments,
        announce=lambda what: print_notes((what,)),
    )  # fmt: skip
    if json:
        print_json(asdict(found))
    else:
        versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
        print(f"{found.engine} ({versions}{found.dtype and f', {found.dtype}'}): {found}")
        for name in found.unequal:
            print(f"{name}: decoded weights differ")
    if found.unequal:
        raise typer.Exit(1)
