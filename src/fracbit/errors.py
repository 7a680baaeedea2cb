"""The error tree: everything a user can cause or must know about is a `FracbitError`.

A message says what was got, what is allowed and what to do instead. The command line prints it and exits with code 2;
anything that is not a `FracbitError` is a bug of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class FracbitError(Exception):
    """Base of all errors that fracbit raises on purpose."""


class SchemeError(FracbitError):
    """A scheme cannot exist: unknown data type, bits outside 1..8, a block of no size. `key`: an unknown key."""

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class RecipeError(FracbitError):
    """A recipe cannot be read or contradicts itself."""


class SourceError(FracbitError):
    """A model cannot be read: not there, not a causal language model, pickled or truncated weights."""


class WeightError(FracbitError):
    """A weight or an activation is NaN or Inf, or does not fit its type."""


class DataError(FracbitError):
    """A text or a token file cannot be used."""


class OutputError(FracbitError):
    """The output folder is not empty, cannot be written, or the disk is full."""


class BudgetError(FracbitError):
    """No combination of the offered schemes meets a bit budget."""


class FormatError(FracbitError):
    """A checkpoint is corrupt, foreign or of another format version."""


class KernelError(FracbitError):
    """A packed buffer does not fit the scheme it claims, or no kernel can run it."""


class EngineError(FracbitError):
    """A program that should run an export is not installed, cannot be, or failed."""


def check_choice(
    what: str, value: object, allowed: Iterable[str], error: type[FracbitError] = RecipeError
) -> None:
    """Raise `error` with near matches where a value is none of those allowed."""
    known = list(allowed)
    if value not in known:
        raise error(f"unknown {what} {value!r}; {near_matches(str(value), known)}")


def near_matches(name: str, known: Iterable[str]) -> str:
    """A sentence that lists the known names closest to `name`, or all of them when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(repr(c) for c in close)}? Known: {', '.join(names)}"
    return f"known: {', '.join(names)}"
