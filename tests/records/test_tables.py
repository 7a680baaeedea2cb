"""Tables: names are known without torch, every entry exists where the page says, and wrong names are answered."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fracbit.errors import RecipeError
from fracbit.records import tables
from fracbit.records.tables import Table

ALL = {name: value for name, value in vars(tables).items() if isinstance(value, Table)}


def test_names_are_checked_without_torch() -> None:
    program = (
        "import sys; from fracbit.records import tables as t\n"
        "assert t.QUANTIZERS.check('gptq') == 'gptq' and 'smooth' in t.TRANSFORMS and len(t.SCORES.names) > 10\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "transformers"} & set(done.stdout.split())


@pytest.mark.parametrize("table", ALL)
def test_every_entry_lives_where_the_page_says(table: str) -> None:
    found = dict(ALL[table].items())
    assert list(found) == list(ALL[table]) == list(ALL[table].names)
    assert len(ALL[table]) == len(found) > 0
    assert all(ALL[table][name] is entry for name, entry in found.items())


@pytest.mark.parametrize("table", ALL)
def test_a_wrong_name_is_answered(table: str) -> None:
    name = ALL[table].names[-1]
    wrong = name[:-1] + ("x" if name[-1] != "x" else "y")
    assert wrong not in ALL[table]
    for ask in (ALL[table].check, ALL[table].load):
        with pytest.raises(ALL[table].error, match=f"unknown {ALL[table].kind} '{wrong}'.*{name}"):
            ask(wrong)


def test_the_names_that_read_text_are_those_whose_objects_do() -> None:
    reads = {
        "QUANTIZERS": lambda entry: bool(entry().needs),
        "COLUMN_RULES": lambda entry: "energy" in entry.needs,
        "SCORES": lambda entry: not entry.data_free,
    }
    for name, table in ALL.items():
        found = [] if name not in reads else [key for key, entry in table.items() if reads[name](entry)]
        assert list(table.reading) == found, name


def test_the_nearest_name_is_offered() -> None:
    with pytest.raises(RecipeError, match="unknown quantizer 'gtpq'; did you mean 'gptq'"):
        tables.QUANTIZERS.check("gtpq")
