"""Sizes in bytes as people write them: `1.2GB`, `800MiB`."""

from __future__ import annotations

import math
import re

from fracbit.errors import BudgetError

_FACTORS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)


def read_size(text: str) -> int:
    """Bytes from `1.2GB` (10^9), `800MiB` (2^20) or a plain number. Raises `BudgetError` for anything else."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise BudgetError(f"{text!r} is not a size; write a number and a unit, such as 1.2GB, 800MB or 6GiB")
    size = math.floor(float(match[1]) * _FACTORS[(match[2] or "").lower()])
    if size < 1:
        raise BudgetError(f"{text!r} is less than a byte; write a number and a unit, such as 1.2GB")
    return size


def print_size(size: int) -> str:
    """Bytes with a decimal unit, such as `1.203 GB`."""
    for name, unit in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= unit:
            return f"{size / unit:.4g} {name}"
    return f"{size} bytes"
