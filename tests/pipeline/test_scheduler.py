"""Requests that are answered together get what they get alone; queue, time and length are bounded; nobody waits for ever."""

from __future__ import annotations

import gc
import queue
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import fracbit
from fracbit.bundled import BUNDLED
from fracbit.checkpoint.load import load, load_tokenizer
from fracbit.errors import DataError
from fracbit.models.store_cache import StoreCache
from fracbit.pipeline.serve.generation import generate
from fracbit.pipeline.serve.scheduler import BusyError, Job, Scheduler, StoppedError, Told, pick
from fracbit.pipeline.serve.unfolding import BROKEN, Unfolding
from fracbit.records.generating import Limits, Sampling, Settings
from texts import byte_tokenizer

PROMPTS = ("def main(", "import os\n\n", "class Queue:\n    def put(self, item):\n        self.", "x")
GREEDY = Sampling(24, temperature=0)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder = tmp_path_factory.mktemp("served") / "q"
    fracbit.quantize(BUNDLED, folder, "int4z/64", progress=None)
    return load(folder, "float32", deterministic=True)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(BUNDLED)


class Heard:
    """What one client was told."""

    def __init__(self) -> None:
        self.pieces: queue.Queue[Told] = queue.Queue()

    def all(self) -> list[Told]:
        """Every piece up to the last."""
        found = [self.pieces.get(timeout=60)]
        while not found[-1].last:
            found.append(self.pieces.get(timeout=60))
        return found

    def text(self) -> str:
        return "".join(piece.text for piece in self.all())


@contextmanager
def serving(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits | None = None,
    kv_bits: int = 16,
) -> Iterator[Scheduler]:
    made = Scheduler(model, tokenizer, limits or Limits(), kv_bits)
    try:
        yield made
    finally:
        made.close()


def asked(
    to: Scheduler, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], sampling: Sampling = GREEDY
) -> list[tuple[Job, Heard]]:
    pairs = []
    for prompt in prompts:
        heard = Heard()
        pairs.append((Job(tokenizer(prompt)["input_ids"], sampling, heard.pieces.put), heard))
    to.submit(*(job for job, _ in pairs))
    return pairs


@pytest.mark.parametrize("kv_bits", [16, 8])
def test_together_each_gets_what_it_gets_alone(
    small: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kv_bits: int
) -> None:
    """The native step in one batch, and layer by layer in turns; also with seeds, and rows that come and go."""
    drawn = Sampling(24, temperature=0.8, top_p=0.9, seed=5)
    with serving(small, tokenizer, Limits(batch=3), kv_bits) as to:
        assert ("native" in to.together.name) == (kv_bits == 16)
        for sampling in (GREEDY, drawn):
            alone = [asked(to, tokenizer, [prompt], sampling)[0][1].text() for prompt in PROMPTS]
            assert len(set(alone)) == len(PROMPTS)
            first = asked(to, tokenizer, PROMPTS, sampling)
            more = asked(to, tokenizer, PROMPTS[::-1], replace(sampling, new_tokens=7))
            assert [heard.text() for _, heard in first] == alone
            for (_, heard), whole in zip(more, alone[::-1], strict=True):
                assert whole.startswith(heard.text())


def test_the_text_is_that_of_generate(small: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with serving(small, tokenizer) as to:
        for prompt in PROMPTS:
            ((_, heard),) = asked(to, tokenizer, [prompt])
            found = generate(small, tokenizer, [prompt], Settings(24))
            pieces = heard.all()
            assert "".join(piece.text for piece in pieces) == found.whole[0].removeprefix(prompt)
            assert sum(piece.tokens for piece in pieces) == 24
            assert pieces[-1].reason == "length"


def test_a_stop_text_ends_it_and_is_left_out(
    small: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    with serving(small, tokenizer) as to:
        ((_, heard),) = asked(to, tokenizer, PROMPTS[:1])
        whole = heard.text()
        stop = whole[len(whole) // 2 :][:3]
        ((_, heard),) = asked(to, tokenizer, PROMPTS[:1], replace(GREEDY, stop=(stop, "\0")))
        pieces = heard.all()
        assert "".join(piece.text for piece in pieces) == whole.partition(stop)[0]
        assert pieces[-1].reason == "stop"


def test_a_client_that_goes_away_frees_its_row(
    small: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    with serving(small, tokenizer, Limits(batch=1, queue=1)) as to:
        ((job, heard),) = asked(to, tokenizer, PROMPTS[:1], replace(GREEDY, new_tokens=200))
        heard.pieces.get(timeout=60)
        ((_, second),) = asked(to, tokenizer, PROMPTS[1:2])
        with pytest.raises(BusyError, match="try again later"):
            asked(to, tokenizer, PROMPTS[2:])
        job.cancelled.set()
        assert second.all()[-1].reason == "length"
        left = [heard.pieces.get() for _ in range(heard.pieces.qsize())]
        assert not any(piece.last for piece in left)


def test_time_is_bounded(small: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with serving(small, tokenizer, Limits(seconds=1e-6)) as to:
        ((_, heard),) = asked(to, tokenizer, PROMPTS[:1])
        (told,) = heard.all()
        assert told.late
        assert "longer than" in str(told.error)


def test_length_is_bounded(small: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with serving(small, tokenizer, Limits(length=32)) as to:
        with pytest.raises(DataError, match="more than the 32 that this server takes"):
            asked(to, tokenizer, PROMPTS[:1], replace(GREEDY, new_tokens=32))
        for ids in ([], [-1], [10**6]):
            with pytest.raises(DataError, match="at least one token"):
                to.submit(Job(ids, GREEDY, lambda piece: None))
    with (
        pytest.raises(DataError, match="more than the model's"),
        serving(small, tokenizer, Limits(length=10**6)),
    ):
        pass


def test_the_end_is_told(small: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    to = Scheduler(small, tokenizer, Limits(batch=1))
    pairs = asked(to, tokenizer, PROMPTS, replace(GREEDY, new_tokens=200))
    to.close()
    ended = [heard.all()[-1] for _, heard in pairs]
    assert "the server stopped" in {piece.error for piece in ended}
    assert not to.alive
    with pytest.raises(StoppedError):
        asked(to, tokenizer, PROMPTS[:1])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_leaves_nobody_waiting(
    small: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(small, tokenizer) as to:
        monkeypatch.setattr(to.together, "advance", lambda tokens: 1 / 0)
        ((_, heard),) = asked(to, tokenizer, PROMPTS[:1])
        assert heard.all()[-1].error == "the server stopped"
        deadline = time.monotonic() + 10
        while to.thread.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not to.alive


def test_nan_ends_one_request(
    small: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(small, tokenizer) as to:
        read = to.together.read

        def broken(ids: Sequence[int]) -> tuple[object, torch.Tensor]:
            state, logits = read(ids)
            return state, logits * float("nan") if len(ids) == 1 else logits

        monkeypatch.setattr(to.together, "read", broken)
        good, bad = asked(to, tokenizer, [PROMPTS[0], "x"])
        assert "NaN" in str(bad[1].all()[-1].error)
        assert good[1].all()[-1].reason == "length"


TOKENIZER = byte_tokenizer()


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_unfolded_pieces_are_the_text_up_to_a_stop(text: str, stop: list[str]) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    whole = TOKENIZER.decode(ids, skip_special_tokens=True)
    unfolding, pieces = Unfolding(TOKENIZER, tuple(stop)), []
    for token in ids:
        pieces.append(unfolding.add(token))
        if unfolding.stopped:
            break
    pieces.append(unfolding.rest())
    ends = [place for each in stop if (place := whole.find(each)) >= 0]
    assert "".join(pieces) == whole[: min(ends, default=len(whole))]
    if BROKEN not in text:
        assert not any(BROKEN in piece for piece in pieces)


def test_sampling_draws_from_the_nucleus() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = {pick(logits, Sampling(1, top_p=0.75), generator) for _ in range(200)}
    assert drawn == {0, 1}
    assert {pick(logits, Sampling(1), generator) for _ in range(500)} == {0, 1, 2, 3}
    assert pick(logits, Sampling(1, temperature=0), generator) == 0
    counts = torch.bincount(
        torch.tensor([pick(logits, Sampling(1), generator) for _ in range(2000)]), minlength=4
    )
    assert torch.allclose(counts / 2000, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.05)


WRONG: list[dict[str, object]] = [
    {"new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"stop": ("",)}, {"seed": 2**64},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_sampling_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(DataError):
        Sampling(**{"new_tokens": 1, **wrong})  # type: ignore[arg-type]


def test_memory_does_not_wait_for_the_collector(
    small: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Caches of rows that left are freed at once: cycles of references would hold them."""
    gc.collect()
    gc.disable()
    try:
        with serving(small, tokenizer, Limits(batch=2)) as to:
            for _ in range(4):
                for _, heard in asked(to, tokenizer, PROMPTS):
                    heard.text()
            held = [each for each in gc.get_objects() if type(each) is StoreCache and each.data is not None]
            assert len(held) <= 1
    finally:
        gc.enable()
