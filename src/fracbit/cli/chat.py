"""`fracbit chat`: a conversation at the terminal, or one message a line from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from fracbit.cli.generate import (
    Activate,
    Dtype,
    KvBits,
    MaxNew,
    Seed,
    Temperature,
    Trust,
    print_speed,
    ready,
    write,
)


def chat(
    model: Annotated[str, typer.Argument(help="Folder or hub id, fracbit or float.")],
    max_new_tokens: MaxNew = 256,
    temperature: Temperature = 0.0,
    kv_bits: KvBits = 16,
    activations: Activate = "float",
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    trust_remote_code: Trust = False,
) -> None:
    """Talk with a model through its chat template; /exit or the end of the input ends it."""
    from fracbit.pipeline.serve.generation import Chat, Settings

    settings = Settings(max_new_tokens, temperature, kv_bits)
    talk = Chat(*ready(model, dtype, device, trust_remote_code, activations, seed), settings)
    for message in messages():
        found = talk.say(message, write)
        write("\n")
        print_speed(found)


def messages() -> Iterator[str]:
    """What the user says, line by line, until /exit or the end."""
    asks = sys.stdin.isatty()
    while True:
        if asks:
            typer.echo("> ", err=True, nl=False)
        line = sys.stdin.readline()
        if not line or line.strip() == "/exit":
            return
        if line.strip():
            yield line.rstrip("\n")
