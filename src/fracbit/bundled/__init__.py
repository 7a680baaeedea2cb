"""The bundled model: a small Llama that predicts Python source, and the text it was trained and is judged on.

Every machine that runs fracbit has the Python standard library, so its source is a corpus that need not be downloaded. The
model in this folder was trained on it by `examples/train_bundled.py`, without the modules in `HELD_OUT`, on which demos and
tests measure perplexity. This file needs no torch: it handles paths and strings only.

The text is read from the running interpreter. Another Python version has slightly different modules, so its perplexity
differs, by some 5 %, from the figures in the model card, which name the version they were measured with.
"""

import sysconfig
import tokenize
from pathlib import Path

from fracbit.errors import DataError

BUNDLED = "bundled"  # what commands call the model, unless a folder has the name
HELD_OUT: tuple[str, ...] = (
    "queue.py",
    "asyncio/locks.py",
    "json/decoder.py",
    "csv.py",
    "xml/sax/saxutils.py",
    "unittest/suite.py",
    "textwrap.py",
    "urllib/robotparser.py",
    "shlex.py",
    "json/encoder.py",
    "calendar.py",
    "html/parser.py",
    "json/__init__.py",
    "fractions.py",
    "http/cookies.py",
    "sched.py",
    "email/utils.py",
    "concurrent/futures/thread.py",
    "getopt.py",
    "logging/config.py",
    "heapq.py",
    "pprint.py",
    "timeit.py",
    "bisect.py",
    "asyncio/queues.py",
    "json/scanner.py",
    "argparse.py",
)
"""Modules that training never saw, as paths below the standard library folder.

Their order makes a short piece from the front about as hard to predict as the whole."""

# Tests, and parts that distributions package separately or that later versions dropped, are not on every machine. Tables
# of characters (encodings) and the dump of the documentation (pydoc_data) are not Python that people write.
_LEFT_OUT = frozenset({
    "__phello__", "__pycache__", "dist-packages", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3",
    "pydoc_data", "site-packages", "test", "tests", "tkinter", "turtledemo", "venv",
})  # fmt: skip


def bundled_model() -> Path:
    """The folder of the bundled checkpoint: a LlamaForCausalLM and its tokenizer, as `from_pretrained` reads them."""
    return Path(__file__).resolve().parent


def held_out_text() -> str:
    """The source of all `HELD_OUT` modules of the running interpreter, joined by newlines (about 500 000 characters).

    Another Python version has slightly different text: compare perplexities only between runs of one version.

    Raises:
        DataError: a module's source is not on this machine.

    """
    return "\n".join(module_text(name) for name in HELD_OUT)


def training_text(limit: int | None = None) -> str:
    """The first `limit` characters of the modules the model was trained on (all if None), for calibration.

    Modules come in the order of their paths, joined by newlines; none of them is in `HELD_OUT`.

    Raises:
        DataError: the standard library's source is not on this machine, or `limit` is below 1.

    """
    if limit is not None and limit < 1:
        raise DataError(
            f"got limit={limit}; allowed: at least 1 character, or None for the whole training text"
        )
    parts: list[str] = []
    size = 0
    for name in training_modules():
        parts.append(module_text(name))
        size += len(parts[-1]) + 1
        if limit is not None and size > limit:
            break
    return "\n".join(parts)[:limit]


def training_modules() -> tuple[str, ...]:
    """Paths below the standard library folder of all modules that training may read, sorted; `HELD_OUT` is excluded.

    Raises:
        DataError: the standard library's source is not on this machine.

    """
    root = _stdlib()
    found = (path.relative_to(root) for path in root.rglob("*.py"))
    names = sorted(path.as_posix() for path in found if _is_everywhere(path))
    if not names:
        raise DataError(f"got no Python source in {root}; {_REMEDY}")
    return tuple(name for name in names if name not in HELD_OUT)


def module_text(name: str) -> str:
    """The source of one standard library module, decoded as its coding line says, line ends as one newline character.

    `name` is a path below the standard library folder, such as "json/decoder.py".

    Raises:
        DataError: the module's source is not on this machine or cannot be decoded.

    """
    path = _stdlib() / name
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; {_REMEDY}") from error


_REMEDY = (
    "the bundled texts are the source of the running interpreter's standard library: use a Python that ships its "
    "*.py files (python.org, pyenv, conda, a distribution's full package), or pass a text file of your own"
)


def _stdlib() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _is_everywhere(path: Path) -> bool:
    """Whether a path below the standard library is ordinary source that other machines have as well."""
    made_by_build = path.parts[0].startswith(("config-", "_sysconfigdata"))
    return not made_by_build and not _LEFT_OUT.intersection(path.parts) and path.name != "turtle.py"
