"""Laws of every quantizer of the table, with every column rule: what it may write, what it repeats, what it never loses."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fracbit
from fracbit.errors import RecipeError
from fracbit.numerics import decode, parts_of, quantize_tensor, ranges
from fracbit.numerics.linalg import gram_errors
from fracbit.numerics.stats import Stats, add_inputs, empty
from fracbit.quantizers import (
    COLUMN_RULES,
    QUANTIZERS,
    Quantized,
    Quantizer,
    nearest,
    quantize_group,
    quantizer,
)
from fracbit.quantizers.group import rows_stand_alone
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import Scheme

WIDTH, COUNT = 46, 4
SCHEMES = [
    Scheme("int", 3, 16, offset="zero"),
    Scheme("nf", 4, "row", "in", "mean"),
    Scheme("int", 2, 8, "out", "float"),
    Scheme("kmeans:row", 3, 16),
    Scheme("kmeans", 3, "row"),
    Scheme("int", 4, "flat:24", scale="int8:16"),
    Scheme("int:step", 3, 16),
    Scheme("int:step", 4, 16, offset="float", scale="int:up6:8"),
    Scheme("int:step", 3, 16, scale="int:step6:16"),
    Scheme("iq", 4, 16),
]
STOPS_TOGETHER = {"descent"}
"""Its rounds end when all rows of a stack gain little, so that a stack may take a round more than its parts."""
RULES = [None, *COLUMN_RULES]


def given() -> tuple[list[torch.Tensor], Stats]:
    """Three weights that read one input of unequal, correlated channels."""
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(WIDTH, WIDTH, generator=random) * torch.rand(WIDTH, generator=random)
    x = torch.randn(300, WIDTH, generator=random) @ mix
    x[:, 9] *= 20
    weights = [torch.randn(rows, WIDTH, generator=random) for rows in (24, 16, 16)]
    return weights, add_inputs(empty(WIDTH), x)


def columns_of(rule: str | None, weight: torch.Tensor, scheme: Scheme, stats: Stats) -> torch.Tensor | None:
    if rule is None:
        return None
    spread = torch.arange(float(WIDTH)).remainder(11)
    generator = torch.Generator().manual_seed(3)
    return COLUMN_RULES[rule](weight, scheme, stats, count=COUNT, generator=generator, producer_spread=spread)


def same_bytes(one: Quantized, other: Quantized) -> bool:
    first, second = dict(parts_of(one.packed)), dict(parts_of(other.packed))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_quantizer_repeats_itself_and_keeps_columns(name: str, rule: str | None, scheme: Scheme) -> None:
    weights, stats = given()
    weight, copy = weights[0], weights[0].clone()
    gram = None if stats.gram is None else stats.gram.clone()
    columns = columns_of(rule, weight, scheme, stats)
    first, second = (quantizer(name)(weight, scheme, stats, columns=columns) for _ in range(2))
    assert same_bytes(first, second)
    assert torch.equal(first.costs, second.costs)
    assert torch.equal(weight, copy) and torch.equal(stats.gram, gram), "nothing passed in is written to"
    assert first.costs.shape == first.powers.shape == (len(weight),)
    assert bool((first.costs >= 0).all()) and bool((first.powers > 0).all())
    assert first.loss == pytest.approx(float(first.costs.sum() / first.powers.sum()))
    if columns is None:
        assert first.packed.columns is None
    else:
        assert torch.equal(first.packed.columns, columns)
        assert first.packed.outliers.dtype in (torch.bfloat16, torch.float16)
        stored = first.packed.outliers.float()
        assert torch.equal(decode(first.packed)[:, columns.long()], stored), "columns are exact in 16 bits"


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", [*SCHEMES, Scheme("int", 4, 16, offset="float", scale="int4:8")], ids=str)
def test_pieces_of_rows_give_the_bytes_of_the_whole(
    scheme: Scheme, kind: torch.dtype, by_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = given()[0][0].repeat(3, 1)[:67].to(kind)
    importance = torch.rand(67, WIDTH) if by_row else None
    whole = quantize_tensor(weight.float(), scheme, importance)
    monkeypatch.setattr(ranges, "PIECE", 5 * WIDTH)
    pieces = quantize_tensor(weight, scheme, importance)
    assert pieces.shape == whole.shape
    first, second = dict(parts_of(whole)), dict(parts_of(pieces))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_group_gives_what_its_parts_give(name: str, rule: str | None, scheme: Scheme) -> None:
    weights, stats = given()
    columns = [columns_of(rule, weight, scheme, stats) for weight in weights]
    columns[1] = columns[1] if rule == "cost" else None  # one that keeps none among those that do
    together = quantize_group(quantizer(name), weights, [scheme] * 3, stats, columns)
    stacked = rows_stand_alone(scheme) and not any(numbers is not None for numbers in columns)
    for weight, numbers, found in zip(weights, columns, together, strict=True):
        alone = quantizer(name)(weight, scheme, stats, columns=numbers)
        assert found.loss == pytest.approx(alone.loss, rel=0.02 if name in STOPS_TOGETHER else 1e-5)
        assert same_bytes(found, alone) or (stacked and name in STOPS_TOGETHER)
        assert found.notes == alone.notes


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("name", [name for name in QUANTIZERS if quantizer(name).needs])
def test_looking_at_data_is_not_worse_than_rounding(name: str, scheme: Scheme) -> None:
    """Without columns, on the objective itself; with them, on what the columns leave."""
    weights, stats = given()
    for weight in weights:
        found = quantizer(name)(weight, scheme, stats)
        rounded = float(gram_errors(weight - decode(quantize_tensor(weight, scheme)), stats.gram).sum())
        assert float(found.costs.sum()) <= rounded * (1 + 1e-5)
        cost = float(gram_errors(weight - decode(found.packed), stats.gram).sum())
        assert float(found.costs.sum()) == pytest.approx(cost, rel=1e-3), "costs are those of what is stored"
        columns = columns_of("cost", weight, scheme, stats)
        repaired = quantizer(name)(weight, scheme, stats, columns=columns)
        plain = decode(nearest(False)(weight, scheme, stats, columns=columns).packed)
        assert float(repaired.costs.sum()) <= float(gram_errors(weight - plain, stats.gram).sum()) * (
            1 + 1e-5
        )


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_protocol_says_what_a_quantizer_reads(name: str) -> None:
    weights, stats = given()
    fill = quantizer(name, search=True)
    assert fill.search and not quantizer(name).search
    assert fill.needs <= {"gram", "energy", "absmax"}
    assert fill.couple(None) is None
    if not fill.needs:
        assert fill(weights[0], SCHEMES[0]).packed.shape == (24, WIDTH)
    coupling = fill.couple(stats)
    if coupling is not None:
        shared = fill(weights[0], SCHEMES[0], stats, coupling=coupling)
        assert same_bytes(shared, fill(weights[0], SCHEMES[0], stats))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_quantizer_reads_what_it_says_and_no_more(name: str) -> None:
    weights, stats = given()
    fill = quantizer(name, search=True)
    assert fill.needs <= fill.reads
    other = {
        "gram": None,
        "absmax": torch.full_like(stats.absmax, 3.0),
        "energy": torch.full_like(stats.energy, 5.0),
    }
    unread = replace(stats, **{part: value for part, value in other.items() if part not in fill.reads})
    first = fill(weights[0], SCHEMES[0], stats)
    assert same_bytes(first, fill(weights[0], SCHEMES[0], unread))
    for part in fill.reads - fill.needs:
        assert not same_bytes(first, fill(weights[0], SCHEMES[0], replace(stats, **{part: other[part]})))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_options_of_a_quantizer_are_the_fields_of_its_record(name: str) -> None:
    usual = quantizer(name)
    options = {key: value for key, value in usual if key != "search"}
    for key, value in options.items():
        changed = quantizer(f"{name}:{key}={value * 2 + 1}")
        assert getattr(changed, key) == value * 2 + 1
        assert changed == replace_field(usual, key, value * 2 + 1)
        for wrong in ("many", -1):
            with pytest.raises(RecipeError, match=rf"{key} is '{wrong}'; it should be"):
                quantizer(f"{name}:{key}={wrong}")
    with pytest.raises(RecipeError, match=rf"quantizer {name} has no key 'colour'"):
        quantizer(f"{name}:colour=3")
    with pytest.raises(RecipeError, match="search is a setting of its own"):
        quantizer(f"{name}:search=true")


def replace_field(fill: Quantizer, key: str, value: float) -> Quantizer:
    return type(fill)(**{**dict(fill), key: value})


@pytest.mark.parametrize(
    "word", ["gptq:", "gptq:damping", "gptq:damping=", "gptq:damping=1,damping=2", "gptq:=3"]
)
def test_words_that_are_no_quantizer_are_refused(word: str) -> None:
    with pytest.raises(RecipeError, match="write gptq, or gptq:KEY=VALUE"):
        quantizer(word)
    with pytest.raises(RecipeError, match="write gptq, or gptq:KEY=VALUE"):
        Recipe(model="tiny", quantizer=word)


def test_equal_options_have_equal_words() -> None:
    words = ["descent:rounds=4,damping=0.020", " descent : damping=2e-2 , rounds=4.0"]
    assert {Recipe(model="tiny", quantizer=word).quantizer for word in words} == {
        "descent:damping=0.02,rounds=4"
    }


def test_damping_and_rounds_change_the_codes() -> None:
    weights, stats = given()
    words = ("gptq", "gptq:damping=0.5", "gptq:rounds=2", "descent", "descent:rounds=1")
    codes = [parts_of(quantizer(word)(weights[0], SCHEMES[0], stats).packed) for word in words]
    seen = {dict(each)["codes"].numpy().tobytes() for each in codes}
    assert len(seen) == len(words)


def test_no_other_room_knows_which_quantizer_it_holds() -> None:
    """Quantizers are asked for by name: the files that the table names are imported by their own package alone."""
    source = Path(fracbit.__file__).parent
    files = {entry.partition(":")[0] for entry in QUANTIZERS.entries.values()}
    for path in source.rglob("*.py"):
        if path.parent.name != "quantizers":
            imported = {
                node.module
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.ImportFrom)
            }
            assert not imported & files, f"{path.relative_to(source)} imports a quantizer's own file"
