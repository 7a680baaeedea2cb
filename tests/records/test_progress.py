"""The bar that suits the place: rich on a terminal, tqdm in a notebook, nothing in a pipe, the caller's own where given."""

from __future__ import annotations

import inspect
import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from fracbit.records.progress import place, showing

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
        step("model.layers.0.mlp.down_proj", 1, 4)
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


def test_a_pipe_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    assert place() == "elsewhere"
    with showing("auto") as step:
        assert step is None
    assert not screen.getvalue()


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
