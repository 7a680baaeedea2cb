"""The pictures of docs/scaling.md: parts of the report's page, as Chromium draws them.

    fracbit report docs/scaling/rows -o study.html
    python bench/sweep/pictures.py study.html docs/scaling

Needs Debian's chromium and Playwright from PyPI.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

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
    label = next((each for each in texts if each == text), None) or next(
        (each for each in texts if each.startswith(text)), None
    )
    if label is None:
        sys.exit(f"the page has no {text!r} among {texts}")
    tab.select_option(f"#{select}", label=label)


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("page", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        desk = browser.new_context(viewport={"width": 860, "height": 700}, color_scheme="light", offline=True)
        tab = opened(desk, arguments.page)
        for name, choices in CHOICES:
            if not tab.locator(f"#{name}").is_visible():
                continue
            for select, text in choices.items():
                choose(tab, select, text)
            tab.wait_for_timeout(300)
            tab.locator(f"#{name}").screenshot(path=arguments.folder / f"{name}.png")
        phone = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark", offline=True)
        opened(phone, arguments.page).screenshot(path=arguments.folder / "phone.png")
        browser.close()


def opened(context: Any, page: Path) -> Any:
    """A tab with the page, drawn."""
    tab = context.new_page()
    tab.set_default_timeout(120_000)
    tab.goto(page.resolve().as_uri())
    tab.wait_for_selector("html[data-ready=yes]", state="attached")
    return tab


if __name__ == "__main__":
    main()
