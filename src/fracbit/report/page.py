"""The report: makes one HTML page from rows. It opens offline on a desktop or a phone, in light or dark mode.

The page contains the plotting library, the rows and the fits. page.js draws them, and page.css has the styles.
"""

from __future__ import annotations

import html
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from fracbit.errors import DataError, OutputError
from fracbit.records.extras import check_extra
from fracbit.records.files import named_path
from fracbit.records.row import Row, label
from fracbit.report import fit
from fracbit.report.command import command_of, recipe_of
from fracbit.report.slices import Slice, named, slice_of

BUDGETS = 24
SLICES_WITH_OFFSETS = 60


def write_page(rows: Sequence[Row], path: Path, title: str = "Bits and loss") -> None:
    """Write the page. Raises `DataError` when there is nothing to show, `OutputError` when it cannot be written."""
    text = page(rows, title)
    path = named_path(path, OutputError)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(
            f"report {path} cannot be written: {error.strerror}; name another place with -o"
        ) from error


def page(rows: Sequence[Row], title: str = "Bits and loss") -> str:
    """The page as text. Raises `DataError` when no row is finished, `OutputError` without plotly."""
    comparable = fit.groups(rows)
    if not comparable:
        raise DataError(
            f"the store has no finished row ({len(rows)} failed): run `fracbit sweep` on it first"
        )
    ordered = sorted(comparable.values(), key=len, reverse=True)
    shown = short_names(members[0].run.evaluation.text for members in ordered)
    data = {
        "title": title,
        "groups": [_group(members, shown[members[0].run.evaluation.text]) for members in ordered],
        "failed": [{"label": label(row.run), "error": row.error} for row in rows if row.status == "failed"],
    }
    resources = files("fracbit.report")
    parts = {
        "title": html.escape(title),
        "css": resources.joinpath("page.css").read_text(encoding="utf-8"),
        "plotly": _plotly(),
        "js": resources.joinpath("page.js").read_text(encoding="utf-8"),
        "data": json.dumps(data, allow_nan=False).replace(
            "<", "\\u003c"
        ),  # no tag or comment begins inside a script
    }
    text = resources.joinpath("page.html").read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"<!--{name}-->", part)
    return text


def _plotly() -> str:
    check_extra("a report", "plotly", "report", OutputError)
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def short_names(texts: Iterable[str]) -> dict[str, str]:
    """Texts with their folders left out, where that leaves them different."""
    short = {text: _without_folder(text) for text in texts}
    taken = Counter(short.values())
    return {text: name if taken[name] == 1 else text for text, name in short.items()}


def _without_folder(text: str) -> str:
    place, mark, options = text.partition("?")
    return (
        place.rstrip("/").rpartition("/")[2] + mark + options if not place.startswith("datasets:") else text
    )


def _group(rows: Sequence[Row], shown: str) -> dict[str, Any]:
    """Rows on one text, which is `shown` so, with everything that is computed from them."""
    best = {row.key for row in fit.front(rows)}
    curves = fit.slices(rows)
    names = named(curves)
    tasks = sorted({task for row in rows for task in row.accuracies})
    return {
        "text": shown,
        "tokens": sum(rows[0].window_tokens),
        "rows": [_row(row, row.key in best) for row in rows],
        "slices": [
            _slice(names[part], members, index) for index, (part, members) in enumerate(curves.items())
        ],
        "advice": _advice(rows),
        "tasks": [{"task": task, "pearson": fit.correlation(rows, task)} for task in tasks],
    }


def _row(row: Row, on_front: bool) -> dict[str, Any]:
    part = slice_of(row) if row.run.quantized else None
    scheme = row.run.recipe.scheme
    return {
        "key": row.key,
        "label": label(row.run),
        "model": row.run.recipe.model,
        "dtype": part.dtype if part else "float16",
        "bits": fit.bits_of(row),
        "block": str(scheme.block) if part else "",
        "kind": _kind(part),
        "line": ", ".join([part.dtype, *part.words()]) if part and part.plain else "",
        "parameters": row.parameters,
        "megabytes": row.model_bits / 8e6,
        "modelBits": row.model_bits,
        "perWeight": row.bits_per_weight,
        "perParameter": row.bits_per_parameter,
        "nll": row.nll,
        "perplexity": row.perplexity,
        "divergence": row.divergence,
        "agreement": row.agreement,
        "accuracies": row.accuracies,
        "seconds": row.seconds,
        "device": row.device,
        "notes": list(row.notes),
        "front": on_front,
        "command": command_of(row),
        "recipe": recipe_of(row),
    }


def _kind(part: Slice | None) -> str:
    """How a row differs from round-to-nearest, for the filters."""
    return "float" if part is None else ", ".join(part.words()) or "round to nearest"


def _slice(name: str, rows: Sequence[Row], index: int) -> dict[str, Any]:
    law = fit.power_law(rows)
    found = fit.offsets(rows) if index < SLICES_WITH_OFFSETS else []
    return {
        "name": name,
        "keys": [row.key for row in rows],
        "offsets": [
            {
                "bits": item.bits,
                "reference": item.reference,
                "loss": _interval(item.loss),
                "shift": _interval(item.shift),
            }
            for item in found
        ],
        "law": None if law is None else {name: _number(getattr(law, name)) for name in vars(law)},
    }


def _interval(interval: fit.Interval | None) -> list[float | None] | None:
    return (
        None if interval is None else [_number(interval.value), _number(interval.low), _number(interval.high)]
    )


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _advice(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A recommendation at each size of the front, thinned to fewer than twice `BUDGETS`."""
    best = fit.front(rows)
    step = max(1, len(best) // BUDGETS)
    chosen = [*best[::-1][::step]][::-1]
    found = [fit.advise(rows, row.model_bits) for row in chosen]
    return [
        {"bits": item.budget_bits, "key": item.row.key, "sentence": item.sentence, "doubt": item.doubt}
        for item in found
        if item is not None
    ]
