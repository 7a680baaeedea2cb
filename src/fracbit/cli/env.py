"""`fracbit env`: what a report of a bug should say of the machine."""

from __future__ import annotations

from dataclasses import asdict

from fracbit.cli import options
from fracbit.cli.show import print_json


def env(json: options.Json = False) -> None:
    """Print versions, kernels (native or reference, and why), threads, memory and GPUs: for a report of a bug."""
    from fracbit.pipeline.serve.machine import machine

    found = machine()
    if json:
        print_json(asdict(found))
    else:
        print(found)
