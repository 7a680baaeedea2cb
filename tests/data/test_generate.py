"""Self-generated text: first ids by rule, greedy ones, sampled ones; the seed decides, the batch does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from fracbit.data import generate_calibration, hash_ids, read_calibration
from fracbit.data.languages import first_ids, main_scripts, script_of
from fracbit.data.self_text import sampled
from fracbit.errors import DataError, WeightError

VOCABULARY = 259


@pytest.fixture(scope="module")
def writer(tiny_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return tiny_llama(vocab_size=VOCABULARY, initializer_range=0.5)


def test_scripts() -> None:
    words = ["the", " Übung", "слово", "字", "3.14", "\ufffd", "  ", "é1", ""]
    assert [script_of(word) for word in words] == [
        "LATIN",
        "LATIN",
        "CYRILLIC",
        "CJK",
        None,
        None,
        None,
        "LATIN",
        None,
    ]
    assert main_scripts(["a"] * 8 + ["b"] * 2, 0.75) == ("a",)
    assert main_scripts(["a"] * 6 + ["b"] * 3 + ["c"], 0.75) == ("a", "b")
    assert main_scripts(["b", "a"], 1.0) == ("a", "b")


def test_first_ids_are_letters_of_the_main_script(tokenizer: PreTrainedTokenizerFast) -> None:
    found = first_ids(tokenizer, VOCABULARY)
    assert found.scripts == ("LATIN",)
    letters = {tokenizer.decode([index]) for index in found.ids}
    assert letters == set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


def test_first_ids_begin_words_where_a_vocabulary_marks_them(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "tales-s")
    found = first_ids(tokenizer, 512)
    assert all(token.startswith("▁") for token in tokenizer.convert_ids_to_tokens(list(found.ids)))
    assert len(found.ids) > 50


def test_a_vocabulary_without_letters(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="has a letter"):
        first_ids(tokenizer, 4)


@pytest.mark.parametrize("greedy", [(0, 0), (3, 5)])
def test_each_id_is_what_its_place_asks_for(
    writer: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, greedy: tuple[int, int]
) -> None:
    written = generate_calibration(writer, tokenizer, samples=6, length=20, seed=0, greedy=greedy)
    ids = torch.stack(written.documents)
    assert ids.shape == (6, 20)
    assert (ids[:, 0] == 1).all(), "a document opens with the BOS, as the tokenizer does"
    allowed = torch.tensor(first_ids(tokenizer, VOCABULARY).ids)
    assert torch.isin(ids[:, 1], allowed).all()
    with torch.no_grad():
        likeliest = writer(ids).logits.argmax(-1)
    ended = torch.isin(ids[:, 1:5], torch.tensor([1, 2])).any(1)
    sure = ids[~ended, 2 : 2 + greedy[0]]
    assert torch.equal(sure, likeliest[~ended, 1 : 1 + greedy[0]])


def test_the_seed_decides_and_the_batch_does_not(
    writer: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    def make(seed: int, batch: int) -> str:
        return generate_calibration(writer, tokenizer, samples=5, length=24, seed=seed, batch=batch).sha256

    assert make(0, 1) == make(0, 2) == make(0, 16)
    assert make(0, 2) != make(1, 2)


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, -2.0, 0.5, -torch.inf], dtype=torch.float64)
    chance = torch.linspace(0, 1, 20001, dtype=torch.float64)[:-1]
    counts = torch.bincount(sampled(logits.expand(20000, 5), chance), minlength=5) / 20000
    assert torch.allclose(counts.double(), logits.softmax(0), atol=1e-4)


def test_a_text_that_ends_is_followed_by_the_next(
    tiny_llama: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_llama(vocab_size=VOCABULARY)
    with torch.no_grad():
        model.get_output_embeddings().weight[:] = 0
    ids = torch.stack(
        generate_calibration(model, tokenizer, samples=40, length=100, seed=0, greedy=(0, 0)).documents
    )
    row, column = (ids[:, :-2] == 2).nonzero(as_tuple=True)
    assert len(row) > 3, "every id is as likely as another, the end too"
    assert (ids[row, column + 1] == 1).all()
    assert torch.isin(ids[row, column + 2], torch.tensor(first_ids(tokenizer, VOCABULARY).ids)).all()


def test_without_a_bos_a_document_opens_with_a_first_id(
    writer: LlamaForCausalLM, tokenizers: Callable[..., PreTrainedTokenizerFast]
) -> None:
    bare = tokenizers(bos=False)
    written = generate_calibration(writer, bare, samples=3, length=8, seed=0)
    assert torch.isin(
        torch.stack(written.documents)[:, 0], torch.tensor(first_ids(bare, VOCABULARY).ids)
    ).all()
    assert written.bos is None


def test_a_mixture_of_generated_and_read(
    writer: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("something else " * 40)
    calls = []

    def make() -> LlamaForCausalLM:
        calls.append(1)
        return writer

    sources = ["generated@0.75", f"{tmp_path}/a.txt@0.25"]
    options = {"samples": 8, "length": 16, "seed": 0}
    drawn = read_calibration(sources, tokenizer, VOCABULARY, model=make, **options)  # type: ignore[arg-type]
    assert drawn.ids.shape == (8, 16)
    assert [part["samples"] for part in drawn.sources] == [6, 2]
    assert drawn.sha256 == hash_ids(drawn.ids)
    assert "generated by the float model" in drawn.notes[0]
    read_calibration(sources[1:], tokenizer, VOCABULARY, model=make, **options)  # type: ignore[arg-type]
    assert len(calls) == 1, "the float model is made only when it has to write"
    with pytest.raises(DataError, match="needs the float model"):
        read_calibration(sources, tokenizer, VOCABULARY, **options)  # type: ignore[arg-type]


def test_impossible_requests(writer: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="longer than the 128 positions"):
        generate_calibration(writer, tokenizer, samples=1, length=129, seed=0)
    with pytest.raises(DataError, match="at least 1"):
        generate_calibration(writer, tokenizer, samples=0, length=8, seed=0)
    with pytest.raises(DataError, match="the least and the most"):
        generate_calibration(writer, tokenizer, samples=1, length=8, seed=0, greedy=(5, 3))


def test_nan_weights(tiny_llama: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_llama(vocab_size=VOCABULARY)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(WeightError, match="NaN after id 0"):
        generate_calibration(model, tokenizer, samples=2, length=8, seed=0)


def test_progress_counts_ids(writer: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    seen: list[tuple[str, int, int]] = []
    generate_calibration(
        writer, tokenizer, samples=5, length=8, seed=0, batch=2, progress=lambda *step: seen.append(step)
    )
    assert seen == [("writing calibration text", done, 40) for done in (16, 32, 40)]


def test_a_trained_model_writes_what_it_finds_likely(shared: Path) -> None:
    folder = shared / "models" / "tales-xs"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    written = generate_calibration(model, AutoTokenizer.from_pretrained(folder), samples=8, length=96, seed=0)
    ids = torch.stack(written.documents)
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    assert 0.8 < loss < 2.2, "near the entropy of its own text, far from the ln 512 = 6.2 of random ids"
