"""Samples: exact counts, no id twice, the seed decides, the hash notices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fracbit.data import Tokens, hash_ids, sample, shared_documents
from fracbit.data.tokens import join_documents, split_samples
from fracbit.errors import DataError


def make(*documents: list[int], bos: int | None = None, weight: float = 1.0, source: str = "made") -> Tokens:
    ids, starts = join_documents([np.array(document) for document in documents])
    return Tokens(ids, starts, source, "0" * 64, bos, weight)


def rows_of(*documents: list[int]) -> set[tuple[int, ...]]:
    return {tuple(document) for document in documents}


def test_documents_and_stream() -> None:
    tokens = make([1, 2, 3], [1, 4])
    assert [document.tolist() for document in tokens.documents] == [[1, 2, 3], [1, 4]]
    assert tokens.stream.tolist() == [1, 2, 3, 1, 4]
    assert tokens.stream.dtype == torch.int64
    assert tokens.to_json()["documents"] == 2


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    length=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_no_id_is_used_twice(lengths: list[int], length: int, seed: int) -> None:
    numbers = iter(range(sum(lengths)))
    tokens = make(*[[next(numbers) for _ in range(count)] for count in lengths])
    samples = tokens.count // length
    if samples == 0:
        return
    drawn = sample(tokens, samples=samples, length=length, seed=seed)
    assert drawn.ids.shape == (samples, length)
    assert drawn.ids.unique().numel() == samples * length


def test_documents_of_the_length_asked_for_stay_whole() -> None:
    documents = [[1, 10 * n, 10 * n + 1, 10 * n + 2] for n in range(1, 9)]
    drawn = sample(make(*documents, bos=1), samples=5, length=4, seed=3)
    assert {tuple(row) for row in drawn.ids.tolist()} <= rows_of(*documents)


def test_the_seed_decides() -> None:
    tokens = make(list(range(1000)))
    first, again, other = (sample(tokens, samples=8, length=16, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.ids, again.ids)
    assert first.sha256 == again.sha256 != other.sha256
    assert first.to_json()["sha256"] == hash_ids(first.ids)


def test_the_hash_is_the_same_on_every_machine() -> None:
    assert (
        hash_ids(torch.arange(6).view(2, 3))
        == "9e84b51c449b81c3ef3017a0137b130578a496eab1a16787a6dc6a1ec36dfcc5"
    )
    assert hash_ids(torch.arange(6).view(3, 2)) != hash_ids(torch.arange(6).view(2, 3))


def test_a_mixture_has_the_ratio_of_its_weights() -> None:
    low, high = (
        make(list(range(500)), weight=0.75),
        make(list(range(1000, 1500)), weight=0.25, source="other"),
    )
    drawn = sample([low, high], samples=12, length=10, seed=0)
    assert int((drawn.ids[:, 0] >= 1000).sum()) == 3
    assert [part["samples"] for part in drawn.sources] == [9, 3]
    assert not bool((drawn.ids[9:, 0] >= 1000).all()), "the parts are shuffled"


@given(samples=st.integers(1, 500), weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_shares_are_whole_and_complete(samples: int, weights: list[float]) -> None:
    shares = split_samples(samples, weights)
    assert sum(shares) == samples
    exact = [samples * weight / sum(weights) for weight in weights]
    assert all(abs(share - value) < 1 + 1e-6 for share, value in zip(shares, exact, strict=True))


def test_samples_with_and_without_bos() -> None:
    tokens = make([1, *range(100, 140)], [1, *range(200, 240)], bos=1)
    opened = sample(tokens, samples=8, length=10, seed=0, bos="window").ids
    assert (opened[:, 0] == 1).all()
    assert (opened[:, 1:] != 1).sum() >= 8 * 9 - 1
    assert (sample(tokens, samples=8, length=10, seed=0, bos="none").ids >= 100).all()


def test_a_bos_that_is_not_there_cannot_open_samples() -> None:
    with pytest.raises(DataError, match="bos=always"):
        sample(make(list(range(50))), samples=2, length=5, seed=0, bos="window")


def test_too_few_ids() -> None:
    with pytest.raises(
        DataError, match=r"made holds 50 ids, and 6 samples x 10 ids = 60 are needed.*at most 5"
    ):
        sample(make(list(range(50))), samples=6, length=10, seed=0)


@pytest.mark.parametrize(("samples", "length"), [(0, 4), (4, 0), (-1, 4)])
def test_no_samples(samples: int, length: int) -> None:
    with pytest.raises(DataError, match="at least 1"):
        sample(make(list(range(50))), samples=samples, length=length, seed=0)


def test_no_sources() -> None:
    with pytest.raises(DataError, match="no source"):
        sample([], samples=1, length=1, seed=0)


def test_shared_documents() -> None:
    generator = np.random.default_rng(0)
    documents = generator.integers(2, 500, (6, 200)).tolist()
    ours = make(*([1, *document] for document in documents), [1, 7, 8], [1, 7, 9], bos=1)
    theirs = make(documents[2], documents[4][30:120], documents[5][:63], [7, 8])
    assert shared_documents(ours, theirs) == 3, "one whole, one in part, one short; a run of 63 is none"
    assert shared_documents(ours, ours) == 8
    assert shared_documents(make([5] * 10), make([6] * 10)) == 0


def test_shared_sets_are_apart(shared: object) -> None:
    from fracbit.data import read_documents

    first, second = (
        read_documents(f"{shared}/data/tales-{name}.u16?length=512", None, 512)
        for name in ("calibration", "evaluation")
    )
    assert shared_documents(first, second) == 0
    assert shared_documents(second, second) == 300
