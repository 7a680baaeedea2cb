"""Fuzz of the native boundary: buffers of wrong size, type or layout are a Python exception, never a crash or a stray read."""

import contextlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chaos.boundary import arguments_of, entry_points, function, hostile_call
from fracbit.kernels.cpu import NATIVE

pytestmark = pytest.mark.skipif(NATIVE is None, reason="the native module is not built")


def good(rows: int, columns: int, bits: int, kind: str, block: int) -> dict[str, Any]:
    blocks = {"in": (rows, -(-columns // block)), "out": (-(-rows // block), columns), "tensor": (1, 1)}
    scales = torch.ones(blocks.get(kind, (-(-rows * columns // block),)))
    return {
        "rows": rows, "columns": columns, "bits": bits, "blocks": kind, "block": block,
        "codes": torch.randint(0, 256, (rows, -(-columns * bits // 8)), dtype=torch.uint8),
        "scales": scales, "offsets": None, "zeros": None, "table": torch.linspace(-1, 1, 2**bits)[None],
        "outlier_columns": None, "outliers": None,
    }  # fmt: skip


def use(fields: dict[str, Any]) -> None:
    weight = NATIVE.PackedWeight(**fields)
    for int8 in (False, True):
        weight.multiply(torch.randn(3, fields["columns"]), torch.empty(3, fields["rows"]), int8, 1)
    weight.decode(0, torch.empty(fields["rows"], fields["columns"]), 1)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 20), st.integers(1, 150), st.integers(1, 8), st.sampled_from(["in", "out", "tensor", "flat"]),
    st.integers(1, 100),
)  # fmt: skip
def test_what_fits_runs_whatever_the_codes(rows: int, columns: int, bits: int, kind: str, block: int) -> None:
    use(good(rows, columns, bits, kind, block))


WRONG: list[tuple[str, Any]] = [
    ("rows", 0), ("rows", -1), ("rows", 6), ("rows", 2**31), ("columns", 0), ("columns", 33), ("columns", 2**40),
    ("bits", 0), ("bits", 9), ("bits", 3), ("bits", -4), ("blocks", "diagonal"), ("block", 0), ("block", -8),
    ("codes", torch.zeros(5, 15, dtype=torch.uint8)), ("codes", torch.zeros(4, 16, dtype=torch.uint8)),
    ("codes", torch.zeros(80, dtype=torch.uint8)), ("codes", torch.zeros(5, 16, dtype=torch.int8)),
    ("codes", torch.zeros(5, 32, dtype=torch.uint8)[:, ::2]), ("codes", torch.zeros(0, 16, dtype=torch.uint8)),
    ("scales", torch.ones(5, 3)), ("scales", torch.ones(4, 4)), ("scales", torch.ones(5, 4, dtype=torch.float64)),
    ("scales", torch.ones(4, 5).T), ("scales", torch.ones(20)), ("scales", torch.ones(1, 4).expand(5, 4)),
    ("offsets", torch.ones(5, 3)), ("offsets", torch.ones(5, 4).half()), ("zeros", torch.zeros(5, 1, dtype=torch.uint8)),
    ("zeros", torch.zeros(5, 2)), ("table", torch.zeros(2, 16)), ("table", torch.zeros(1, 17)), ("table", torch.zeros(16)),
    ("table", torch.zeros(1, 0)), ("table", torch.zeros(1, 16).half()), ("table", torch.zeros(0, 16)),
    ("outliers", torch.zeros(5, 1)), ("outlier_columns", torch.tensor([1], dtype=torch.int32)),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), WRONG, ids=str)
def test_one_wrong_argument(field: str, value: Any) -> None:
    fields = good(5, 32, 4, "in", 8)
    use(fields)
    with pytest.raises((ValueError, TypeError)):
        use(fields | {field: value})


@pytest.mark.parametrize("columns", [[-1], [32], [3, 3], [4, 2], list(range(32))], ids=str)
def test_wrong_outlier_columns(columns: list[int]) -> None:
    fields = good(5, max(32 - len(columns), 1), 4, "in", 8) | {"columns": 32}
    outliers = torch.ones(5, len(columns)).half()
    with pytest.raises(ValueError, match="outlier"):
        use(fields | {"outlier_columns": torch.tensor(columns, dtype=torch.int32), "outliers": outliers})


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_sizes_are_refused_or_run(data: st.DataObject) -> None:
    """Whatever sizes meet: a ValueError or a result, never anything else."""
    fields = good(*(data.draw(st.integers(1, 40)) for _ in range(2)), data.draw(st.integers(1, 8)), "in", 16)
    fields["blocks"] = data.draw(st.sampled_from(["in", "out", "tensor", "flat"]))
    for name in ("rows", "columns", "bits", "block"):
        if data.draw(st.booleans()):
            fields[name] = data.draw(st.integers(-2, 300))
    for name in ("codes", "scales", "table"):
        if data.draw(st.booleans()):
            shape = data.draw(st.lists(st.integers(0, 40), min_size=0, max_size=3))
            fields[name] = torch.zeros(shape, dtype=fields[name].dtype)
    with contextlib.suppress(ValueError):
        use(fields)


def test_wrong_activations_and_results() -> None:
    weight = NATIVE.PackedWeight(**good(5, 32, 4, "in", 8))
    x, y = torch.randn(3, 32), torch.empty(3, 5)
    wrong = [
        (x[:, :31], y), (x, y[:2]), (x, torch.empty(3, 6)), (x.double(), y), (x, torch.empty(3, 5, dtype=torch.int32)),
        (x[0], y[0]), (x.T.contiguous().T, y), (x, torch.empty(5, 3).T), (x, torch.empty(1, 5).expand(3, 5)),
    ]  # fmt: skip
    for a, b in wrong:
        with pytest.raises((ValueError, TypeError)):
            weight.multiply(a, b, False, 1)
    for first, rows in ((-1, 2), (4, 2), (2**62, 1), (0, 6)):
        with pytest.raises((ValueError, TypeError)):
            weight.decode(first, torch.empty(rows, 32), 1)
    weight.multiply(x, y, True, 10**6)  # any number of threads is taken as "at most"
    weight.multiply(x, y, True, -1)


def test_weights_that_share_activations() -> None:
    """What each gives alone, and a refusal of what does not belong together."""
    weights = [
        NATIVE.PackedWeight(**good(rows, 32, bits, "in", 8))
        for rows, bits in ((5, 4), (9, 4), (3, 2), (4, 8), (6, 3))
    ]
    x = torch.randn(3, 32)
    sizes = (5, 9, 3, 4, 6)
    for int8 in (False, True):
        together, alone = ([torch.empty(3, rows) for rows in sizes] for _ in range(2))
        NATIVE.multiply_together(weights, x, together, int8, 2)
        for weight, y in zip(weights, alone, strict=True):
            weight.multiply(x, y, int8, 2)
        assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    other = NATIVE.PackedWeight(**good(5, 40, 4, "in", 8))
    y = [torch.empty(3, 5), torch.empty(3, 9)]
    for arguments in (
        ([], x, []), (weights[:2], x, y[:1]), (weights[:2], x[:, :31], y), (weights[:2], x, y[::-1]),
        ([weights[0], other], x, [y[0], torch.empty(3, 5)]), (weights[:2], x[:2], y), (weights[:2], x, [y[0], y[1][:2]]),
        (weights[:2], x, [y[0], y[1].double()]),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError)):
            NATIVE.multiply_together(*arguments, False, 1)


def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match="not available here"):
        NATIVE.PackedWeight(**good(5, 32, 4, "in", 8), isa="mmx")


def test_the_fuzz_covers_every_entry_point() -> None:
    """All that Python can call."""
    assert arguments_of().keys() == entry_points()
    for name, arguments in arguments_of().items():
        if name not in ("add_gram", "attend_causal") or (NATIVE.has_gram() and NATIVE.has_causal()):
            function(name)(*arguments)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**63))
def test_hostile_arguments_are_refused_or_run(seed: int) -> None:
    """Each of the calls gives an exception or a result, whatever Python hands over."""
    _, run = hostile_call(None)(random.Random(seed), Path())
    assert run().startswith(("refused", "unharmed"))


def test_none_and_numbers_between_two_places_are_refused() -> None:
    weight = NATIVE.PackedWeight(**good(5, 32, 4, "in", 8))
    x, y = torch.randn(3, 32), torch.empty(3, 5)
    for weights, results in (
        ([weight, None], [y, y]),
        ([None], [y]),
        ([weight], [None]),
        (None, [y]),
        ([weight], None),
    ):
        with pytest.raises((ValueError, TypeError)):
            NATIVE.multiply_together(weights, x, results, False, 1)
    between = np.frombuffer(bytes(4 * x.numel() + 1), np.uint8)[1:].view(np.float32).reshape(3, 32)
    with pytest.raises(ValueError, match="aligned"):
        weight.multiply(between, y, False, 1)
