"""The line that suits the place: rich on a terminal, tqdm in a notebook, half-minute lines in a log, or the caller's own."""

from __future__ import annotations

import inspect
import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from fracbit.records.calibration import Calibration
from fracbit.records.progress import RECENT, Pace, log_lines, place, showing, whole_run
from fracbit.records.recipe import Recipe
from fracbit.records.resources import print_seconds

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))


def test_a_terminal_gets_a_bar_of_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert place() == "terminal"
    with showing("auto") as step:
        assert step is not None
        step("quantizing: model.layers.0.mlp.down_proj", 1, 4)
    assert "down_proj" in screen.getvalue()
    assert "25%" in screen.getvalue()


@pytest.mark.usefixtures("notebook")
def test_a_notebook_gets_a_bar_of_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    import tqdm.auto
    from tqdm import tqdm as plain

    written, bars = io.StringIO(), []

    class Widget(plain):  # type: ignore[misc,type-arg]
        def __init__(self, **given: object) -> None:
            super().__init__(file=written, **given)
            bars.append(self)

    monkeypatch.setattr(tqdm.auto, "tqdm", Widget)
    assert place() == "notebook"
    with showing("auto") as step:
        assert step is not None
        step("model.layers.0", 3, 8)
        assert (bars[0].n, bars[0].total) == (3, 8)
        step("model.layers.1", 8, 8)
    assert "model.layers.1: 100%" in written.getvalue()


@pytest.mark.usefixtures("notebook")
def test_a_verb_shows_a_bar_by_itself(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tqdm.auto
    from tqdm import tqdm as plain

    import fracbit

    written = io.StringIO()

    class Widget(plain):  # type: ignore[misc,type-arg]
        def __init__(self, **given: object) -> None:
            super().__init__(file=written, mininterval=0, **given)

    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "float")
    monkeypatch.setattr(tqdm.auto, "tqdm", Widget)
    fracbit.quantize(tmp_path / "float", tmp_path / "q")
    assert "100%" in written.getvalue()
    assert "mlp.down_proj" in written.getvalue()
    shown = len(written.getvalue())
    fracbit.quantize(tmp_path / "float", tmp_path / "quiet", progress=None)
    assert len(written.getvalue()) == shown


def test_every_verb_that_takes_long_shows_a_bar_by_default() -> None:
    import fracbit

    for verb in (fracbit.quantize, fracbit.plan, fracbit.score, fracbit.evaluate, fracbit.export):
        assert inspect.signature(verb).parameters["progress"].default == "auto", verb


class Clock:
    """A clock that goes on by hand."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def test_a_log_gets_a_line_every_half_minute(capsys: pytest.CaptureFixture[str]) -> None:
    assert place() == "elsewhere"
    clock = Clock()
    with log_lines(clock) as step:
        for done in range(1, 91):  # a step a second, a minute and a half
            clock.time += 1
            step(f"quantizing: block {done}", done, 120)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == [
        f"quantizing: block {done}: {done / 120:.0%}" for done in (30, 60, 90)
    ]
    assert "60 s gone, 60 s left" in lines[1]
    assert all("of memory" in line for line in lines)


def test_short_work_writes_nothing_to_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with showing("auto") as step:
        assert step is not None
        step("quantizing", 1, 2)
    assert capsys.readouterr().err == ""


def test_time_left_is_that_of_the_phase_at_its_latest_pace() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert "left" not in pace(0, 10)
    clock.time = 50
    assert pace(5, 10).startswith("50 s left")
    assert "left" not in pace(1, 1000), "another phase has another pace"
    for done in range(2, 2 * RECENT):  # blocks that were done before are walked fast
        clock.time += 0.01
        pace(done, 1000)
    for done in range(2 * RECENT, 4 * RECENT):
        clock.time += 1
        said = pace(done, 1000)
    assert said.startswith(print_seconds(1000 - 4 * RECENT + 1) + " left")


def test_a_whole_run_goes_on_over_its_phases() -> None:
    seen: list[tuple[str, int, int]] = []
    show = whole_run(lambda *step: seen.append(step), {"quantizing": 300.0, "distilling": 100.0})
    show("quantizing: block 1 of 2", 1, 2)
    show("distilling: 0.1 nats", 1, 4)
    show("distilling: 0.1 nats", 4, 4)
    show("comparing with the float model", 1, 3)
    assert [what for what, _, _ in seen[:2]] == [
        "1 of 2, quantizing: block 1 of 2",
        "2 of 2, distilling: 0.1 nats",
    ]
    shares = [done / total for _, done, total in seen]
    assert shares == pytest.approx([0.375, 0.8125, 1.0, 1 / 3], abs=1e-4)


def test_every_report_of_a_run_names_its_phase(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    import fracbit

    tiny_llama(num_hidden_layers=2).save_pretrained(tmp_path / "float")
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(0, 64, 2000))
    calibration = Calibration(texts=(str(ids),), samples=4, length=16, distill=1, weigh="loss", tweak="adam")
    recipe = Recipe(
        model=str(tmp_path / "float"), scheme="int4/16", quantizer="gptq", calibration=calibration
    )
    seen: list[str] = []
    told: list[str] = []
    fracbit.quantize(
        recipe, tmp_path / "q", progress=lambda what, *_: seen.append(what), announce=told.append
    )
    phases = [what.partition(":")[0] for what in seen]
    assert list(dict.fromkeys(phases)) == [
        "1 of 3, weighing tokens",
        "2 of 3, quantizing",
        "3 of 3, distilling",
    ]
    assert any("block 2 of 2: mlp.down_proj" in what for what in seen)
    assert told


@pytest.mark.usefixtures("notebook")
def test_a_notebook_shows_time_left_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import tqdm.auto
    from tqdm import tqdm as plain

    written = io.StringIO()

    class Widget(plain):  # type: ignore[misc,type-arg]
        def __init__(self, **given: object) -> None:
            super().__init__(file=written, **given)

    monkeypatch.setattr(tqdm.auto, "tqdm", Widget)
    with showing("auto") as step:
        assert step is not None
        step("quantizing: block 1 of 8", 1, 8)
        step("quantizing: block 2 of 8", 2, 8)
    assert "left" in written.getvalue()
    assert "of memory" in written.getvalue()


def test_ipython_at_a_terminal_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = SimpleNamespace(config={})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert place() == "terminal"
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert place() == "terminal"


@pytest.mark.usefixtures("notebook")
def test_the_callers_own_is_handed_on() -> None:
    seen: list[tuple[str, int, int]] = []

    def own(what: str, done: int, total: int) -> None:
        seen.append((what, done, total))

    with showing(own) as step:
        assert step is own
    with showing(None) as step:
        assert step is None
