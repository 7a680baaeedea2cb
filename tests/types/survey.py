"""Every type that transformers can name, or some, through `check`: `python tests/types/survey.py [--types a b c] [--json out]`.

Types are checked in other processes, so that one that crashes or hangs does not lose the rest. `--page docs/models.md` writes
the tables of what is quantized (`make coverage`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

TIMEOUT = 60
START = 60  # seconds a process may take to import torch and transformers
STEPS = ("rtn", "causal", "cached", "uncached", "gptq")
BAD = ("refused", "error", "WRONG")

Row = dict[str, Any]


# --- in other processes ----------------------------------------------------------------------------------------------


def worker(kinds: list[str]) -> None:
    """Check types one after the other; a line of JSON for each."""
    import warnings

    warnings.simplefilter("ignore")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    from check import check

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some models of transformers print
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(check(kind, Path(folder)).to_json()), file=answers, flush=True)


def checked(kinds: list[str]) -> Iterator[Row]:
    """A row for each type, in order; one that crashes or takes too long has only a reason."""
    left = list(kinds)
    while left:
        process = subprocess.Popen(
            [sys.executable, __file__, "--worker", *left],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        reason = ""
        try:
            for row in _rows(process):
                if "ready" not in row:
                    left.remove(row["kind"])
                    yield row
        except TimeoutError:
            reason = f"took more than {TIMEOUT} seconds"
        process.kill()
        code = process.wait()
        if left:
            yield {
                "kind": left.pop(0),
                "float": "",
                "rtn": _outcome("error", reason or f"ended its process with code {code}"),
            }


def _rows(process: subprocess.Popen[bytes]) -> Iterator[Row]:
    """Lines of JSON as they come. Raises `TimeoutError`."""
    assert process.stdout is not None
    waiting = selectors.DefaultSelector()
    waiting.register(process.stdout, selectors.EVENT_READ)
    held, limit = b"", START
    while True:
        if not waiting.select(limit):
            raise TimeoutError
        more = os.read(process.stdout.fileno(), 65536)
        if not more:
            return
        held += more
        *lines, held = held.split(b"\n")
        for line in lines:
            yield json.loads(line)
        limit = TIMEOUT


def _outcome(verdict: str, said: str) -> dict[str, str]:
    return {"verdict": verdict, "said": said}


# --- what came out ---------------------------------------------------------------------------------------------------


def summary(rows: Iterable[Row]) -> str:
    """Counts by table and step, then the failures by their message."""
    rows = list(rows)
    lines = []
    for table in ("causal", "image", "multimodal", ""):
        mine = [row for row in rows if row["kind"].startswith(table)]
        if not mine:
            continue
        able = [row for row in mine if not row["float"]]
        lines.append(
            f"{table or 'all'}: {len(mine)} types, {len(able)} that transformers builds, saves, loads and runs"
        )
        lines += [line for step in STEPS for line in _step_lines(step, able)]
        shares = sorted(_share(row) for row in able if row.get("rtn", {}).get("verdict") == "ok")
        if shares:
            below = [f"{limit}: {sum(share < limit for share in shares)}" for limit in (0.5, 0.9, 0.95, 0.98)]
            lines.append(
                f"  share of the blocks' matrices: median {shares[len(shares) // 2]:.3f}; below {', '.join(below)}"
            )
    lines += [
        "",
        *_groups("transformers itself cannot", [(row["float"], row) for row in rows if row["float"]]),
    ]
    for step in STEPS:
        for verdict in BAD:
            found = [
                (row[step]["said"], row)
                for row in rows
                if not row["float"] and row.get(step, {}).get("verdict") == verdict
            ]
            lines += _groups(f"{step} {verdict}", found)
    lines += _small_shares(rows)
    lines += _left(rows)
    return "\n".join(lines) + "\n"


def _step_lines(step: str, able: list[Row]) -> Iterator[str]:
    """How often a step went right, of all types and of those that read text alone."""
    of_text = [row for row in able if not row.get("needs")]
    for what, rows in (("", able), (" (of types that text alone runs)", of_text)):
        verdicts = [row.get(step, {}).get("verdict", "none") for row in rows]
        counted = sorted((verdict, verdicts.count(verdict)) for verdict in set(verdicts))
        asked = len(verdicts) - verdicts.count("none") - verdicts.count("float cannot")
        if asked and (not what or len(of_text) < len(able)):
            right = verdicts.count("ok")
            shown = ", ".join(f"{verdict} {count}" for verdict, count in counted)
            yield f"  {step:9} {100 * right / asked:5.1f} % right of {asked}: {shown}{what}"


def _groups(title: str, found: list[tuple[str, Row]]) -> list[str]:
    """Types with the same message together, the largest group first."""
    if not found:
        return []
    groups: dict[str, list[tuple[str, str]]] = {}
    for said, row in found:
        alike = re.sub(
            r"'[^']*'|\"[^\"]*\"|\b\d[\d.e+-]*\b|\b[A-Z]\w*(Config|Model|LM|Generation)\b", "_", said
        )[:90]
        groups.setdefault(alike, []).append((row["kind"], said))
    lines = [f"== {title}: {len(found)}"]
    for members in sorted(groups.values(), key=len, reverse=True):
        lines += [f"[{len(members)}] {members[0][1]}", f"     {' '.join(kind for kind, _ in members)}"]
    return [*lines, ""]


def _share(row: Row) -> float:
    """Of the blocks' matrices, at full size where it is known."""
    full: float | None = row.get("full_share")
    return float(row.get("share", 0.0)) if full is None else full


def _small_shares(rows: list[Row]) -> list[str]:
    """Types of which less than 98 % of the blocks' matrices became smaller, and the largest that did not."""
    lines = []
    for row in sorted(rows, key=_share):
        if row.get("rtn", {}).get("verdict") != "ok" or _share(row) >= 0.98:
            continue
        held: dict[str, int] = {}
        for name, count, what in row["left"]:
            alike = f"{re.sub(r'[.][0-9]+[.]', '.*.', name)} ({what})"
            held[alike] = held.get(alike, 0) + count
        largest = sorted(held.items(), key=lambda item: -item[1])[:4]
        lines.append(
            f"{_share(row):.3f} {row['kind']}: " + ", ".join(f"{name} {count}" for name, count in largest)
        )
    return ["== share below 0.98, and the largest matrices that stayed float", *lines, ""] if lines else []


def _left(rows: list[Row]) -> list[str]:
    """What stayed float where rounding went right, by what it is, with the types and their shares."""
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.get("rtn", {}).get("verdict") == "ok":
            for _, count, what in row["left"]:
                held = groups.setdefault(what, {})
                held[row["kind"]] = held.get(row["kind"], 0.0) + count
    if not groups:
        return []
    lines = ["== stayed float (weights of the tiny model)"]
    for what, held in sorted(groups.items(), key=lambda item: -len(item[1])):
        shown = " ".join(
            f"{kind}({int(count)})" for kind, count in sorted(held.items(), key=lambda item: -item[1])
        )
        lines += [f"[{len(held)}] {what}", f"     {shown[:1500]}"]
    return [*lines, ""]


def _write_page(rows: list[Row], path: Path) -> None:
    import transformers
    from check import SCHEME, TOLERANCE
    from page import page

    path.write_text(page(rows, transformers.__version__, str(SCHEME), TOLERANCE))


def main() -> None:
    """Read the command line, check, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", nargs="*", help="names as table:name, or only the name; all unless given")
    parser.add_argument("--tables", nargs="*", default=["causal", "image", "multimodal"])
    parser.add_argument("--json", type=Path, help="a line of JSON for each type")
    parser.add_argument("--summary", type=Path, help="the summary, written anew after every ten types")
    parser.add_argument("--page", type=Path, help="what docs/models.md says, written to this file")
    parser.add_argument("--worker", nargs="*", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker is not None:
        worker(asked.worker)
        return
    import tiny

    kinds = [kind for kind in tiny.all_types() if kind.partition(":")[0] in asked.tables]
    if asked.types:
        kinds = [kind for kind in kinds if kind in asked.types or kind.partition(":")[2] in asked.types]
    rows: list[Row] = []
    lines = asked.json.open("w") if asked.json else None
    for row in checked(kinds):
        rows.append(row)
        if lines:
            print(json.dumps(row), file=lines, flush=True)
        if asked.summary and len(rows) % 10 == 0:
            asked.summary.write_text(summary(rows))
    sys.stdout.write(summary(rows))
    if asked.page:
        _write_page(rows, asked.page)
    if asked.summary:
        asked.summary.write_text(summary(rows))


if __name__ == "__main__":
    main()
