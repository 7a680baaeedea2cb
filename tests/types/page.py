"""docs/models.md from the rows of a survey: a row for every type, what became smaller, what did not and why."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

Row = dict[str, Any]

TITLES = {
    "causal": "Causal language models",
    "image": "Models that read images and text",
    "multimodal": "Other models of several inputs",
}
KINDS = {
    "router": ("routers", "they choose experts"),
    "convolution": ("convolutions", "not linear"),
    "table of rows": ("tables", "rows are looked up"),
}
WHY = {"one output": "one output", "part": "rows that are never read"}
PLACE = re.compile(r"blocks \([^)]*\) at '([^']+)'")
FLOAT = re.compile(r"Float \(([^)]+)\): (.+?)\.(?= |$)")
"""What fracbit notes of a model outside its table of families: where its blocks are, and which linears stay float."""
INTRO = """\
# Which models work

`make coverage` writes this page. It takes every type of transformers {version} that AutoModelForCausalLM,
AutoModelForImageTextToText or AutoModelForMultimodalLM knows, and makes a tiny model of it with random weights and every kind
of layer that the type has by default. fracbit rounds it to {scheme}. Plain transformers loads the result, and its logits must
be those of the float model that has the decoded weights (to {tolerance:.0e} of the largest logit). It must also generate the
same tokens with and without a cache. Then GPTQ runs on a few tokens, and its result is compared in the same way. Inputs are
ids alone, except where a row says more.

{counts}

- **share**: of the weights of all matrices in the blocks that read text, how many become smaller. It is that of the type's
  default config at full size, or with a `*` that of the tiny model, in which routers and convolutions are a larger part.
- **stays float**: the other matrices, and why.
- **rounding**, **GPTQ**: `yes`, or what happens instead. `refused` is an error that says what is wrong, `error` another.
"""


def page(rows: Iterable[Row], version: str, scheme: str, tolerance: float) -> str:
    """The page as Markdown."""
    rows = list(rows)
    able = [row for row in rows if not row["float"]]
    parts = [INTRO.format(version=version, scheme=scheme, tolerance=tolerance, counts=_counts(rows, able))]
    for table, title in TITLES.items():
        mine = sorted(
            (row for row in able if row["kind"].startswith(f"{table}:")), key=lambda row: row["kind"]
        )
        parts.append(
            _table(title, ("type", "class", "share", "stays float", "rounding", "GPTQ"), map(_cells, mine))
        )
    parts.append(
        _table(
            "Types that are not tested",
            ("type", "transformers itself says"),
            (
                (f"`{row['kind']}`", _text(row["float"]))
                for row in sorted(rows, key=lambda row: row["kind"])
                if row["float"]
            ),
        )
    )
    return "\n".join(parts)


def _counts(rows: list[Row], able: list[Row]) -> str:
    beside = [row for row in able if row.get("needs") and row.get("gptq", {}).get("verdict") == "ok"]
    rounded, tuned = _right("rtn", able), _right("gptq", able)
    return textwrap.fill(
        f"Of {len(rows)} types, transformers builds, saves, loads and runs {len(able)}. Rounding is right for {rounded} "
        f"of them ({_percent(rounded, able)}), GPTQ for {tuned} ({_percent(tuned, able)}). {len(beside)} of these cannot be "
        "run on text alone: the text goes through the language model within them, and what it does not reach is rounded to "
        "nearest.",
        width=125,
    )


def _percent(count: int, rows: list[Row]) -> str:
    return f"{100 * count / max(1, len(rows)):.1f} %"


def _right(step: str, rows: list[Row]) -> int:
    return sum(row.get(step, {}).get("verdict") == "ok" for row in rows)


def _cells(row: Row) -> tuple[str, ...]:
    needs = f"; runs with {', '.join(f'`{name}`' for name in row['needs'])}" if row.get("needs") else ""
    went = row["rtn"]["verdict"] == "ok"
    share, star = (row.get("share", 0.0), "*") if row.get("full_share") is None else (row["full_share"], "")
    return (
        f"`{row['kind'].partition(':')[2]}`",
        f"{row.get('model', '')}{needs}",
        f"{100 * share:.1f} %{star}" if went else "",
        _stays(row) if went else "",
        _verdicts(row),
        _verdict(row.get("gptq", {})),
    )


def _verdicts(row: Row) -> str:
    """Of rounding: the first step that did not go right."""
    steps: Mapping[str, str] = {"rtn": "", "cached": "", "uncached": "", "causal": "as a text model: "}
    for step, what in steps.items():
        found = row.get(step, {"verdict": "none"})
        if found["verdict"] not in ("ok", "none", "float cannot"):
            return what + _verdict(found)
    return "yes"


def _verdict(found: Mapping[str, str]) -> str:
    verdict, said = found.get("verdict", "none"), found.get("said", "")
    return "yes" if verdict == "ok" else f"{verdict}: {_text(said)}" if said else verdict


def _stays(row: Row) -> str:
    """What stayed float, by name, and why."""
    notes = " ".join(row["notes"])
    said = {name: why for why, names in FLOAT.findall(notes) for name in names.split(", ")}
    place = PLACE.search(notes)
    held: dict[str, dict[str, None]] = {}
    for name, _, what in row["left"]:
        module = name.removesuffix(".weight")
        why = next((why for inner, why in said.items() if module.endswith(f".{inner}")), WHY.get(what))
        short = ".".join(part for part in module.split(".")[-2:] if not part.isdigit())
        if why is None and what in KINDS:
            shown, why = KINDS[what]
        else:
            shown = f"`{short}`"
        if why is None and (what == "linear" or what.startswith("experts")):
            elsewhere = place is not None and not name.startswith(f"{place[1]}.")
            why = "in other blocks" if elsewhere else "not found"
        held.setdefault(why or "not linear", {})[shown] = None
    return "; ".join(f"{', '.join(names)} ({why})" for why, names in held.items())


def _table(title: str, heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"## {title}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)]) + "\n"


def _text(said: str) -> str:
    """A message as the cell of a table: on one line, without what Markdown reads as markup."""
    short = said if len(said) < 200 else f"{said[:200].rpartition(' ')[0]} ..."
    return re.sub(r"([|<>*_`\[\]])", r"\\\1", short)
