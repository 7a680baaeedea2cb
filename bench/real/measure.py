"""What settings lose on a real trained model: SmolLM2-135M-Instruct (bench/results/real.json, docs/quality.md).

    python bench/real/measure.py --work FOLDER [--settings "gptq 3" ...] [--minutes M]

Every setting is one `fracbit quantize` in a process of its own, calibrated on the first 70 % of WikiText-2's validation text.
It is judged on the rest of that text, on which settings were chosen, and on two texts that no choice has seen: passages of
novels (LAMBADA) and the reference of Python's language. Each by perplexity, KL divergence (mean and 99th percentile) and top-1
agreement, in fp32 over 16 windows of 512. What FOLDER holds is not made again.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from frame import (
    ENVIRONMENTS,
    RESULTS,
    SHARED,
    UNFINISHED,
    Row,
    arguments,
    fracbit,
    say_machine,
    table,
    write_json,
)
from peers.environments import run_peer

SAMPLES, LENGTH, TOKENS = 128, 512, 8192
GPTQ = ("--quantizer=gptq",)
WEIGH, TRAIN = "--set=calibration.weigh=loss", "--set=calibration.tweak=train"
SETTINGS: dict[str, tuple[str, ...]] = {
    f"{name} {bits}": (f"--scheme=int{bits}z/64", *words)
    for bits in (2, 3, 4)
    for name, words in {
        "rtn": (),
        "rtn, search": ("--set=search=true",),
        "gptq, full ranges": (*GPTQ, "--set=search=false"),
        "gptq": GPTQ,
        "gptq, tweak auto": (*GPTQ, "--set=calibration.tweak=auto"),
        "gptq, weigh": (*GPTQ, WEIGH),
        "gptq, train": (*GPTQ, TRAIN),
        "gptq, weigh, train": (*GPTQ, WEIGH, TRAIN),
        "descent, weigh": ("--quantizer=descent", WEIGH),
    }.items()
} | {
    f"{preset} {bits}": (f"--preset={preset}", f"--average-bits={bits}")
    for preset in ("fast", "good", "best")
    for bits in (2.25, 3.25, 4.25)
}
"""Options of `fracbit quantize`, by what a table calls them."""


def float_model(work: Path, environments: Path) -> Path:
    """The checkpoint, made once."""
    folder = work / "smollm2"
    if not (folder / "config.json").is_file():
        run_peer("smollm2", "smollm2.py", [folder], environments, log=work / "smollm2.log")
    return folder


def texts(work: Path) -> dict[str, Path]:
    """The texts as files: `calibration`, and those to judge by."""
    from pydoc_data.topics import topics

    whole = (SHARED / "data" / "wikitext-2-valid.txt").read_text(encoding="utf-8")
    cut = whole.index("\n \n", int(len(whole) * 0.7))
    novels = (SHARED / "data" / "lambada-2000.jsonl").read_text(encoding="utf-8").splitlines()
    found = {
        "calibration": whole[:cut],
        "wikitext": whole[cut:],
        "novels": "\n\n".join(json.loads(line)["text"] for line in novels[:200]),
        "reference": "\n\n".join(topics[name] for name in sorted(topics)),
    }
    for name, text in found.items():
        (work / f"{name}.txt").write_text(text, encoding="utf-8")
    return {name: work / f"{name}.txt" for name in found}


def measured(name: str, model: Path, files: dict[str, Path], work: Path) -> list[Row]:
    """One row for every text that the setting is judged by."""
    folder = work / name.replace(" ", "-").replace(",", "")
    facts = folder / "facts.json"
    if not facts.is_file():
        free = name.startswith(("rtn", "fast"))
        data = () if free else ("--calibration", files["calibration"])
        sizes = [
            f"--set=calibration.{key}={value}" for key, value in (("samples", SAMPLES), ("length", LENGTH))
        ]
        words = (*SETTINGS[name], *data, *(sizes if data else ()))
        made, ran = fracbit("quantize", model, "-o", folder / "checkpoint", *words, "--overwrite")
        costs = {"bits": made["bits_per_weight"], "seconds": ran.seconds, "cpu_seconds": ran.cpu_seconds}
        costs["peak_rss_bytes"] = ran.peak_rss_bytes
        rows = [
            {"setting": name, "text": text, **costs, **judged(folder / "checkpoint", model, file)}
            for text, file in files.items()
            if text != "calibration"
        ]
        facts.write_text(json.dumps(rows))
    return json.loads(facts.read_text())


def plain(model: Path, files: dict[str, Path], work: Path) -> dict[str, float]:
    """Perplexity of the float model on each text that is judged by."""
    path = work / "float.json"
    if not path.is_file():
        found = {
            text: fracbit("eval", model, *how(file))[0]
            for text, file in files.items()
            if text != "calibration"
        }
        path.write_text(json.dumps({text: one["perplexity"] for text, one in found.items()}))
    return json.loads(path.read_text())


def how(file: Path) -> tuple[object, ...]:
    """The protocol, as options of `fracbit eval`."""
    return ("--text", f"{file}?keep={TOKENS}", "--window", LENGTH, "--dtype", "float32")


def judged(checkpoint: Path, model: Path, file: Path) -> Row:
    """A checkpoint beside its float model on the first `TOKENS` of a text."""
    found, _ = fracbit("eval", checkpoint, "--against", model, *how(file))
    away = found["divergence"]
    return {
        "nll": found["nll"], "perplexity": found["perplexity"], "kl": away["kl"], "kl_p99": away["kl_p99"],
        "agreement": away["agreement"],
    }  # fmt: skip


def main() -> None:
    parser = arguments(
        __doc__, work=None, environments=ENVIRONMENTS, minutes=600.0, json=RESULTS / "real.json"
    )
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    given = parser.parse_args()
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    model, files = float_model(work, given.environments.resolve()), texts(work)
    floats, started, rows = plain(model, files, work), time.monotonic(), []
    for name in given.settings:
        if time.monotonic() - started > 60 * given.minutes:
            raise SystemExit(UNFINISHED)
        rows += measured(name, model, files, work)
    say_machine()
    table("text | perplexity of the float model", ((text, f"{found:.2f}") for text, found in floats.items()))
    table(
        "setting | text | bits | perplexity | KL | 99 % below | same top token | seconds | peak MB",
        ([row["setting"], row["text"], f"{row['bits']:.3f}", f"{row['perplexity']:.2f}", f"{row['kl']:.4f}",
          f"{row['kl_p99']:.3f}", f"{100 * row['agreement']:.2f} %", f"{row['seconds']:.0f}",
          f"{row['peak_rss_bytes'] / 1e6:.0f}"] for row in rows),
    )  # fmt: skip
    protocol = (
        f"{SAMPLES} x {LENGTH} ids to calibrate; judged on {TOKENS} tokens of each text, window {LENGTH}"
    )
    write_json(given.json, {"protocol": protocol, "float": floats, "rows": rows})


if __name__ == "__main__":
    main()
