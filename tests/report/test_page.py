"""The page: complete in itself, drawn without an error in a browser, light and dark, on a desk and on a phone."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomllib

from fracbit.errors import DataError, OutputError
from fracbit.records.calibration import Calibration
from fracbit.records.recipe import Recipe, make_recipe
from fracbit.records.row import KEEP_ALL, Evaluation, Row, Run, run_key
from fracbit.records.scheme import Scheme
from fracbit.report.command import command_of, recipe_of
from fracbit.report.page import page, short_names, write_page

TEXT = Evaluation(text="ids.u16?length=32", window=16)


def make_row(model: str, size: int, bits: int, dtype: str = "int", **fields: object) -> Row:
    scheme = Scheme(dtype, bits, 32) if bits < 16 else Scheme()
    recipe = Recipe(model=model, scheme=scheme, overrides=() if bits < 16 else (KEEP_ALL,), **fields)  # type: ignore[arg-type]
    run = Run(recipe=recipe, evaluation=TEXT)
    nll = 4 - 0.2 * math.log10(size) + (0.4 if dtype == "int" else 0.3) * 2.0 ** (3 - bits)
    return Row(
        key=run_key(run), run=run, status="done", family="llama", parameters=size, weights=size if bits < 16 else 0,
        stored_bits=size * bits if bits < 16 else 0, model_bits=size * bits, nll=nll, perplexity=math.exp(nll),
        divergence=0.1, agreement=0.9, window_nll=(10 * nll, 11 * nll), window_tokens=(10, 11), text_sha256="abc",
        accuracies={"cloze": 1 / nll}, seconds=1.5, device="cpu", notes=("</script><b>bold",),
    )  # fmt: skip


def with_tables(row: Row) -> Row:
    """The row of a run whose embeddings and head are quantized too, and that is asked questions."""
    head = Scheme("int", 8, "row", scale=Scheme("int", 8, 256))
    recipe = row.run.recipe.model_copy(
        update={"embeddings": Scheme("nf", 4), "head": head, "trust_remote_code": True}
    )
    asked = row.run.evaluation.model_copy(update={"tasks": ("piqa", "a.yaml"), "limit": 7})
    run = row.run.model_copy(update={"recipe": recipe, "evaluation": asked})
    return row.model_copy(update={"run": run, "key": run_key(run)})


def study_rows() -> list[Row]:
    rows = [
        make_row(f"models/m{size}", size, bits, dtype)
        for size in (10**5, 10**6, 10**7)
        for bits, dtypes in ((2, ("int", "nf")), (3, ("int", "nf")), (4, ("int", "nf")), (16, ("int",)))
        for dtype in dtypes
    ]
    failed = Row(
        key="f",
        run=Run(recipe=Recipe(model="broken"), evaluation=TEXT),
        status="failed",
        error="no <such> model",
    )
    return [*rows, failed]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("plotly", reason="the page is an extra: fracbit[report]")
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(study_rows(), path, "A <study>")
    return path


def test_the_page_asks_for_nothing_from_outside(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    assert "Plotly" in text
    assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=[\"'](?:https?:)?//", text)
    assert "A &lt;study&gt;" in text
    assert "</script><b>" not in text
    assert not list(written.parent.glob("*.tmp"))


def test_texts_are_shown_without_their_folders() -> None:
    texts = [
        "/home/me/data/wiki.u16?length=512",
        "news.txt",
        "a/same.txt",
        "b/same.txt",
        "datasets:wikitext:raw/v1:test",
    ]
    assert list(short_names(texts).values()) == ["wiki.u16?length=512", *texts[1:]]
    assert short_names(["a/b/"]) == {"a/b/": "b"}


def data_of(rows: list[Row]) -> list[dict[str, Any]]:
    """The rows that the page holds."""
    pytest.importorskip("plotly", reason="the page is an extra: fracbit[report]")
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page(rows), re.DOTALL)
    assert found is not None
    return list(json.loads(found[1])["groups"][0]["rows"])


def test_the_filters_and_the_lines_of_types_mix_no_two_settings() -> None:
    plans = [{"transforms": ("smooth",)}, {"inputs": "int8/token"}, {"axis": "predicted"}, {"distill": 1}, {}]
    calibrated = [Calibration(texts=("c.u16",), **plan) for plan in plans]  # type: ignore[arg-type]
    made = [make_row("m", 10, 4, quantizer="gptq", calibration=plan) for plan in calibrated]
    plain = [make_row("m", 10, 4), make_row("m", 10, 4, embeddings=Scheme()), make_row("m", 10, 4, "nf")]
    rows = {row["key"]: row for row in data_of([*made, *plain])}
    assert len({row["kind"] for row in rows.values()}) == len(made) + 2, "int and nf are one kind"
    assert {rows[row.key]["line"] for row in made} == {""}
    assert [rows[row.key]["line"] for row in plain] == ["int", "int, embeddings int4/64", "nf"]


def test_a_store_without_finished_rows_is_an_error() -> None:
    with pytest.raises(DataError, match="1 failed"):
        page(study_rows()[-1:])


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="the page is an extra: fracbit[report]")
    with pytest.raises(OutputError, match="cannot be written"):
        write_page(study_rows(), tmp_path / "no" / "folder.html")


def test_commands_make_rows_again() -> None:
    row = make_row("m", 10, 4)
    asked = "fracbit eval OUT --text 'ids.u16?length=32' --window 16 --dtype float32"
    assert command_of(row) == f"fracbit quantize recipe.toml -o OUT && {asked}"
    assert command_of(make_row("a b", 10, 16)) == asked.replace("OUT", "'a b'")
    assert command_of(with_tables(row)).endswith(
        "fracbit eval OUT --trust-remote-code --text 'ids.u16?length=32' --window 16 --tasks piqa,a.yaml --limit 7 "
        "--dtype float32"
    )


CALIBRATED = Calibration(texts=("c.u16",), tweak="auto", transforms=("rotate", "awq"), inputs="int8/token")


@pytest.mark.parametrize(
    "row",
    [
        make_row("m", 10, 3, "nf"),
        make_row("m", 10, 3, quantizer="gptq", outliers="activation:0.02", calibration=CALIBRATED),
        make_row("m", 10, 3, outliers="proxy:2%", search=True, seed=3),
        make_row("m", 10, 16),
        with_tables(make_row("m", 10, 3)),
    ],
    ids=lambda row: str(row.run),
)
def test_the_recipe_of_a_row_is_read_back(row: Row) -> None:
    untrusted = row.run.recipe.model_copy(update={"trust_remote_code": False})  # which a file cannot ask for
    assert make_recipe(tomllib.loads(recipe_of(row))) == untrusted


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright from PyPI")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("the browser test needs Chromium (Debian: apt-get install chromium)")
    with sync.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height", "scheme"), [(1200, 900, "light"), (390, 844, "dark")])
def test_the_page_works_in_a_browser(
    written: Path, browser: Any, width: int, height: int, scheme: str
) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
    )
    context.set_default_timeout(120_000)
    tab = context.new_page()
    faults: list[str] = []
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    tab.goto(written.as_uri())
    tab.wait_for_selector("html[data-ready=yes]", state="attached")
    assert tab.evaluate("document.documentElement.dataset.theme") == scheme
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.locator(".plot .main-svg").count() >= 5
    assert "A <study>" in tab.locator("h1").inner_text()
    check_advice(tab)
    check_table_and_detail(tab)
    check_hover(tab)
    check_filters(tab)
    tab.click("#theme")
    assert tab.evaluate("document.documentElement.dataset.theme") != scheme
    assert "no <such> model" in tab.locator("#failed").inner_text()
    assert faults == []
    context.close()


def check_advice(tab: Any) -> None:
    tab.evaluate(
        "const b = document.getElementById('budget'); b.value = b.max; b.dispatchEvent(new Event('input'))"
    )
    assert re.match(r"For .* of memory, use m10000000 ", tab.locator("#sentence").inner_text())


def check_table_and_detail(tab: Any) -> None:
    tab.fill("#search", "m10000000 nf")
    assert tab.locator("#table tbody tr").count() == 3
    tab.click("#table th:nth-child(2) button")
    bits = [int(text) for text in tab.locator("#table tbody td:nth-child(2)").all_inner_texts()]
    assert bits == sorted(bits)
    tab.click("#table tbody tr:first-child")
    assert "fracbit quantize recipe.toml" in tab.locator("#detail-command").inner_text()
    recipe = tomllib.loads(tab.locator("#detail-recipe").inner_text())
    assert (recipe["model"], recipe["scheme"]["dtype"]) == ("models/m10000000", "nf")
    assert "</script><b>bold" in tab.locator("#detail-figures").inner_text()
    tab.click("#detail form button")
    tab.fill("#search", "")


def check_hover(tab: Any) -> None:
    point = tab.locator("#pareto .points path.point").first
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    place = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tab.mouse.move(*place)
    label = tab.wait_for_selector("#pareto .hoverlayer .hovertext").text_content()
    assert re.search(r"m\d+ (int|nf)2/32.*bits/weight.*perplexity", label)
    tab.mouse.click(*place)
    assert tomllib.loads(tab.locator("#detail-recipe").inner_text())["scheme"]["bits"] == 2
    tab.click("#detail form button")


def check_filters(tab: Any) -> None:
    points = "document.getElementById('pareto').data.filter((t) => t.mode === 'markers').reduce((n, t) => n + t.x.length, 0)"
    assert tab.evaluate(points) == 21
    tab.click("#filters details:nth-child(2) summary")
    tab.click("#filters input[data-field='dtype'][data-value='nf']")
    assert tab.evaluate(points) == 12
