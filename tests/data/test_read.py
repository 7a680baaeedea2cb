"""Every reader on real files, and its words about broken ones."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from fracbit.data import Tokens, read_documents, read_sources
from fracbit.errors import DataError

VOCABULARY = 259


def texts(tokens: Tokens, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [tokenizer.decode(document, skip_special_tokens=True) for document in tokens.documents]


def write(path: Path, data: str | bytes) -> str:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def test_a_text_is_one_document_as_the_tokenizer_reads_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = "First line.\n\nSecond, with ümlauts and 漢字.\n"
    tokens = read_documents(write(tmp_path / "a.txt", text), tokenizer, VOCABULARY)
    assert tokens.stream.tolist() == tokenizer(text)["input_ids"]
    assert tokens.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert (tokens.bos, tokens.count, len(tokens.documents)) == (1, len(text.encode()) + 1, 1)


def test_lines_and_paragraphs(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.txt", "one\ntwo\n\n \nthree\n")
    assert texts(read_documents(path + "?documents=line", tokenizer, VOCABULARY), tokenizer) == [
        "one",
        "two",
        "three",
    ]
    paragraphs = texts(read_documents(path + "?documents=paragraph", tokenizer, VOCABULARY), tokenizer)
    assert paragraphs == ["one\ntwo", "three"]


def test_first_and_keep(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.txt", "alpha\nbeta\ngamma\n")
    tokens = read_documents(path + "?documents=line&first=2&keep=4", tokenizer, VOCABULARY)
    assert texts(tokens, tokenizer) == ["alp", "bet"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfhi")
    assert texts(read_documents(path, tokenizer, VOCABULARY), tokenizer) == ["hi"]


def test_bos_by_rule(tmp_path: Path, tokenizers: object, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.txt", "hi")
    bare = tokenizers(bos=False)  # type: ignore[operator]
    assert read_documents(path + "?bos=never", tokenizer, VOCABULARY).bos is None
    assert read_documents(path, bare, VOCABULARY).bos is None
    once = read_documents(path + "?bos=always", tokenizer, VOCABULARY)
    assert once.stream.tolist() == tokenizer("hi")["input_ids"]
    with pytest.raises(DataError, match="no BOS"):
        read_documents(path + "?bos=always", bare, VOCABULARY)


def test_jsonl_texts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "one", "id": 1}\n\n{"text": "two"}')
    assert texts(read_documents(path, tokenizer, VOCABULARY), tokenizer) == ["one", "two"]
    joined = read_documents(path + "?documents=one", tokenizer, VOCABULARY)
    assert texts(joined, tokenizer) == ["one\n\ntwo"]
    assert texts(read_documents(path + "?field=text&first=1", tokenizer, VOCABULARY), tokenizer) == ["one"]


def test_conversations_are_written_by_the_template(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
    share = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}
    path = write(tmp_path / "a.jsonl", json.dumps(chat) + "\n" + json.dumps(share) + "\n")
    tokens = read_documents(path, chat_tokenizer, VOCABULARY)
    assert texts(tokens, chat_tokenizer) == ["<user>hi<assistant>yo"] * 2
    assert tokens.documents[0].tolist().count(1) == 1, (
        "the template writes the BOS, and nobody writes a second"
    )


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"text": "two"', r"line 2, is not JSON: .*column"),
        ('["two"]', "line 2, holds a list, expected a JSON object"),
        (
            '{"body": "two"}',
            "line 2: there is no field text or messages or conversations; the fields are body",
        ),
        ('{"text": "  "}', "line 2: an empty document.*empty=skip"),
        ('{"text": null}', "line 2: an empty document"),
        ('{"messages": []}', "line 2: an empty document"),
        ('{"text": 3}', "line 2: the field holds int"),
        ('{"messages": [{"who": "me"}]}', "line 2: a message has the fields who"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "line 2 is a conversation.*no chat template"),
    ],
)
def test_broken_lines(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, line: str, complaint: str) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n' + line + "\n")
    with pytest.raises(DataError, match=complaint):
        read_documents(path, tokenizer, VOCABULARY)


def test_a_template_that_refuses(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.jsonl", '{"messages": [{"role": "ghost", "content": "boo"}]}')
    with pytest.raises(DataError, match=r"line 1: the chat template refuses.*who is this"):
        read_documents(path, chat_tokenizer, VOCABULARY)


def test_the_text_of_parts_is_taken_and_other_parts_are_named(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The form that most sets of conversations have now."""
    parts = [{"type": "image", "url": "x.png"}, {"type": "text", "text": "h"}, "i", {"audio": "y.wav"}]
    listed = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "yo"}]}
    plain = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
    found = [
        read_documents(write(tmp_path / f"{name}.jsonl", json.dumps(record)), chat_tokenizer, VOCABULARY)
        for name, record in (("listed", listed), ("plain", plain))
    ]
    assert found[0].ids.tolist() == found[1].ids.tolist()
    assert found[1].notes == ()
    (note,) = found[0].notes
    assert note.endswith("no text were left out: 1 of type image, 1 of type part without a type")
    bad = {"messages": [{"role": "user", "content": {"text": "hi"}}]}
    with pytest.raises(
        DataError, match="content of a message is dict; it must be a text, or a list of parts"
    ):
        read_documents(write(tmp_path / "bad.jsonl", json.dumps(bad)), chat_tokenizer, VOCABULARY)


def test_conversations_cannot_be_joined(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.jsonl", '{"messages": [{"role": "user", "content": "boo"}]}')
    with pytest.raises(DataError, match="cannot be joined"):
        read_documents(path + "?documents=one", chat_tokenizer, VOCABULARY)


def test_empty_documents_are_skipped_on_demand(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": ""}\n{"text": "two"}')
    tokens = read_documents(path + "?empty=skip", tokenizer, VOCABULARY)
    assert texts(tokens, tokenizer) == ["one", "two"]
    assert tokens.notes == (path + "?empty=skip: 1 empty documents left out",)


@pytest.mark.parametrize(("extension", "kind"), [("u16", "<u2"), ("u32", "<u4")])
def test_raw_ids(tmp_path: Path, extension: str, kind: str) -> None:
    ids = np.arange(12, dtype=kind)
    path = write(tmp_path / f"a.{extension}", ids.tobytes())
    assert read_documents(path, None, 12).stream.tolist() == list(range(12))
    tokens = read_documents(path + "?length=4&first=2&keep=3", None, 12)
    assert [document.tolist() for document in tokens.documents] == [[0, 1, 2], [4, 5, 6]]
    assert tokens.sha256 == hashlib.sha256(ids.tobytes()).hexdigest()


def test_npy_rows_are_documents(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(6).reshape(2, 3))
    tokens = read_documents(str(tmp_path / "a.npy"), None, 6)
    assert [document.tolist() for document in tokens.documents] == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("name", "data", "options", "complaint"),
    [
        ("a.u16", b"abc", "", "3 bytes, not a whole number of 2-byte ids"),
        ("a.u32", b"abcdef", "", "6 bytes, not a whole number of 4-byte ids"),
        ("a.u16", b"", "", "holds no ids"),
        ("a.u16", bytes(20), "?length=3", "10 ids are not a whole number of documents of 3"),
        ("a.u16", np.array([1, 2, 300], "<u2").tobytes(), "", "id 300 at position 2 of document 0"),
        ("a.npy", b"rubbish", "", r"cannot be read as a \.npy array"),
        ("a.txt", b"", "", "the whole file: an empty document"),
        ("a.txt", b" \n\n", "", "the whole file: an empty document"),
        ("a.txt", b"\n\n", "?documents=line", "holds no documents"),
        ("a.txt", b"abc\xff\xfe", "", r"not UTF-8: byte 0xff at offset 3"),
        ("a.jsonl", b'{"text": "ab"}\n{"text": "\xe9"}', "", r"line 2, is not UTF-8: byte 0xe9 at offset 25"),
        ("a.jsonl", b"", "", "holds no documents"),
        ("a.jsonl", b'{"text": ""}', "?documents=one", "holds no text"),
        ("a.parquet", b"rubbish", "", "cannot be read as a Parquet file"),
    ],
)  # fmt: skip
def test_broken_files(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str, data: bytes, options: str, complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint):
        read_documents(write(tmp_path / name, data) + options, tokenizer, VOCABULARY)


@pytest.mark.parametrize(
    ("array", "options", "complaint"),
    [
        (np.zeros(3, np.float32), "", r"float32 \[3\]; ids are integers"),
        (np.zeros((2, 2, 2), np.int64), "", r"\[2, 2, 2\]"),
        (np.array([[3, -1]]), "", "id -1 at position 1 of document 0"),
        (np.zeros((2, 4), np.int64), "?length=2", "documents of 4 ids already"),
        (np.zeros((0, 4), np.int64), "", "holds no ids"),
    ],
)
def test_arrays_that_are_no_ids(tmp_path: Path, array: np.ndarray, options: str, complaint: str) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=complaint):
        read_documents(str(tmp_path / "a.npy") + options, None, 9)


def test_a_pickle_in_an_npy_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="npy array"):
        read_documents(str(tmp_path / "a.npy"), None, 9)


def test_missing_things(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_documents(str(tmp_path / "a.txt"), tokenizer, VOCABULARY)
    with pytest.raises(DataError, match="not one that datasets' save_to_disk wrote"):
        read_documents(str(tmp_path), tokenizer, VOCABULARY)
    with pytest.raises(DataError, match="no tokenizer"):
        read_documents(write(tmp_path / "a.txt", "hi"), None, VOCABULARY)
    with pytest.raises(DataError, match="generate_calibration"):
        read_documents("generated", tokenizer, VOCABULARY)


def test_ids_of_another_tokenizer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.txt", "~")
    with pytest.raises(DataError, match=r"outside the vocabulary 0\.\.50"):
        read_documents(path, tokenizer, 51)


def test_parquet(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"text": ["one", "two"], "n": [1, 2]}), path)
    tokens = read_documents(str(path), tokenizer, VOCABULARY)
    assert texts(tokens, tokenizer) == ["one", "two"]
    assert tokens.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(DataError, match="no field body; the fields are text, n"):
        read_documents(f"{path}?field=body", tokenizer, VOCABULARY)


def test_saved_sets(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_dict({"text": ["one", "", "two"], "n": [1, 2, 3]})
    train.save_to_disk(str(tmp_path / "single"))
    datasets.DatasetDict({"train": train, "test": train.select([2])}).save_to_disk(str(tmp_path / "several"))
    single = str(tmp_path / "single")
    assert texts(read_documents(single + "?documents=one", tokenizer, VOCABULARY), tokenizer) == [
        "one\n\n\n\ntwo"
    ]
    with pytest.raises(DataError, match="row 2: an empty document"):
        read_documents(single, tokenizer, VOCABULARY)
    several = f"datasets:{tmp_path / 'several'}"
    assert texts(read_documents(f"{several}::test", tokenizer, VOCABULARY), tokenizer) == ["two"]
    with pytest.raises(DataError, match="name one of the splits train, test"):
        read_documents(several, tokenizer, VOCABULARY)
    with pytest.raises(DataError, match="no split dev; there are train, test"):
        read_documents(f"{several}::dev", tokenizer, VOCABULARY)


def test_a_set_on_the_hub_while_offline(
    monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    datasets = pytest.importorskip("datasets")
    hub = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"hub cannot be reached.*save_to_disk"):
        read_documents("datasets:wikitext:wikitext-2-raw-v1:test", tokenizer, VOCABULARY)


def test_without_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"datasets, which is not installed.*\[datasets\]"):
        read_documents("datasets:wikitext", tokenizer, VOCABULARY)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="pyarrow, which is not installed"):
        read_documents(write(tmp_path / "a.parquet", b""), tokenizer, VOCABULARY)


def test_shared_files(shared: Path) -> None:
    spec = f"{shared}/data/tales-evaluation.u16?length=512&first=60&keep=256"
    (tokens,) = read_sources([spec], None, 512)
    assert (len(tokens.documents), tokens.count) == (60, 60 * 256)
    assert all(document[0] == 1 for document in tokens.documents)


def test_shared_texts(shared: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "tales-s")
    lambada = read_documents(f"{shared}/data/lambada-2000.jsonl", tokenizer, 512)
    assert (len(lambada.documents), lambada.bos) == (2000, 1)
    wikitext = read_documents(f"{shared}/data/wikitext-2-valid.txt", tokenizer, 512)
    assert wikitext.count == 681807


def test_the_bundled_text(tokenizer: PreTrainedTokenizerFast) -> None:
    bundled = pytest.importorskip("fracbit.bundled")
    held_out = read_documents("bundled", tokenizer, VOCABULARY)
    assert held_out.count == len(bundled.held_out_text().encode()) + 1
    modules = read_documents("bundled:train?documents=each&first=2", tokenizer, VOCABULARY)
    assert texts(modules, tokenizer) == [bundled.module_text(name) for name in bundled.training_modules()[:2]]
