"""What fracbit says before a run, and what the run took: presets on SmolLM2-135M (bench/results/needs.json, docs/quality.md).

    python bench/real/needs.py --work FOLDER [--threads 1]

FOLDER is that of measure.py, whose finished runs are the comparison. Each estimate is asked for in a process of its own, as
`fracbit quantize` does it: the budget is divided first (`dividing`, seconds), then one block is tried. Seconds are of
processors: with one thread they are what a run takes on an idle core.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from frame import RESULTS, Row, arguments, run, say_machine, surroundings, table, write_json
from measure import LENGTH, PRESETS, SAMPLES


def foretold(name: str, work: Path) -> Row:
    """What the preset `name` is said to take, and what the dividing took."""
    from fracbit.pipeline.plan.budget import budgeted
    from fracbit.pipeline.plan.needs import needs_of
    from fracbit.pipeline.verbs import open_for
    from fracbit.records.recipe import Recipe
    from fracbit.records.spending import Spending

    preset, bits = PRESETS[name]
    data = {"texts": [str(work / "calibration.npy")], "samples": SAMPLES, "length": LENGTH}
    recipe = Recipe.model_validate({"model": str(work / "smollm2"), "calibration": data})
    opened, started = open_for(recipe), time.process_time()
    divided = budgeted(recipe, Spending(preset=preset, average_bits=bits), opened=opened)
    dividing = time.process_time() - started
    found = needs_of(divided.recipe, opened)
    return {"dividing": dividing, "seconds": found.seconds, "memory_bytes": found.memory_bytes}


def compared(name: str, given: Namespace) -> Row:
    """One finished run beside its estimate."""
    ran = run(
        [sys.executable, __file__, "--work", given.work, "--one", name],
        environment=surroundings(given.threads),
    )
    if ran.status:
        raise SystemExit(f"{name}: the estimate failed")
    said = json.loads(ran.printed)
    took = json.loads((given.work / name.replace(" ", "-") / "made.json").read_text())["costs"]
    return {
        "setting": name,
        **said,
        "took_seconds": took["cpu_seconds"],
        "took_bytes": took["peak_rss_bytes"],
        "of_seconds": (said["dividing"] + said["seconds"]) / took["cpu_seconds"],
        "of_bytes": said["memory_bytes"] / took["peak_rss_bytes"],
    }


def main() -> None:
    parser = arguments(__doc__, work=None, threads=1, json=RESULTS / "needs.json")
    parser.add_argument("--one", choices=PRESETS, metavar="NAME", help="print this estimate alone, as JSON")
    given = parser.parse_args()
    given.work = given.work.resolve()
    if given.one:
        print(json.dumps(foretold(given.one, given.work)))
        return
    ended = [name for name in PRESETS if (given.work / name.replace(" ", "-") / "made.json").is_file()]
    rows = [compared(name, given) for name in ended if not name.startswith("fast")]
    say_machine()
    table(
        "setting | dividing s | said s | took s | said of took | said MB | took MB | said of took",
        ([row["setting"], f"{row['dividing']:.0f}", f"{row['seconds']:.0f}", f"{row['took_seconds']:.0f}",
          f"{row['of_seconds']:.2f}", f"{row['memory_bytes'] / 1e6:.0f}", f"{row['took_bytes'] / 1e6:.0f}",
          f"{row['of_bytes']:.2f}"] for row in rows),
    )  # fmt: skip
    write_json(given.json, {"threads": given.threads, "rows": rows})


if __name__ == "__main__":
    main()
