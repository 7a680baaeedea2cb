"""What a run will take is measured with the loop itself, said before it starts, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import fracbit
from fracbit.errors import OutputError
from fracbit.pipeline.plan.needs import needs_of
from fracbit.pipeline.quantize import trial
from fracbit.pipeline.quantize.run import open_for, write_checkpoint
from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Recipe
from fracbit.records.resources import Needs, print_seconds
from fracbit.records.scheme import Scheme
from fracbit.records.spending import Spending
from texts import write_ids

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

Maker = Callable[..., "LlamaForCausalLM"]
SETTINGS: dict[str, dict[str, Any]] = {
    "gptq": {},
    "float chain": {"chain": "float"},
    "sequential": {"sequential": True},
    "rotated": {"transforms": ("rotate",)},
    "tweaked": {"tweak": "auto"},
    "trained": {"tweak": "train:epochs=1,tokens=48"},
    "weighed": {"weigh": "loss"},
    "distilled": {"distill": 3},
    "everything": {"tweak": "train:epochs=1,tokens=48", "weigh": "loss", "distill": 1},
}


def recipe_of(maker: Maker, folder: Path, **fields: Any) -> Recipe:
    maker().save_pretrained(folder / "float")
    text = write_ids(folder / "ids.u16", 32, 24)
    calibration = Calibration(texts=(text,), samples=32, length=24, batch=2, dtype="float32", **fields)
    return Recipe(model=str(folder / "float"), quantizer="gptq", calibration=calibration)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_trial_leaves_the_model_as_it_was(name: str, tiny_llama: Maker, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_llama, tmp_path, **SETTINGS[name])
    tried, before = open_for(recipe), sorted(tmp_path.rglob("*"))
    needs = needs_of(recipe, tried)
    assert needs.seconds > 0
    assert needs.memory_bytes > 100e6  # a process with torch
    assert sorted(tmp_path.rglob("*")) == before
    write_checkpoint(recipe, tmp_path / "q", opened=tried)
    write_checkpoint(recipe, tmp_path / "q2")
    for path in sorted((tmp_path / "q2").glob("*.safetensors")):
        assert (tmp_path / "q" / path.name).read_bytes() == path.read_bytes()
    stored = sum(path.stat().st_size for path in (tmp_path / "q").glob("*.safetensors"))
    assert needs.disk_bytes == pytest.approx(stored, rel=0.3)  # headers are much of a tiny model


def test_time_follows_from_two_trials(
    tiny_llama: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock of our own: a block takes 5 seconds and 2 a sample, embedding 1 a sample, the start 10."""
    recipe = recipe_of(tiny_llama, tmp_path)
    opened = open_for(recipe)
    clock = {"write_rest": lambda n: 10.0, "embed_all": lambda n: float(n), "_block": lambda n: 5.0 + 2.0 * n}
    monkeypatch.setattr(trial, "_timed", lambda work: _as_if(work, clock))
    blocks = opened.model.config.num_hidden_layers
    assert needs_of(recipe, opened).seconds == pytest.approx(10 + 32 + blocks * (5 + 2 * 32))


def _as_if(work: Any, clock: dict[str, Callable[[int], float]]) -> tuple[float, Any]:
    name = next(name for name in clock if name in work.__code__.co_names + work.__code__.co_freevars)
    free = dict(zip(work.__code__.co_freevars, work.__closure__ or (), strict=True))
    samples = free["part"].cell_contents.samples.ids if "part" in free else []
    return clock[name](len(samples)), work()


def test_a_run_without_data_is_timed_by_its_schemes(tiny_llama: Maker, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "float")
    recipe = Recipe(model=str(tmp_path / "float"), scheme=Scheme("nf", 4, 16), head=Scheme("int", 8, 16))
    needs = needs_of(recipe, open_for(recipe))
    made = write_checkpoint(recipe, tmp_path / "q")
    assert needs.disk_bytes == pytest.approx(made.bytes, rel=0.3)
    assert needs.seconds > 0


@pytest.mark.parametrize("average", [None, 3.5])
def test_a_run_says_what_it_will_take(tiny_llama: Maker, tmp_path: Path, average: float | None) -> None:
    recipe = recipe_of(tiny_llama, tmp_path)
    recipe = Recipe(model=recipe.model, calibration=recipe.calibration)
    said: list[str] = []

    def announce(text: str) -> None:
        assert not (tmp_path / "q").exists()
        said.append(text)

    spending = Spending(preset="good", average_bits=average)
    fracbit.quantize(recipe, tmp_path / "q", spending=spending, progress=None, announce=announce)
    assert len(said) == 1
    assert said[0].startswith("the run: about ")


def test_an_output_that_is_taken_is_refused_before_anything_is_measured(
    tiny_llama: Maker, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_llama, tmp_path)
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "mine.txt").touch()
    with pytest.raises(OutputError, match="is not empty"):
        fracbit.quantize(recipe, tmp_path / "q", progress=None, announce=lambda said: pytest.fail(said))
    assert [path.name for path in (tmp_path / "q").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.042, "0.042 s"), (9.8, "9.8 s"), (45.2, "45 s"), (754, "13 min"), (7000, "1.9 h")],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert print_seconds(seconds) == text
    assert str(Needs(10**9, 10**6, seconds)) == f"about {text}, 1 GB of memory, 1 MB on disk"
