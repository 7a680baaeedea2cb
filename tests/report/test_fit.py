"""Fits on rows whose truth is known."""

import math
import subprocess
import sys

import numpy as np
import pytest

from fracbit.records.recipe import Recipe
from fracbit.records.row import KEEP_ALL, Evaluation, Row, Run, run_key
from fracbit.records.scheme import Scheme
from fracbit.report import fit

WINDOWS = 40
TOKENS = 100


def make_row(model: str, parameters: int, bits: int, nll: float, noise: float = 0.0, **scheme: object) -> Row:
    """A row with this loss; `noise` is the spread of its windows, the same pattern for every row."""
    quantized = bits < 16
    recipe = (
        Recipe(model=model, scheme=Scheme(bits=bits, **scheme))  # type: ignore[arg-type]
        if quantized
        else Recipe(model=model, overrides=(KEEP_ALL,))
    )
    run = Run(recipe=recipe, evaluation=Evaluation(text="t"))
    pattern = np.random.default_rng(0).standard_normal(WINDOWS)
    pattern -= pattern.mean()
    losses = TOKENS * (nll + noise * pattern)
    return Row(
        key=run_key(run), run=run, status="done", parameters=parameters, weights=parameters if quantized else 0,
        stored_bits=parameters * bits if quantized else 0, model_bits=parameters * bits, nll=nll, perplexity=math.exp(nll),
        window_nll=tuple(losses), window_tokens=(TOKENS,) * WINDOWS, text_sha256="abc",
    )  # fmt: skip


def parallel_rows(noise: float = 0.5) -> list[Row]:
    """Loss 10 - 0.3 log2(total bits) + height(k): 4 bits is the base, 3 bits 0.2 above, 16 bits 0.1 above."""
    heights = {3: 0.2, 4: 0.0, 16: 0.1}
    return [
        make_row(f"m{size}", size, bits, 10 - 0.3 * math.log2(size * bits) + height, noise)
        for size in (10**5, 10**6, 10**7)
        for bits, height in heights.items()
    ]


def test_offsets_of_parallel_curves_are_found() -> None:
    found = {item.bits: item for item in fit.offsets(parallel_rows())}
    assert set(found) == {3, 16}
    for bits, height in ((3, 0.2), (16, 0.1)):
        item = found[bits]
        assert item.loss is not None
        assert item.shift is not None
        assert item.loss.value == pytest.approx(height, abs=1e-6)
        assert item.shift.value == pytest.approx(height / 0.3, abs=0.02)
        # All rows share their windows' noise, so it cancels in differences.
        assert item.loss.high - item.loss.low < 1e-6


def test_intervals_grow_with_noise_that_rows_do_not_share() -> None:
    rows = parallel_rows()
    noisy = [
        row.model_copy(
            update={
                "window_nll": tuple(
                    np.array(row.window_nll) + TOKENS * np.random.default_rng(i).normal(0, 0.3, WINDOWS)
                )
            }
        )
        for i, row in enumerate(rows)
    ]
    item = fit.offsets(noisy)[0]
    assert item.loss is not None
    assert item.loss.low < item.loss.value < item.loss.high
    assert 0.02 < item.loss.high - item.loss.low < 0.5


def test_a_model_that_one_precision_lacks_bends_no_curve() -> None:
    odd = make_row("odd", 3 * 10**5, 4, 9.0)  # far off the others' line, and measured at 4 bits alone
    with_odd = {item.bits: item for item in fit.offsets([*parallel_rows(), odd])}
    assert with_odd[3] == {item.bits: item for item in fit.offsets(parallel_rows())}[3]


def test_curves_that_do_not_overlap_have_no_offset() -> None:
    rows = [make_row("a", 10**3, 4, 3.0), make_row("b", 2 * 10**3, 4, 2.9), make_row("c", 10**9, 3, 2.0)]
    found = fit.offsets(rows)
    assert [(item.loss, item.shift) for item in found] == [(None, None)]
    assert fit.offsets([row for row in rows if fit.bits_of(row) == 3]) == []


def test_a_power_law_is_found_where_there_is_one() -> None:
    rows = [
        make_row(f"m{size}", size, bits, 1.0 + 40.0 * size**-0.3 * bits**-1.5)
        for size in (10**5, 10**6, 10**7, 10**8)
        for bits in (3, 4, 6, 8)
    ]
    law = fit.power_law(rows)
    assert law is not None
    assert (law.floor, law.alpha, law.beta) == pytest.approx((1.0, 0.3, 1.5), rel=0.02)
    assert law.rms < 1e-4
    assert law.interpolation_rms is not None
    assert law.interpolation_rms > law.rms
    assert fit.power_law(rows[:5]) is None


def test_the_front_holds_what_nothing_smaller_beats() -> None:
    rows = [
        make_row("a", 100, 4, 3.0),
        make_row("a", 100, 8, 2.0),
        make_row("b", 100, 6, 3.5),
        make_row("b", 300, 8, 2.0),
    ]
    assert [(row.model_bits, row.nll) for row in fit.front(rows)] == [(400, 3.0), (800, 2.0)]


def test_advice_is_the_best_that_fits_and_says_when_it_is_not_alone() -> None:
    rows = [make_row("models/a", 10**6, 4, 2.0, dtype="nf"), make_row("models/b", 2 * 10**6, 3, 2.5)]
    advice = fit.advise(rows, 8e6)
    assert advice is not None
    assert advice.sentence == "for 1 MB of memory, use a at 4 bits (nf, block 64): perplexity 7.389 in 500 kB"
    assert advice.doubt == ""
    assert fit.advise(rows, 10) is None
    even = fit.advise([rows[0], make_row("models/b", 10**6, 3, 2.0)], 8e6)
    assert even is not None
    assert "not distinguishable" in even.doubt


def test_rows_on_other_texts_are_not_compared() -> None:
    row = make_row("a", 100, 4, 3.0)
    other = row.model_copy(update={"text_sha256": "def"})
    failed = row.model_copy(update={"status": "failed", "nll": None})
    assert sorted(len(members) for members in fit.groups([row, other, failed]).values()) == [1, 1]


def test_rows_that_differ_in_their_tasks_alone_count_once() -> None:
    plain = make_row("a", 100, 4, 3.0)
    evaluation = plain.run.evaluation.model_copy(update={"tasks": ("cloze.yaml",), "limit": 8})
    run = plain.run.model_copy(update={"evaluation": evaluation})
    asked = plain.model_copy(update={"run": run, "key": run_key(run), "accuracies": {"cloze": 0.5}})
    other = make_row("a", 100, 3, 3.5)
    (found,) = fit.groups([plain, asked, other]).values()
    assert found == [asked, other]
    assert list(fit.groups([asked, plain]).values()) == [[asked]]


def test_slices_share_everything_but_model_and_bits() -> None:
    rows = [
        make_row(model, 100, bits, 3.0, dtype=dtype)
        for model in "ab"
        for bits in (3, 4, 5)
        for dtype in ("int", "nf")
    ]
    rows += [make_row("a", 100, 3, 3.0, block=32), make_row("a", 100, 16, 2.0)]
    found = fit.slices(rows)
    assert {str(part): len(members) for part, members in found.items()} == {
        "int, block 64": 7,
        "nf, block 64": 7,
    }


def test_correlation_of_loss_and_accuracy() -> None:
    rows = [
        make_row("a", 100, bits, bits / 10).model_copy(update={"accuracies": {"t": 1 - bits / 20}})
        for bits in (3, 4, 5)
    ]
    found = fit.correlation(rows, "t")
    assert found is not None
    assert found == (pytest.approx(-1), 3)
    assert fit.correlation(rows, "other") is None


def test_the_report_never_imports_torch() -> None:
    code = "import sys, fracbit.report.page, fracbit.report.fit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
