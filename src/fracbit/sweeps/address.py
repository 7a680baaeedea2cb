"""Checks that a Ray cluster answers before anything slow is imported, so that a wrong address fails within seconds.

Ray's own connection retries for minutes. So the port is tried first, and then a process that can be stopped asks the
cluster.
"""

from __future__ import annotations

import socket
import subprocess
import sys

from fracbit.errors import OutputError, RecipeError

PORT_WITHIN = 4.0
ANSWER_WITHIN = 9.0

_HEALTH = "from ray.scripts.scripts import main; main()"
_CLIENT = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False)"


def check_address(address: str) -> None:
    """Return when a cluster answers at `auto`, `HOST:PORT` or `ray://HOST:PORT`.

    Raises `OutputError` within 15 s when none does, `RecipeError` when it is not an address.
    """
    if address != "auto":
        host, port = _split(address)
        try:
            socket.create_connection((host, port), timeout=PORT_WITHIN).close()
        except OSError as error:
            raise _silent(address, str(error)) from error
    try:
        result = subprocess.run(_question(address), capture_output=True, text=True, timeout=ANSWER_WITHIN)
    except subprocess.TimeoutExpired:
        raise _silent(address, f"no answer in {ANSWER_WITHIN:g} s") from None
    if result.returncode != 0:
        said = (result.stderr or result.stdout).strip().splitlines()
        raise _silent(address, said[-1] if said else "it does not answer")


def _question(address: str) -> list[str]:
    if address.startswith("ray://"):
        return [sys.executable, "-c", _CLIENT, address]
    where = [] if address == "auto" else ["--address", address]
    return [sys.executable, "-c", _HEALTH, "health-check", *where]


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise RecipeError(f"{address!r} is not a Ray address: write HOST:6379, ray://HOST:10001 or auto")
    return host, int(port)


def _silent(address: str, reason: str) -> OutputError:
    return OutputError(
        f"no Ray cluster at {address} ({reason}): start one with `ray start --head`, give HOST:6379 of its head node, or "
        "leave --address out to start Ray here"
    )
