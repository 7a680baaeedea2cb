"""The error tree: everything a user can cause or must know about is a `FracbitError`.

A message says what was got, what is allowed and what to do instead. The command line prints it and exits with code 2;
anything that is not a `FracbitError` is a bug of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


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


class RankError(FracbitError):
    """Ranks of one run do not belong together, or one of them ended."""


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


MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What code raises that takes a value apart which is not what it should be."""
OUT_OF_MEMORY = ("DefaultCPUAllocator", "not enough memory", "out of memory")
"""What a `RuntimeError` of torch says when an allocator failed: a failure of the machine."""
LONGEST_REASON = 300
"""Characters of another library's message: some go on to list all that they know."""


@contextmanager
def blamed_on(what: str, error: type[FracbitError], *, parsing: bool = False) -> Iterator[None]:
    """What another library raises over a file or a value of the user's becomes an `error` that begins with `what`.

    Such libraries raise anything, `Exception` itself included. What fracbit's own code raises is a bug and passes through,
    unless it only takes such values apart (`parsing`): what it stumbles over is then theirs too.
    """
    try:
        yield
    except FracbitError:
        raise
    except Exception as found:
        if _is_ours(found) and not (parsing and isinstance(found, MALFORMED)):
            raise
        raise error(f"{what}: {reason_of(found)}") from found


def lacks_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out, on the CPU or a GPU."""
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    return said or isinstance(error, MemoryError)


def reason_of(error: BaseException) -> str:
    """What an error of another library says, on one line; its kind where it says little."""
    said = " ".join(str(error).split())
    said = said if len(said) <= LONGEST_REASON else f"{said[:LONGEST_REASON]}..."
    plain = isinstance(error, OSError | ValueError | RuntimeError) and not isinstance(error, RecursionError)
    return said if plain and said else f"{type(error).__name__}: {said}".removesuffix(": ")


def _is_ours(error: BaseException) -> bool:
    """Whether fracbit's own code raised it: the innermost frame is in this package."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return module.partition(".")[0] == __name__.partition(".")[0]
