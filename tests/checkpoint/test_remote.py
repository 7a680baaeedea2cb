"""Models on the hub are inspected and planned by their headers and samples of weights, as if they were here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fracbit.checkpoint.remote import AHEAD, GAP, Remote, joined, without
from fracbit.checkpoint.source import open_source, read_rows, read_tensor, tensor_pieces
from fracbit.errors import SourceError
from hub import Hub, hub
from texts import write_ids

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., LlamaForCausalLM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards, most of which are embeddings that no plan reads."""
    place = tmp_path_factory.mktemp("there") / "model"
    model = tiny_llama(vocab_size=40_000, hidden_size=64, num_hidden_layers=2, tie_word_embeddings=False)
    model.save_pretrained(place, max_shard_size="12MB")
    assert len(list(place.glob("*.safetensors"))) > 1
    return place


@pytest.fixture
def served(folder: Path) -> Iterator[Hub]:
    with hub("owner/model", folder) as found:
        yield found


def run(to: Hub, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | to.environment | {"HF_HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-m", "fracbit", *words], env=variables, capture_output=True, text=True, check=False
    )


def good(to: Hub, home: Path, *words: str) -> dict[str, Any]:
    done = run(to, home, *words, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_inspect_reads_headers_alone(served: Hub, folder: Path, tmp_path: Path) -> None:
    found = good(served, tmp_path, "inspect", "owner/model")
    assert 0 < served.sent(".safetensors") <= AHEAD * len(list(folder.glob("*.safetensors")))
    here = good(served, tmp_path, "inspect", str(folder))
    assert found | {"model": ""} == here | {"model": ""}


def test_a_budget_that_nothing_meets_is_refused_by_headers(served: Hub, folder: Path, tmp_path: Path) -> None:
    done = run(served, tmp_path, "plan", "owner/model", "--fits", "1MB", "--set", "spending.context=64")
    assert done.returncode == 2
    assert "too little" in done.stderr
    assert served.sent(".safetensors") <= AHEAD * len(list(folder.glob("*.safetensors")))


def test_a_plan_is_that_of_the_model_here_and_reads_what_it_needs(
    served: Hub, folder: Path, tmp_path: Path
) -> None:
    words = ("--average-bits", "4.5", "--levels", "int4/16,int3/16")
    found = good(served, tmp_path, "plan", "owner/model", *words)
    assert served.sent(".safetensors") < weight_bytes(folder) / 4
    here = good(served, tmp_path, "plan", str(folder), *words)
    assert found["allocation"] == here["allocation"]
    assert found["candidates"] == here["candidates"]


def test_a_plan_that_runs_the_model_has_all_of_it(served: Hub, folder: Path, tmp_path: Path) -> None:
    text = write_ids(tmp_path / "ids.u16", 32, 16)
    words = (
        "--average-bits",
        "4.5",
        "--levels",
        "int4/16,int3/16",
        "--score",
        "gradient",
        "--text",
        text,
        "--set",
        "spending.length=16",
    )
    found, here = (good(served, tmp_path, "plan", name, *words) for name in ("owner/model", str(folder)))
    assert found["allocation"] == here["allocation"]
    assert served.sent(".safetensors") >= weight_bytes(folder)


def test_what_is_in_the_cache_is_not_fetched_again(served: Hub, folder: Path, tmp_path: Path) -> None:
    good(served, tmp_path, "verify", "owner/model")
    served.asked.clear()
    good(served, tmp_path, "inspect", "owner/model")
    assert served.sent(".safetensors") == 0


def test_a_model_that_is_not_there_is_said(served: Hub, tmp_path: Path) -> None:
    done = run(served, tmp_path, "inspect", "owner/other")
    assert done.returncode == 2
    assert "no such model: owner/other" in done.stderr


class Disk:
    """A file system of fsspec, as far as it is asked: the files of a folder, some cut short."""

    def __init__(self, folder: Path, short: int = 0) -> None:
        self.folder, self.short, self.read = folder, short, 0

    def cat_file(self, path: str, start: int, end: int, **_: object) -> bytes:
        data = (self.folder / Path(path).name).read_bytes()[start : end - self.short]
        self.read += len(data)
        return data


def test_every_reader_brings_what_it_reads(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = open_source(str(folder))
    for reads in (
        lambda source, name: read_tensor(source, name),
        lambda source, name: read_rows(source, name, [slice(1, 3), slice(7, 8)]),
        lambda source, name: read_rows(source, name, [slice(0, 5)], 1),
        lambda source, name: b"".join(map(bytes, tensor_pieces(source, name))),
    ):
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        place.mkdir()
        (place / "config.json").write_bytes((folder / "config.json").read_bytes())
        (place / "model.safetensors.index.json").write_bytes(
            (folder / "model.safetensors.index.json").read_bytes()
        )
        remote = Remote(Disk(folder), "there", place)
        for path in folder.glob("*.safetensors"):
            remote.begin(path.name, path.stat().st_size)
        monkeypatch.setattr(
            "fracbit.checkpoint.source.stand_in", lambda *_, remote=remote: (remote.folder, remote)
        )
        there = open_source("owner/model", afar=True)
        assert there.tensors == here.tensors
        for name, info in here.tensors.items():
            if len(info.shape) == 2:
                one, other = reads(there, name), reads(here, name)
                assert one == other if isinstance(one, bytes) else one.equal(other)


def test_files_that_end_early_are_errors(folder: Path, tmp_path: Path) -> None:
    (path, *_) = sorted(folder.glob("*.safetensors"))
    with pytest.raises(SourceError, match="try again"):
        Remote(Disk(folder, short=1), "there", tmp_path).begin(path.name, path.stat().st_size)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(SourceError, match="truncated or no safetensors"):
        Remote(Disk(tmp_path / "bad"), "there", tmp_path).begin("x.safetensors", 100)


SPANS = st.lists(
    st.tuples(st.integers(0, 50), st.integers(0, 50)).map(lambda p: (min(p), max(p))), max_size=6
)


@given(SPANS, SPANS)
def test_spans_are_sets_of_bytes(wanted: list[tuple[int, int]], held: list[tuple[int, int]]) -> None:
    def every(spans: list[tuple[int, int]]) -> set[int]:
        return {place for start, end in spans for place in range(start, end)}

    one, two = joined(wanted, 0), joined(held, 0)
    assert every(one) == every(wanted)
    assert all(a[1] < b[0] for a, b in pairwise(one))
    left = without(one, two)
    assert every(left) == every(one) - every(two)
    assert sum(end - start for start, end in left) == len(every(left)), "nothing is fetched twice"
    assert every(joined(wanted, 3)) >= every(wanted)
    assert GAP > 0
