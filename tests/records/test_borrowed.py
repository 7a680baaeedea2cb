"""Names that people bring from other programs are read, or answered with what to write here."""

from __future__ import annotations

import re

import pytest

from fracbit.cli.asked import known_settings
from fracbit.cli.quantize import Running
from fracbit.cli.renamed import OLD, rewritten
from fracbit.cli.settings import read_settings
from fracbit.errors import RecipeError, SchemeError
from fracbit.records import tables
from fracbit.records.borrowed import MEANT, METHODS, USUAL
from fracbit.records.scheme import Scheme, parse_scheme
from fracbit.records.tables import Table

WORDS = {
    "fp4": "fp4_e2m1/64", "FP8": "fp8_e4m3/64", "fp6": "fp6_e2m3", "nvfp4": "ocp4/16 s=ocp8:tensor", "MXFP4": "ocp4/32 s=e8m0",
    "q4_k": "--for llama.cpp", "Q4_K_M": "--average-bits 4.5", "q8_0": "int8z/32", "iq4_xs": "--for llama.cpp",
    "W4A16": "int4z/128", "w3a16-g64": "int3z/128", "W8A8": "calibration.inputs=int8/token", "4bit": "int4z/64",
    "3-bit-128g": "--average-bits 3.5", "int4_weight_only": "int4z/64", "bf16": "--keep PATTERN", "float16": "--keep PATTERN",
}  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_a_word_of_others_is_answered(word: str) -> None:
    for ask in (parse_scheme, lambda text: Scheme(dtype=text)):
        if ask is parse_scheme or not re.fullmatch(r"[a-z]+", word):
            with pytest.raises(SchemeError, match=re.escape(WORDS[word])):
                ask(word)


@pytest.mark.parametrize(
    ("word", "scheme"),
    [
        ("fp4_e2m1", "float:e2m14/64"), ("FP4_E2M1/32", "float:e2m14/32"), ("fp8_e4m3/row", "float:e4m38/row"),
        ("NF4", "nf4/64"), ("INT4", "int4/64"), ("Int3z/64 out", "int3z/64 out"),
    ],
)  # fmt: skip
def test_a_word_that_means_one_scheme_is_read(word: str, scheme: str) -> None:
    assert parse_scheme(word) == parse_scheme(scheme)
    assert str(parse_scheme(word)) == scheme


@pytest.mark.parametrize("word", ["nf4", "int4", "int3z/64", "fp4_e2m1"])
def test_a_whole_scheme_as_a_data_type_is_that_scheme(word: str) -> None:
    assert rewritten(["--dtype", word, "--quiet"], OLD["quantize"])[1] == f"scheme={parse_scheme(word)}"


def test_a_fraction_of_bits_is_an_average() -> None:
    with pytest.raises(RecipeError, match=re.escape("--average-bits 3.5")):
        rewritten(["--bits", "3.5"], OLD["quantize"])
    assert rewritten(["--bits", "3.0", "--quiet"], OLD["quantize"])[:2] == ["--set", "scheme.bits=3"]


def test_what_is_offered_exists() -> None:
    """Schemes can be made, settings and options are those of the command line, names are of the tables."""
    for word in USUAL:
        tables.DATATYPES.check(parse_scheme(word).dtype.partition(":")[0])
    known = known_settings(Running)
    for text in (*METHODS.values(), *MEANT.values()):
        filled = text.format(*"4444")
        for setting in re.findall(r"--set (\S+=[^\s,;]+)", filled):
            assert read_settings([setting], known)
        for word in re.findall(r"--scheme ([^\s,;]+)|'(\S+ s=\S+)'|(fp\d_\w+/\d+)", filled):
            assert parse_scheme("".join(word))
        for name in re.findall(r"--quantizer (\w+)|write ([a-z]\w+)$", filled):
            assert "".join(name) in tables.QUANTIZERS
        for name in re.findall(r"--for ([a-z.-]+)", filled):
            assert name in tables.SERVING


def test_a_name_of_another_table_is_shown_the_way() -> None:
    entries = [value for value in vars(tables).values() if isinstance(value, Table)]
    for mine in entries:
        for other in entries:
            for name in set(other) - set(mine):
                with pytest.raises(mine.error, match=f"unknown {mine.kind} '{re.escape(name)}'; it is an? "):
                    mine.check(name)
