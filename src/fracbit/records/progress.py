"""How long work reports its progress: one type for every package, and the bar that shows it. Torch-free.

A verb takes `progress: Shown = "auto"` and hands `with showing(progress) as step` down; everything below it takes a `Progress`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done, and steps in all."""

Shown = Progress | Literal["auto"] | None
"""What a caller may ask for: a callable, the bar that suits the place, or nothing."""

WIDTH = 48  # characters of what is being done; the end of a layer's name says more than its start


@contextmanager
def showing(progress: Shown) -> Iterator[Progress | None]:
    """What to report to: the callable itself; for "auto" a bar of rich on a terminal, of tqdm in a notebook, else nothing."""
    if progress != "auto":
        yield progress
        return
    bars: dict[str, Callable[[], AbstractContextManager[Progress | None]]] = {
        "terminal": terminal_bar,
        "notebook": notebook_bar,
        "elsewhere": nullcontext,
    }
    with bars[place()]() as step:
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


@contextmanager
def terminal_bar() -> Iterator[Progress]:
    """A bar on stderr that is gone when the work is done; nothing is written where stderr is no terminal."""
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        "{task.percentage:>3.0f}%",
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(
            task, description=what[-WIDTH:], completed=done, total=total
        )


@contextmanager
def notebook_bar() -> Iterator[Progress]:
    """A widget in a notebook; tqdm writes a line of text where there are no widgets."""
    from tqdm.auto import tqdm

    with tqdm(leave=False) as bar:

        def step(what: str, done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.set_description(what[-WIDTH:], refresh=False)
            bar.refresh()

        yield step
