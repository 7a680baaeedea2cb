"""Every table of docs/calibrated.md from the JSON files that measure.py wrote: a fraction of a second.

python bench/calibrated/report.py [FOLDER]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from frame import RESULTS, Row, table


def gap(row: Row) -> str:
    return f"{row['gap']:.4f}"


def split(rows: list[Row], names: tuple[str, ...], by: str) -> dict[tuple, dict[str, Row]]:
    """Rows that agree in `names`, each found by its `by`."""
    found: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), {})[row[by]] = row
    return found


def tweak(rows: list[Row]) -> None:
    own = [row for row in rows if "recovered" in row]
    lines = []
    for (model, scheme, fill), arms in split(own, ("model", "scheme", "quantizer"), "tweak").items():
        cells = [f"{100 * arms[how]['recovered']:.0f} %" for how in ("adam", "closed", "auto")]
        lines.append([model, f"{scheme} {fill}", gap(arms["none"]), *cells])
    table("model | run | gap, nats | adam | closed | auto", lines)
    lines = []
    for row in own:
        if row["drift"] and row["quantizer"] == "gptq" and row["tweak"] != "closed":
            drift = ", ".join(f"{value:.3f}" for value in row["drift"])
            lines.append([row["model"], row["scheme"], row["tweak"], drift])
    table("model | run | tweak | drift of channel means after each block, in std", lines)
    chained = [row for row in rows if "recovered" not in row]
    table("chain | tweak | gap", [[row["chain"], row["tweak"], gap(row)] for row in chained])


def axis(rows: list[Row]) -> None:
    lines = []
    models = list(dict.fromkeys(row["model"] for row in rows))
    bits = [row | {"bits": row["scheme"].partition("/")[0]} for row in rows]
    for (model, quantizer, width), arms in split(bits, ("model", "quantizer", "bits"), "choice").items():
        order = ("in", "out", "ada by nearest", "ada by own loss", "predicted")
        chosen = arms.get("ada by own loss", arms["ada by nearest"])
        cells = [gap(arms[name]) if name in arms else "" for name in order]
        lines.append([model, f"{width} {quantizer}", *cells, chosen["out"]])
    table("model | run | in | out | ada, by nearest | ada, by own loss | predicted | linears on out", lines)
    kinds: dict[str, dict[str, int]] = {}
    for row in (row for row in rows if row["choice"] in ("ada by nearest", "ada by own loss")):
        for kind, count in row["out_by_kind"].items():
            counts = kinds.setdefault(kind, {})
            counts[row["model"]] = counts.get(row["model"], 0) + count
    table(["kind", *models], [[kind, *counts.values()] for kind, counts in kinds.items()])


def predictor(rows: list[Row]) -> None:
    head = "model | bits | trial by | linears | out wins | prediction right"
    names = ("model", "bits", "by", "linears", "out")
    table(head, ([*(r[n] for n in names), f"{r['right']} ({r['right'] / r['linears']:.0%})"] for r in rows))
    for how in ("nearest", "gptq"):
        some = [row for row in rows if row["by"] == how]
        right, total = sum(row["right"] for row in some), sum(row["linears"] for row in some)
        always = sum(max(row["out"], row["linears"] - row["out"]) for row in some)
        print(
            f"by {how}: {right} of {total} ({right / total:.0%}), the better constant {always / total:.0%}\n"
        )


def text(rows: list[Row]) -> None:
    lines = [[model, f"{scheme} gptq, tweak {how}", *(gap(arms[name]) for name in ("real", "generated", "random ids"))]
             for (model, scheme, how), arms in split(rows, ("model", "scheme", "tweak"), "calibration").items()]  # fmt: skip
    table("model | run | real text | self-generated | random ids", lines)


def planted(rows: list[Row]) -> None:
    models = list(dict.fromkeys(row["model"] for row in rows))
    weights = split([row for row in rows if "inputs" not in row], ("quantizer", "arm"), "model")
    lines = [[f"int3z {fill}, {arm}", *(gap(own[name]) for name in models)]
             for (fill, arm), own in weights.items()]  # fmt: skip
    table(["3-bit weights", *models], lines)
    both = [row | {"done": " + ".join(row["transforms"]) or "nothing"} for row in rows if "inputs" in row]
    lines = [[*run, *(gap(arms[name]) for name in models)]
             for run, arms in split(both, ("arm", "inputs", "done"), "model").items()]  # fmt: skip
    table(["weights", "activations", "rewrites", *models], lines)


def tables(rows: list[Row]) -> None:
    lines = ([r["model"], r["scheme"], r["quantizer"], f"{r['bits']:.3f}", gap(r)] for r in rows)
    table("model | scheme | quantizer | bits | gap", lines)


def columns(rows: list[Row]) -> None:
    lines = ([r["model"], r["scheme"], f"{r.get('outliers', 0):.0%}", f"{r['bits']:.3f}", gap(r)]
             for r in rows)  # fmt: skip
    table("model | scheme | columns in 16 bits | bits | gap", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS)
    folder = parser.parse_args().folder
    for show in (tweak, axis, predictor, text, planted, tables, columns):
        path = folder / f"calibrated-{show.__name__}.json"
        if path.is_file():
            found = json.loads(path.read_text())
            machine = found.get("machine", {"instruction_set": "not recorded"})  # older files do not say
            print(f"## {show.__name__}: {found['seconds']} s, instruction set {machine['instruction_set']}\n")
            show(found["rows"])


if __name__ == "__main__":
    main()
