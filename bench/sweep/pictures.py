"""The pictures of docs/scaling.md (docs/scaling/*.png): parts of the report's page, as Chromium draws them.

    fracbit report docs/scaling/rows -o study.html
    python bench/sweep/pictures.py study.html docs/scaling

Needs Debian's chromium and Playwright from PyPI.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from frame import arguments

SLICE = "int, block 64, zero point"
CHOICES = (
    ("curves", {"curve-slice": SLICE}),
    ("offsets", {"curve-slice": SLICE}),
    ("types", {"type-model": "tales-xs", "type-bits": "4"}),
    ("pareto", {}),
    ("tasks", {"task": "continuation"}),
)


def choose(tab: Any, select: str, text: str) -> None:
    """Choose an option by its text, or by its beginning."""
    texts = tab.locator(f"#{select} option").all_inner_texts()
    labels = [each for each in texts if each == text] + [each for each in texts if each.startswith(text)]
    if not labels:
        sys.exit(f"the page has no {text!r} among {texts}")
    tab.select_option(f"#{select}", label=labels[0])


def draw(page: Path, folder: Path) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        desk = browser.new_context(viewport={"width": 860, "height": 700}, color_scheme="light", offline=True)
        tab = opened(desk, page)
        for name, choices in CHOICES:
            if not tab.locator(f"#{name}").is_visible():
                continue
            for select, text in choices.items():
                choose(tab, select, text)
            tab.wait_for_timeout(300)
            tab.locator(f"#{name}").screenshot(path=folder / f"{name}.png")
        phone = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark", offline=True)
        opened(phone, page).screenshot(path=folder / "phone.png")
        browser.close()


def opened(context: Any, page: Path) -> Any:
    """A tab with the page, drawn."""
    tab = context.new_page()
    tab.set_default_timeout(120_000)
    tab.goto(page.resolve().as_uri())
    tab.wait_for_selector("html[data-ready=yes]", state="attached")
    return tab


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    draw(given.page, given.folder)


if __name__ == "__main__":
    main()
