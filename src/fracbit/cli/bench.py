"""`fracbit bench`: how fast a checkpoint generates on this machine, compared with the float model."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer

from fracbit.cli import options
from fracbit.cli.names import check_models, check_types
from fracbit.cli.show import bytes_text, print_json, print_notes, print_said, print_table
from fracbit.errors import RecipeError
from fracbit.records.generating import Load
from fracbit.records.tables import ENGINES


def bench(
    model: options.AnyModel,
    against: Annotated[
        str | None,
        typer.Option(
            help="Float model to compare with, measured in the same run.",
            rich_help_panel=options.MEASURE,
        ),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(help="Tokens of the prompt.", rich_help_panel=options.MEASURE)
    ] = 128,
    new_tokens: Annotated[
        int, typer.Option(help="Tokens to generate.", rich_help_panel=options.MEASURE)
    ] = 32,
    engine: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="Engine to compare with, on the export of MODEL, in turns: llama.cpp.",
            rich_help_panel=options.MEASURE,
        ),
    ] = None,
    turns: Annotated[
        int, typer.Option(min=1, help="With --for: turns of both.", rich_help_panel=options.MEASURE)
    ] = 5,
    environments: Annotated[
        str,
        typer.Option(
            help="With --for: folder with an environment for each engine; a missing one is made.",
            rich_help_panel=options.RUN,
        ),
    ] = "~/.cache/fracbit/engines",
    kv_bits: options.KvBits = 16,
    activations: options.Activations = "float",
    dtype: options.Dtype = "auto",
    device: options.Device = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure tokens per second, bytes per token, the share of the memory bandwidth, and memory."""
    check_types(dtype, activations)
    load = Load(prompt_tokens, new_tokens, kv_bits)
    if engine is not None:
        ENGINES.check(engine)
        if device != "cpu":
            raise RecipeError(f"--for {engine} compares processors: leave --device {device} out")
    check_models(model, against)
    from fracbit.pipeline.serve.speed import measure

    run = partial(measure, load_=load, dtype=dtype, device=device, trust=trust_remote_code)
    found = run(model, activations=activations).to_json()
    if against is not None:
        found["against"] = run(against, activations="float").to_json()
    beside = None
    if engine is not None:
        from fracbit.pipeline.serve.beside_engine import beside_engine

        beside = beside_engine(
            model, engine, load, turns=turns, activations=activations, dtype=dtype, trust=trust_remote_code,
            environments=environments, announce=None if quiet else print_said,
        )  # fmt: skip
        found["engine"] = beside.to_json()
    if json:
        print_json(found)
        return
    lines = [line for line in (found, found.get("against")) if line]
    print_table(
        ["model", "prefill", "decode", "bytes/token", "bandwidth", "share", "resident", "file"],
        [_row(line) for line in lines],
    )
    if beside is not None:
        print(beside)
    print_notes([] if quiet else [f"{line['model']}: {line['step']}" for line in lines])


def _row(line: dict[str, Any]) -> list[str]:
    resident = line["resident_bytes"]
    return [
        line["model"], f"{line['prefill_tokens_per_second']:.1f}/s", f"{line['decode_tokens_per_second']:.1f}/s",
        bytes_text(line["bytes_per_token"]), f"{line['bandwidth'] / 1e9:.1f} GB/s",
        f"{100 * line['bandwidth_share']:.0f} %", "unknown" if resident is None else bytes_text(resident),
        bytes_text(line["file_bytes"]),
    ]  # fmt: skip
