"""How long work reports its progress: one type for every package, and the line that shows it. Torch-free.

A verb takes `progress: Shown = "auto"` and hands `with showing(progress) as step` down; everything below it takes a `Progress`.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

from fracbit.records.resources import peak_rss, print_seconds
from fracbit.records.sizes import print_size

Progress = Callable[[str, int, int], None]
"""Called with what is being done, `phase` or `phase: detail`, steps done, and steps in all. Steps start again with a phase."""

Shown = Progress | Literal["auto"] | None
"""What a caller may ask for: a callable, the line that suits the place, or nothing."""

WEIGHING, QUANTIZING, DISTILLING = "weighing tokens", "quantizing", "distilling"
"""The phases of a run whose time is measured before it starts, in order."""

WIDTH = 60  # characters of what is being done; the end of a layer's name says more than its middle
EVERY = 30.0  # seconds between the lines of a log
RECENT = 64  # reports that the time left is reckoned from: a resumed run walks fast where it has been
FINE = 10_000  # steps of a whole run


@contextmanager
def showing(progress: Shown) -> Iterator[Progress | None]:
    """What to report to: the callable itself; for "auto" a bar of rich on a terminal, of tqdm in a notebook, else lines."""
    if progress != "auto":
        yield progress
        return
    lines: dict[str, Callable[[], AbstractContextManager[Progress]]] = {
        "terminal": terminal_bar,
        "notebook": notebook_bar,
        "elsewhere": log_lines,
    }
    with lines[place()]() as step:
        yield step


def rank() -> int:
    """The number of this process among those that torchrun started for one run; 0 where it is alone. Rank 0 alone prints."""
    return int(os.environ.get("RANK", "0")) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def place() -> Literal["terminal", "notebook", "elsewhere"]:
    """Where this process shows its output: pipes, files and services are "elsewhere"."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if shell is not None and "IPKernelApp" in shell.config:
        return "notebook"
    return "terminal" if sys.stderr.isatty() else "elsewhere"


def silent(what: str, done: int, total: int) -> None:
    """Tells nobody."""


def phase(show: Progress, name: str) -> Progress:
    """Reports to `show` as details of the phase `name`."""
    return lambda what, done, total: show(f"{name}: {what}", done, total)


def whole_run(show: Progress, seconds: Mapping[str, float]) -> Progress:
    """Reports to `show` how much of a whole run is done. `seconds`: what each of its phases will take, in order.

    A phase that is not among them is shown by its own steps.
    """
    names, total = list(seconds), sum(seconds.values())

    def step(what: str, done: int, steps: int) -> None:
        name = what.partition(":")[0]
        if name not in seconds or total <= 0:
            show(what, done, steps)
            return
        number = names.index(name)
        gone = sum(seconds[before] for before in names[:number]) + seconds[name] * done / max(steps, 1)
        show(
            f"{number + 1} of {len(names)}, {what}" if len(names) > 1 else what,
            round(FINE * gone / total),
            FINE,
        )

    return step


class Pace:
    """Tells time left and memory from the reports of a run. Its state: when it began, and its last reports."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now, self.began = now, now()
        self.total = 0
        self.recent: deque[tuple[float, int]] = deque(maxlen=RECENT)  # (time, steps done)

    def __call__(self, done: int, total: int) -> str:
        """Such as `4 min left, 812 MB`: time left at the pace of the last reports, and peak memory, after this report."""
        if total != self.total or (self.recent and done < self.recent[-1][1]):  # another phase
            self.recent.clear()
        self.total = total
        self.recent.append((self.now(), done))
        (first, before), (last, _) = self.recent[0], self.recent[-1]
        memory = f"{print_size(peak_rss())} of memory"
        if done <= before or done >= total:
            return memory
        left = (last - first) / (done - before) * (total - done)
        return f"{print_seconds(left)} left, {memory}"

    @property
    def gone(self) -> float:
        """Seconds since it began."""
        return self.now() - self.began


def shortened(what: str) -> str:
    """At most `WIDTH` characters: the middle is left out."""
    head = WIDTH // 3
    return what if len(what) <= WIDTH else f"{what[:head]}…{what[head + 1 - WIDTH :]}"


@contextmanager
def terminal_bar() -> Iterator[Progress]:
    """A bar on stderr that is gone when the work is done; nothing is written where stderr is no terminal."""
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=20),
        "{task.percentage:>3.0f}%",
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.fields[left]}"),
    )
    console = Console(stderr=True)
    with progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        pace, task = Pace(), bar.add_task("", total=None, left="")

        def step(what: str, done: int, total: int) -> None:
            bar.update(task, description=shortened(what), completed=done, total=total, left=pace(done, total))

        yield step


@contextmanager
def notebook_bar() -> Iterator[Progress]:
    """A widget in a notebook; tqdm writes a line of text where there are no widgets."""
    from tqdm.auto import tqdm

    with tqdm(leave=False, bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed}{postfix}") as bar:
        pace = Pace()

        def step(what: str, done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.set_description(shortened(what), refresh=False)
            bar.set_postfix_str(pace(done, total), refresh=False)
            bar.refresh()

        yield step


@contextmanager
def log_lines(now: Callable[[], float] = time.monotonic) -> Iterator[Progress]:
    """A line on stderr every half minute, for the log of a job; none for work that is shorter."""
    pace, said = Pace(now), now()

    def step(what: str, done: int, total: int) -> None:
        nonlocal said
        facts = pace(done, total)
        if now() - said >= EVERY:
            said = now()
            share = f"{done / max(total, 1):.0%}"
            print(f"{what}: {share}, {print_seconds(pace.gone)} gone, {facts}", file=sys.stderr, flush=True)  # noqa: T201

    yield step
