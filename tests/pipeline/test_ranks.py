"""Ranks: the same bytes as in one process, and an end of all of them where one fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ranks as worker
from families import model_of, tiny_llama
from fracbit.checkpoint.folder import is_unfinished
from fracbit.errors import RankError, RecipeError
from fracbit.numerics.stats import Stats, TreeSum, add_inputs, empty, merge
from fracbit.pipeline.quantize.ranks import Ranks
from fracbit.pipeline.quantize.sample_pieces import pieces_of
from fracbit.pipeline.quantize.work import check_shared
from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Recipe
from texts import write_ids

CALIBRATED: dict[str, dict[str, Any]] = {
    "gptq": {"quantizer": "gptq"},
    "float chain": {"quantizer": "gptq", "chain": "float"},
    "sequential": {"quantizer": "gptq", "sequential": True},
    "descent": {"quantizer": "descent"},
    "static inputs": {"quantizer": "rtn", "inputs": "int8/tensor"},
    "smoothed": {"quantizer": "gptq", "transforms": ["smooth"]},
    "weighed": {"quantizer": "gptq", "weigh": "loss"},
    "budget": {"quantizer": "gptq", "average_bits": 3.5},
    "experts": {"quantizer": "gptq"},
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    place = tmp_path_factory.mktemp("models")
    tiny_llama(num_hidden_layers=3).save_pretrained(place / "llama")
    model_of("mixtral").save_pretrained(place / "mixtral")
    text = write_ids(place / "ids.u16", documents=40, length=24, vocabulary=60)
    found: dict[str, dict[str, Any]] = {"rounded": {"model": str(place / "llama")}}
    for name, how in CALIBRATED.items():
        words = {key: how[key] for key in ("quantizer", "average_bits") if key in how}
        rest = {key: value for key, value in how.items() if key not in words}
        found[name] = {
            "model": str(place / ("mixtral" if name == "experts" else "llama")),
            **words,
            "calibration": {"texts": [text], "samples": 12, "length": 20, "batch": 1, **rest},
        }
    return found


def started(ranks: int, program: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """A program under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([*command, *program], capture_output=True, text=True, env=variables, check=False)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_ranks_write_the_same_bytes_as_one(
    cases: dict[str, dict[str, Any]], tmp_path: Path, count: int
) -> None:
    chosen = cases if count == 2 else {name: cases[name] for name in ("rounded", "gptq", "experts")}
    (tmp_path / "cases.json").write_text(json.dumps(chosen))
    done = started(count, [worker.__file__, str(tmp_path / "cases.json"), str(tmp_path / "many")])
    assert done.returncode == 0, done.stderr[-4000:]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for name, case in chosen.items():
            worker.quantize(case, tmp_path / "one" / name)
    finally:
        torch.set_num_threads(threads)
    for name in chosen:
        assert files(tmp_path / "many" / name) == files(tmp_path / "one" / name), name


@pytest.mark.slow
def test_a_rank_that_dies_ends_all_and_any_number_of_ranks_resumes(
    cases: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "cases.json").write_text(json.dumps({"gptq": cases["gptq"]}))
    died = started(2, [worker.__file__, str(tmp_path / "cases.json"), str(tmp_path), "dies"])
    assert died.returncode == 1
    assert "exitcode  : -9" in died.stderr  # torchrun names the rank
    assert is_unfinished(tmp_path / "gptq")
    assert len(list((tmp_path / "gptq").glob("*.safetensors"))) > 1
    worker.quantize(cases["gptq"], tmp_path / "gptq", resume=True)
    worker.quantize(cases["gptq"], tmp_path / "whole")
    assert files(tmp_path / "gptq") == files(tmp_path / "whole")


@pytest.mark.slow
def test_ranks_that_differ_are_refused_before_any_work(
    cases: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "cases.json").write_text(json.dumps({"gptq": cases["gptq"]}))
    done = started(2, [worker.__file__, str(tmp_path / "cases.json"), str(tmp_path), "differs"])
    assert "disagree on the run" in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "gptq").exists()


@pytest.mark.slow
def test_the_command_line_under_torchrun(cases: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """One result is printed, and a fault is told once, with exit code 2 of each rank."""
    words = [
        "-m",
        "fracbit",
        "quantize",
        cases["rounded"]["model"],
        "-o",
        str(tmp_path / "q"),
        "--scheme",
        "int4/16",
    ]
    done = started(2, words)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("bits per weight") == 1
    failed = started(2, words)
    assert failed.returncode == 1  # torchrun's own
    assert "exitcode  : 2" in failed.stderr
    assert "--overwrite" in failed.stderr


def test_a_sum_in_pieces_has_the_same_bits_whoever_adds_it() -> None:
    torch.manual_seed(0)
    for count in range(1, 11):
        parts = [{"a": _seen(5), **({"b": _seen(2)} if number % 3 else {})} for number in range(count)]
        orders = (range(count), reversed(range(count)), torch.randperm(count).tolist())
        sums = []
        for order in orders:
            total = TreeSum(count)
            for number in order:
                total.add(number, {name: _copy(stats) for name, stats in parts[number].items()})
            sums.append(total.whole())
        for name in sums[0]:
            for other in sums[1:]:
                assert torch.equal(sums[0][name].gram, other[name].gram)  # type: ignore[arg-type]
                assert torch.equal(sums[0][name].energy, other[name].energy)
        assert sums[0]["a"].tokens == 5 * count
        plain = parts[0]["a"]
        for part in parts[1:]:
            plain = merge(plain, part["a"])
        torch.testing.assert_close(sums[0]["a"].gram, plain.gram)


def test_pieces_cover_all_samples_once_for_any_number_of_ranks() -> None:
    for samples in (1, 2, 7, 8, 9, 64, 100):
        for batch in (1, 2, 3, 8):
            whole = pieces_of(samples, batch)
            assert whole.of <= 8 and (whole.start, whole.stop) == (0, samples)
            assert sum(whole.batches) == -(-samples // batch)
            for count in range(1, whole.of + 1):
                parts = [Ranks(number, count).pieces(samples, batch) for number in range(count)]
                ends = [(part.start, part.stop) for part in parts]
                assert [end for _, end in ends] == [start for start, _ in ends[1:]] + [samples]
                assert [part.first for part in parts] == [
                    sum(len(before.batches) for before in parts[:number]) for number in range(count)
                ]


def test_what_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(
        RankError, match="9 ranks cannot share 4 samples in batches of 1, which make 4 pieces"
    ):
        Ranks(0, 9).pieces(4, 1)
    recipe = Recipe(model="m", quantizer="gptq", calibration=Calibration(texts=("a",), tweak="closed"))
    check_shared(recipe, Ranks())
    with pytest.raises(RecipeError, match=r"2 ranks cannot share calibration\.tweak = closed"):
        check_shared(recipe, Ranks(0, 2))


def test_work_is_shared_out_alike_by_every_rank() -> None:
    owners = Ranks(1, 2).owners({"q": 5, "o": 3, "gate": 9, "down": 8})
    assert owners == Ranks(0, 2).owners({"q": 5, "o": 3, "gate": 9, "down": 8})
    assert owners == {"gate": 0, "down": 1, "q": 1, "o": 0}
    assert set(Ranks().owners({"q": 5, "o": 3}).values()) == {0}


def _seen(tokens: int) -> Stats:
    return add_inputs(empty(6), torch.randn(tokens, 6))


def _copy(stats: Stats) -> Stats:
    assert stats.gram is not None
    return Stats(stats.tokens, stats.gram.clone(), stats.absmax.clone(), stats.energy.clone())
