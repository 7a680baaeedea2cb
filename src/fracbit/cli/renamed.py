"""Old names of options that are `--set` keys now. They work in this version, with a note; the next one removes them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from typer.core import TyperCommand

from fracbit.errors import RecipeError, SchemeError
from fracbit.records.scheme import parse_scheme

GONE = "0.3"  # the version that removes the old names

Spelling = Callable[[str], str]


def _key(key: str) -> Spelling:
    return lambda value: f"{key}={value}"


def _axis(value: str) -> str:
    return "calibration.axis=gptq" if value == "auto" else f"scheme.axis={value}"


def _dtype(value: str) -> str:
    """`nf4` and `int3z/64` are whole schemes, `nf` is the type of one."""
    try:
        return f"scheme={parse_scheme(value)}"
    except SchemeError:
        return f"scheme.dtype={value}"


def _bits(value: str) -> str:
    """A whole number of bits. Raises `RecipeError` for a fraction; what is no number is for `--set` to refuse."""
    number = value.partition(".")
    if number[0].isdecimal() and number[2].strip("0"):
        raise RecipeError(
            f"--bits {value}: the bits of one scheme are whole; --average-bits {value} divides them over the layers"
        )
    return f"scheme.bits={number[0] if number[0].isdecimal() else value}"


def _outliers(share: str) -> str:
    return "outliers=none" if share.strip("0.") == "" else f"outliers=cost:{share}"


_BUDGET: dict[str, Spelling | str] = {
    "--context": _key("spending.context"),
    "--batch": _key("spending.batch"),
    "--solver": _key("spending.solver"),
    "--granularity": _key("spending.granularity"),
    "--fused": "spending.fused=true",
    "--embeddings": _key("embeddings"),
    "--head": _key("head"),
    "--seed": _key("seed"),
}

# Per command, the setting of an old name: a function of its value, or the whole setting if it took no value.
OLD: Mapping[str, Mapping[str, Spelling | str]] = {
    "quantize": {
        "--dtype": _dtype,
        "--bits": _bits,
        "--block": _key("scheme.block"),
        "--axis": _axis,
        "--offset": _key("scheme.offset"),
        "--scale": _key("scheme.scale"),
        "--search": "search=true",
        "--no-search": "search=false",
        "--samples": _key("calibration.samples"),
        "--length": _key("calibration.length"),
        "--chain": _key("calibration.chain"),
        "--transform": _key("calibration.transforms"),
        "--outliers": _outliers,
        "--tweak": _key("calibration.tweak"),
        "--inputs": _key("calibration.inputs"),
        "--distill": _key("calibration.distill"),
        "--levels": _key("spending.levels"),
        "--score": _key("spending.score"),
        "--held-out": _key("spending.held_out"),
        **_BUDGET,
        "--revision": _key("revision"),
        "--device": _key("run.device"),
        "--shard-size": _key("run.shard_mb"),
    },
    "plan": {**_BUDGET, "--samples": _key("spending.samples"), "--length": _key("spending.length")},
}


class RenamedOptions(TyperCommand):
    """A command whose old options are rewritten before they are parsed."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, rewritten(args, OLD[self.name or ""]))


def rewritten(words: Sequence[str], old: Mapping[str, Spelling | str]) -> list[str]:
    """A command line with every old option replaced by `--set`; without `--quiet`, a note on stderr for each."""
    quiet = "--quiet" in words
    found: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if word == "--":
            return [*found, word, *rest]
        if name not in old:
            found.append(word)
            continue
        setting, written = _setting(name, old[name], value if equals else None, rest)
        if not quiet:
            note = f"note: {written} is now --set {setting}; version {GONE} removes the old name"
            print(note, file=sys.stderr)
        found += ["--set", setting]
    return found


def _setting(name: str, new: Spelling | str, value: str | None, rest: Iterator[str]) -> tuple[str, str]:
    """The setting of an old option, and the option as it was written."""
    if isinstance(new, str):
        if value is not None:
            raise RecipeError(f"{name} takes no value; write --set {new}")
        return new, name
    value = next(rest, None) if value is None else value
    if value is None:
        raise RecipeError(f"{name} needs a value; write --set {new('VALUE')}")
    return new(value), f"{name} {value}"
