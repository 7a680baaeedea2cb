"""The tables of docs/calibrated.md from what measure.py wrote: python bench/calibrated/report.py [FOLDER]."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    print()


def gap(row: Row) -> str:
    return f"{row['gap']:.4f}"


def distinct(rows: list[Row], *names: str) -> list[tuple[Any, ...]]:
    return list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))


def tweak(rows: list[Row]) -> None:
    chained = [row for row in rows if "recovered" not in row]
    rows = [row for row in rows if "recovered" in row]
    lines = []
    for model, scheme, fill in distinct(rows, "model", "scheme", "quantizer"):
        arms = {
            r["tweak"]: r for r in rows if (r["model"], r["scheme"], r["quantizer"]) == (model, scheme, fill)
        }
        cells = [f"{100 * arms[how]['recovered']:.0f} %" for how in ("adam", "closed", "auto")]
        lines.append([model, f"{scheme} {fill}", gap(arms["none"]), *cells])
    table(["model", "run", "gap, nats", "adam", "closed", "auto"], lines)
    lines = []
    for row in rows:
        if row["drift"] and row["quantizer"] == "gptq" and row["tweak"] in ("none", "adam", "auto"):
            drifts = ", ".join(f"{value:.3f}" for value in row["drift"])
            lines.append([row["model"], row["scheme"], row["tweak"], drifts])
    table(["model", "run", "tweak", "drift of channel means after each block, in std"], lines)
    table(["chain", "tweak", "gap"], [[row["chain"], row["tweak"], gap(row)] for row in chained])


def axis(rows: list[Row]) -> None:
    lines = []
    for model, quantizer in distinct(rows, "model", "quantizer"):
        for bits in ("int3z", "int4z"):
            some = [
                r for r in rows
                if (r["model"], r["quantizer"]) == (model, quantizer) and r["scheme"].startswith(bits)
            ]  # fmt: skip
            arms = {r["choice"]: r for r in some}
            order = ("in", "out", "ada by nearest", "ada by own loss", "predicted")
            chosen = arms.get("ada by own loss", arms["ada by nearest"])
            cells = [gap(arms[name]) if name in arms else "" for name in order]
            lines.append([model, f"{bits} {quantizer}", *cells, chosen["out"]])
    table(
        ["model", "run", "in", "out", "ada, by nearest", "ada, by own loss", "predicted", "linears on out"],
        lines,
    )
    kinds: dict[str, dict[str, int]] = {}
    for row in rows:
        if row["choice"] in ("ada by nearest", "ada by own loss"):
            for kind, count in row["out_by_kind"].items():
                kinds.setdefault(kind, {}).setdefault(row["model"], 0)
                kinds[kind][row["model"]] += count
    table(
        ["kind", *(name for (name,) in distinct(rows, "model"))],
        [[kind, *counts.values()] for kind, counts in kinds.items()],
    )


def predictor(rows: list[Row]) -> None:
    table(
        ["model", "bits", "trial by", "linears", "out wins", "prediction right"],
        [
            [
                r["model"],
                r["bits"],
                r["by"],
                r["linears"],
                r["out"],
                f"{r['right']} ({r['right'] / r['linears']:.0%})",
            ]
            for r in rows
        ],
    )
    for how in ("nearest", "gptq"):
        some = [row for row in rows if row["by"] == how]
        right, total = sum(row["right"] for row in some), sum(row["linears"] for row in some)
        always = sum(max(row["out"], row["linears"] - row["out"]) for row in some)
        print(
            f"by {how}: {right} of {total} ({right / total:.0%}); the better constant {always / total:.0%}\n"
        )


def text(rows: list[Row]) -> None:
    lines = []
    for model, scheme, how in distinct(rows, "model", "scheme", "tweak"):
        arms = {
            r["calibration"]: r for r in rows if (r["model"], r["scheme"], r["tweak"]) == (model, scheme, how)
        }
        lines.append(
            [
                model,
                f"{scheme} gptq, tweak {how}",
                *(gap(arms[n]) for n in ("real", "generated", "random ids")),
            ]
        )
    table(["model", "run", "real text", "self-generated", "random ids"], lines)


def planted(rows: list[Row]) -> None:
    weights = [row for row in rows if "inputs" not in row]
    models = [name for (name,) in distinct(rows, "model")]
    lines = []
    for fill, arm in distinct(weights, "quantizer", "arm"):
        arms = {r["model"]: r for r in weights if (r["quantizer"], r["arm"]) == (fill, arm)}
        lines.append([f"int3z {fill}, {arm}", *(gap(arms[name]) for name in models)])
    table(["3-bit weights", *models], lines)
    both = [row | {"done": " + ".join(row["transforms"]) or "nothing"} for row in rows if "inputs" in row]
    lines = []
    for arm, inputs, done in distinct(both, "arm", "inputs", "done"):
        arms = {r["model"]: r for r in both if (r["arm"], r["inputs"], r["done"]) == (arm, inputs, done)}
        lines.append([arm, inputs, done, *(gap(arms[name]) for name in models)])
    table(["weights", "activations", "rewrites", *models], lines)


def tables(rows: list[Row]) -> None:
    table(
        ["model", "scheme", "quantizer", "bits", "gap"],
        [[r["model"], r["scheme"], r["quantizer"], f"{r['bits']:.3f}", gap(r)] for r in rows],
    )


def columns(rows: list[Row]) -> None:
    table(
        ["model", "scheme", "columns in 16 bits", "bits", "gap"],
        [[r["model"], r["scheme"], f"{r.get('outliers', 0):.0%}", f"{r['bits']:.3f}", gap(r)] for r in rows],
    )


PARTS: dict[str, Callable[[list[Row]], None]] = {
    "tweak": tweak, "axis": axis, "predictor": predictor, "text": text, "planted": planted, "tables": tables,
    "columns": columns,
}  # fmt: skip


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("bench/results")
    for part, show in PARTS.items():
        path = folder / f"calibrated-{part}.json"
        if path.is_file():
            found = json.loads(path.read_text())
            print(f"## {part}: {found['seconds']} s\n")
            show(found["rows"])


if __name__ == "__main__":
    main()
