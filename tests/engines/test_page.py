"""The table of docs/engines.md is that of bench/results/engines.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def row_of(case: dict[str, Any]) -> str:
    """A proof as a line of the table."""
    found, layers = case["difference"] or {}, case["layers"]
    cells = [
        f"{case['engine']} {next(iter(case['versions'].values()))}",
        f"{case['format']} `{case['scheme']}`",
        f"{layers - len(case['unequal'])} of {layers}" if layers else "-",
        *(number(found.get(name), small) for name, small in (("mean", 5e-5), ("kl", 1))),
        "-" if found.get("greedy") is None else f"{100 * found['greedy']:.0f} %",
    ]
    return f"| {' | '.join(cells)} |"


def number(value: float | None, small: float) -> str:
    """A difference, in powers of ten below `small`."""
    if value is None:
        return "-"
    return "0" if value == 0 else f"{value:.1e}" if value < small else f"{value:.4f}"


def test_every_proof_is_on_the_page_and_nothing_else() -> None:
    cases = json.loads((ROOT / "bench" / "results" / "engines.json").read_text())["rows"]
    wanted = [row_of(case) for case in cases if "refused" not in case]
    page = (ROOT / "docs" / "engines.md").read_text().splitlines()
    start = (
        page.index("| engine | export | layers decoded equal | difference | KL, nats | greedy tokens |") + 2
    )
    found = page[start : page.index("", start)]
    assert found == wanted
    assert len(wanted) >= 18
    assert any("refused" in case for case in cases)
