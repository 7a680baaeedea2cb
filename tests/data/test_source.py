"""The grammar of sources: what each string means, and what is said about a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

from fracbit.data import parse_source
from fracbit.errors import DataError


def test_a_plain_path() -> None:
    source = parse_source("dir/notes.txt")
    assert (source.format, source.location, source.weight, source.documents) == (
        "text",
        "dir/notes.txt",
        1.0,
        "one",
    )


def test_options_and_weight() -> None:
    source = parse_source("ids.u16?length=512&first=60&keep=256@0.25")
    assert (source.format, source.length, source.first, source.keep) == ("u16", 512, 60, 256)
    assert (source.weight, source.location, str(source)) == (
        0.25,
        "ids.u16",
        "ids.u16?length=512&first=60&keep=256@0.25",
    )


def test_records_are_documents_by_themselves() -> None:
    assert parse_source("chats.jsonl?field=messages").documents == "each"
    assert parse_source("chats.jsonl?field=body").field == "body"


@pytest.mark.parametrize(
    ("text", "name", "config", "split"),
    [
        ("datasets:wikitext", "wikitext", None, None),
        ("datasets:wikitext:wikitext-2-raw-v1", "wikitext", "wikitext-2-raw-v1", None),
        ("datasets:wikitext:wikitext-2-raw-v1:test@2", "wikitext", "wikitext-2-raw-v1", "test"),
        ("datasets:org/name::train?field=body", "org/name", None, "train"),
    ],
)
def test_hub_sets(text: str, name: str, config: str | None, split: str | None) -> None:
    source = parse_source(text)
    assert (source.format, source.location, source.config, source.split) == ("datasets", name, config, split)


def test_a_folder_is_a_saved_set(tmp_path: Path) -> None:
    assert parse_source(str(tmp_path)).format == "datasets"


def test_an_at_sign_in_a_name_is_no_weight() -> None:
    assert parse_source("me@home/notes.txt").location == "me@home/notes.txt"


def test_an_existing_file_wins_over_the_grammar(tmp_path: Path) -> None:
    path = tmp_path / "what?first=1.txt"
    path.write_text("x")
    source = parse_source(str(path))
    assert (source.location, source.first) == (str(path), None)


def test_the_bundled_text_and_the_generated_one() -> None:
    assert parse_source("bundled").split == "held-out"
    assert parse_source("bundled:train").split == "train"
    assert parse_source("generated@0.5").format == "generated"


def test_format_overrides_the_extension() -> None:
    assert parse_source("tokens.bin?format=u32").format == "u32"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "empty source"),
        ("notes.docx", r"unknown extension \.docx; .*format=text"),
        ("notes", r"\(none\)"),
        ("notes.txt?lenght=3", "no option 'lenght'; known: bos, documents"),
        ("ids.u16?lenght=3", "did you mean 'length'"),
        ("ids.u16?field=text", "no option 'field'"),
        ("ids.u16?length=0", "at least 1"),
        ("ids.u16?length=many", "at least 1"),
        ("ids.u16?length=", "has no value"),
        ("ids.u16?length", "has no value"),
        ("ids.u16?length=3&length=4", "twice"),
        ("ids.u16@0", "above 0"),
        ("ids.u16@-1", "above 0"),
        ("ids.u16@nan", "above 0"),
        ("notes.txt?documents=each", "unknown documents=each; known: line, one, paragraph"),
        ("notes.txt?bos=yes", "unknown bos=yes; known: always, auto, never"),
        ("notes.txt?format=pdf", "unknown format=pdf; known: jsonl, npy"),
        ("datasets:", "no name of a data set"),
        ("bundled:test", "train and held-out"),
        ("generated?first=3", "takes no options"),
    ],
)
def test_wrong_sources(text: str, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        parse_source(text)
