"""`fracbit chat`: a conversation at the terminal, or one message per line from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import typer

from fracbit.cli import options
from fracbit.cli.generate import print_speed, ready, write
from fracbit.cli.names import check_models, check_types
from fracbit.records.generating import Settings


def chat(
    model: options.AnyModel,
    max_new_tokens: options.MaxNew = 256,
    temperature: options.Temperature = 0.0,
    kv_bits: options.KvBits = 16,
    activations: options.Activations = "float",
    seed: options.SamplingSeed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
) -> None:
    """Talk with a model through its chat template; /exit or the end of the input ends it."""
    check_types(dtype, activations)
    settings = Settings(max_new_tokens, temperature, kv_bits)
    check_models(model)
    from fracbit.pipeline.serve.generation import Chat

    talk = Chat(
        *ready(model, dtype, device=device, trust=trust_remote_code, activations=activations, seed=seed),
        settings,
    )
    for message in messages():
        found = talk.say(message, write)
        write("\n")
        if not quiet:
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
