"""`fracbit bench`: how fast a checkpoint generates on this machine, compared with the float model."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer

from fracbit.cli import options
from fracbit.cli.names import check_models, check_types
from fracbit.cli.show import bytes_text, print_json, print_notes, print_table
from fracbit.records.generating import Load


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
    check_models(model, against)
    from fracbit.pipeline.serve.speed import measure

    run = partial(measure, load_=load, dtype=dtype, device=device, trust=trust_remote_code)
    found = run(model, activations=activations).to_json()
    if against is not None:
        found["against"] = run(against, activations="float").to_json()
    if json:
        print_json(found)
        return
    lines = [line for line in (found, found.get("against")) if line]
    print_table(
        ["model", "prefill", "decode", "bytes/token", "bandwidth", "share", "resident", "file"],
        [_row(line) for line in lines],
    )
    print_notes([] if quiet else [f"{line['model']}: {line['step']}" for line in lines])


def _row(line: dict[str, Any]) -> list[str]:
    resident = line["resident_bytes"]
    return [
        line["model"], f"{line['prefill_tokens_per_second']:.1f}/s", f"{line['decode_tokens_per_second']:.1f}/s",
        bytes_text(line["bytes_per_token"]), f"{line['bandwidth'] / 1e9:.1f} GB/s",
        f"{100 * line['bandwidth_share']:.0f} %", "unknown" if resident is None else bytes_text(resident),
        bytes_text(line["file_bytes"]),
    ]  # fmt: skip
