"""Trials of what must never happen: each changes something at random, runs fracbit, and says what came of it.

A trial runs in a forked process with bounded memory: a signal, a hang or a bomb ends that process and is seen from here.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import multiprocessing
import os
import pkgutil
import random
import resource
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fracbit.errors import FracbitError

MEMORY = 6 << 30  # bytes that a trial may map beyond what the process has
BATCH = 50  # trials of one process
LONGEST = 300.0  # seconds of a trial; a longer one hangs
SAID = 160  # characters of a message that are kept


class Broken(AssertionError):
    """A law was broken: what was seen."""


@dataclass(frozen=True)
class Trial:
    """One change of a kind, which `kind` and `number` name: the same number makes the same change."""

    kind: str
    number: int

    @property
    def chance(self) -> random.Random:
        """The random numbers of this trial."""
        return random.Random(f"{self.kind}/{self.number}")


@dataclass(frozen=True)
class Verdict:
    """What came of a trial. `outcome`: refused, unharmed, or broken; `change`: what was done; `said`: what was seen."""

    trial: Trial
    outcome: str
    change: str
    said: str


Change = Callable[[random.Random, Path], tuple[str, Callable[[], str]]]
"""Makes a change in an empty folder; gives its description, and what to run: it returns an outcome or raises `Broken`."""


def tried(trials: Iterable[Trial], changes: dict[str, Change], folder: Path) -> Iterator[Verdict]:
    """The verdict of every trial, in order; each batch has a process of its own."""
    waiting = list(trials)
    context = multiprocessing.get_context("fork")
    while waiting:
        batch, here = waiting[:BATCH], context.Pipe()
        worker = context.Process(target=_work, args=(batch, changes, folder, here[1]))
        worker.start()
        here[1].close()
        done, change = 0, ""
        try:
            while done < len(batch):
                if not here[0].poll(LONGEST):
                    worker.kill()
                    yield Verdict(batch[done], "broken", change, f"still running after {LONGEST:g} s")
                    done += 1
                    break
                what, value = here[0].recv()
                if what == "change":
                    change = value
                else:
                    yield value
                    done, change = done + 1, ""
        except EOFError:
            worker.join()
            yield Verdict(batch[done], "broken", change, f"the process ended with {worker.exitcode}")
            done += 1
        worker.join()
        waiting = waiting[done:]


def preload() -> None:
    """Import all of fracbit, so that processes that are forked need not."""
    import fracbit

    for module in pkgutil.walk_packages(fracbit.__path__, "fracbit."):
        if not module.name.startswith(("fracbit.engines", "fracbit.__main__", "fracbit.kernels.triton")):
            with contextlib.suppress(ImportError, FracbitError):
                importlib.import_module(module.name)


def _work(batch: list[Trial], changes: dict[str, Change], folder: Path, there: Connection) -> None:
    _bound_memory()
    for number, trial in enumerate(batch):
        place = folder / f"{os.getpid()}-{number}"
        place.mkdir(parents=True)
        said, change = io.StringIO(), ""
        try:
            change, run = changes[trial.kind](trial.chance, place)
            there.send(("change", change))
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                found = run()
            outcome, words = found.partition(": ")[::2]
        except Broken as broken:
            outcome, words = "broken", str(broken)
        except FracbitError as error:
            outcome, words = "refused", str(error)
        except BaseException:  # noqa: BLE001 - a trial is there to find what nobody expects
            outcome, words = "broken", blame()
        finally:
            shutil.rmtree(place, ignore_errors=True)
        there.send(("verdict", Verdict(trial, outcome, change, words[: 4 * SAID])))
    there.close()
    os._exit(0)


def _bound_memory() -> None:
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def blame() -> str:
    """The error that is being handled, and the line of fracbit that let it through."""
    kind, error, trace = sys.exc_info()
    ours = [frame for frame in traceback.extract_tb(trace) if "/fracbit/" in frame.filename]
    last = ours[-1] if ours else traceback.extract_tb(trace)[-1]
    where = f"{Path(last.filename).name}:{last.lineno} {last.name}"
    return f"{getattr(kind, '__name__', kind)} at {where}: {str(error)[:SAID]}"


def command(*words: str) -> tuple[int, str]:
    """Run the command line in this process: exit code, and what it printed. Whatever it raises passes through."""
    from fracbit import cli

    said = io.StringIO()
    before, sys.argv = sys.argv, ["fracbit", *words]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            cli.main()
    except SystemExit as end:
        code: Any = end.code
        return (0 if code is None else int(code)), said.getvalue()
    finally:
        sys.argv = before
    return 0, said.getvalue()
