"""What `fracbit tweak` and `fracbit refine` make of other programs' files (bench/results/better.json, docs/better.md).

    python bench/others/better.py --work FOLDER [--cases "SmolLM2-135M GPTQModel 2" ...] [--ways refine ...] [--threads 1]

GPTQModel and llm-compressor quantize a model by GPTQ with zero points in groups of 64, each in its environment. Their own files
are improved and judged beside the float model: perplexity and KL divergence on texts that nothing was calibrated on, in fp32.
SmolLM2-135M and its texts are those of real/measure.py; tales-l has the stories of the shared folder. llama.cpp's files are
those of llama-quantize with an importance matrix of 32 samples of the same text. Their float model is that of
engines/gguf_quality.py, which computes the same with other factors on its channels. What FOLDER holds is not made again; cases
and ways that are not named keep their rows.
"""

from __future__ import annotations

import json
import shutil
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "real"))

from engines.gguf_quality import rescaled, theirs
from frame import (
    ENVIRONMENTS,
    RESULTS,
    SHARED,
    Row,
    arguments,
    fracbit,
    machine,
    say_machine,
    table,
    write_json,
)
from measure import float_model, ids, texts
from peers.environments import quantize_with

TOOLS = {"GPTQModel": "gptqmodel", "llm-compressor": "llmcompressor"}
WAYS: dict[str, tuple[str, ...]] = {
    "refine": ("refine",),
    "tweak adam": ("tweak", "--method=adam"),
    "tweak closed": ("tweak", "--method=closed"),
    "tweak auto": ("tweak", "--method=auto"),
    "tweak predictions": ("tweak", "--method=predictions"),
    "tweak, text alone": ("tweak",),
}
"""The command and its options, by what a table calls them; the last has no float model."""
GGUF_FILES = ("Q2_K", "Q3_K_M", "Q4_K_M")
CASES = tuple(
    f"{model} {tool} {bits}" for model in ("SmolLM2-135M", "tales-l") for tool in TOOLS for bits in (2, 3, 4)
) + tuple(f"SmolLM2-135M llama.cpp {kind}" for kind in GGUF_FILES)
SAMPLES, TOKENS = 32, 4096
STORIES = 60  # of the evaluation text that are judged by
SIZES = {"SmolLM2-135M": 512, "tales-l": 256}
"""Ids of a sample, and of a window."""


def bed(case: str, work: Path, environments: Path) -> tuple[Path, str, dict[str, str]]:
    """The folder of a case's float model, its text to calibrate on, and those to judge by."""
    model, tool, _ = case.split(" ")
    if model == "SmolLM2-135M":
        files, folder = texts(work), float_model(work, environments)
        judged = {name: f"{files[name]}?keep={TOKENS}" for name in ("wikitext", "novels")}
        folder = rescaled(folder, work / "rescaled") if tool == "llama.cpp" else folder
        return folder, str(files["calibration"]), judged
    length = SIZES[model]
    seen, unseen = (
        f"{SHARED}/data/tales-{part}.u16?length=512&keep={length}" for part in ("calibration", "evaluation")
    )
    return SHARED / "models" / model, seen, {"stories": f"{unseen}&first={STORIES}"}


def made(case: str, folder: Path, given: Namespace) -> Path:
    """The peer's own file, made once."""
    model, tool, bits = case.split(" ")
    if tool == "llama.cpp":
        given.types = GGUF_FILES
        some = _some_ids(folder, given.work)
        return theirs(bits, folder, some, given.work / tool, given)[0] / f"{bits}.gguf"
    place = given.work / f"{model}-{tool}"
    if not (place / bits / "checkpoint" / "config.json").is_file():
        setting = {"label": bits, "bits": int(bits), "group": 64, "sym": False, "keep": True}
        quantize_with(
            TOOLS[tool], folder, _ids(model, folder, given.work), place, [setting], given.environments,
            place.with_suffix(".log"), given.threads,
        )  # fmt: skip
    return place / bits / "checkpoint"


def _some_ids(folder: Path, work: Path) -> Path:
    """As many ids for the importance matrix as fracbit is calibrated on: llama.cpp takes half a minute for each."""
    import numpy

    path = work / f"ids-{SAMPLES}.npy"
    if not path.is_file():
        numpy.save(path, numpy.load(ids(folder, texts(work), work))[:SAMPLES])
    return path


def _ids(model: str, folder: Path, work: Path) -> Path:
    """What the peers are calibrated on: 128 x 512 ids of SmolLM2's text, or the first 64 stories."""
    if model == "SmolLM2-135M":
        return ids(folder, texts(work), work)
    import numpy

    path = work / f"{model}.npy"
    if not path.is_file():
        stories = numpy.fromfile(SHARED / "data" / "tales-calibration.u16", "<u2").reshape(-1, 512)
        numpy.save(path, stories[:64, : SIZES[model]].astype("int32"))
    return path


def judged(checkpoint: Path, model: str, folder: Path, sources: dict[str, str]) -> Row:
    """Perplexity and divergence on each text, in this process: imports take longer than tales-l does."""
    import fracbit
    from fracbit.checkpoint.load import load_tokenizer

    found, tokenizer = {}, load_tokenizer(folder)  # llm-compressor leaves none beside its weights
    for name, text in sources.items():
        row = fracbit.evaluate(
            checkpoint, text, tokenizer, against=folder, window=SIZES[model], dtype="float32", progress=None
        )
        assert row.divergence is not None
        found[name] = {
            "perplexity": row.perplexity, "kl": row.divergence.kl, "agreement": row.divergence.agreement
        }  # fmt: skip
    return found


def improved(case: str, way: str, given: Namespace) -> Row:
    """One row: a file as it was (`way` ""), or as a command left it."""
    model = case.split(" ")[0]
    folder, calibration, sources = bed(case, given.work, given.environments)
    checkpoint, took = made(case, folder, given), {}
    row: Row = {"case": case, "way": way or "as it was"}
    if way:
        place = given.work / ("better.gguf" if checkpoint.is_file() else "better")
        _gone(place)
        verb, *more = WAYS[way]
        against = () if way == "tweak, text alone" else ("--against", folder)
        said, ran = fracbit(
            verb, checkpoint, "-o", place, "--calibration", calibration, *against, *more, "--samples", SAMPLES,
            "--length", SIZES[model], threads=given.threads,
        )  # fmt: skip
        took = {"seconds": ran.seconds, "cpu_seconds": ran.cpu_seconds, "peak_rss_bytes": ran.peak_rss_bytes}
        row |= took | {"objective": objective(said)}
        checkpoint = place
    return row | {"texts": judged(checkpoint, model, folder, sources), "measured": machine()}


def _gone(place: Path) -> None:
    """Remove an earlier output."""
    if place.is_file():
        place.unlink()
    shutil.rmtree(place, ignore_errors=True)


def objective(said: Row) -> list[float]:
    """What a command minimized, before and after: sums over blocks or layers, or the loss of the text."""
    parts = [said["loss"]] if said["loss"] else said["tweaks"] or list(said["layers"].values())
    return [sum(part[when] for part in parts) for when in ("before", "after")]


def main() -> None:
    parser = arguments(
        __doc__, work=None, environments=ENVIRONMENTS, threads=None, json=RESULTS / "better.json"
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS), metavar="WAY")
    given = parser.parse_args()
    given.work, given.environments = given.work.resolve(), given.environments.expanduser()
    known = json.loads(given.json.read_text())["rows"] if given.json.is_file() else []
    rows = {(row["case"], row["way"]): row for row in known}
    ordered = [(case, way) for case in CASES for way in ("as it was", *WAYS)]
    say_machine()
    for case in given.cases:
        for way in ("", *given.ways):
            if not way and (case, "as it was") in rows:
                continue
            rows[case, way or "as it was"] = row = improved(case, way, given)
            print(case, row["way"], row["texts"], flush=True)
            protocol = (
                f"{SAMPLES} samples to calibrate; judged on {TOKENS} tokens of a text, or {STORIES} stories"
            )
            write_json(
                given.json, {"protocol": protocol, "rows": [rows[key] for key in ordered if key in rows]}
            )
    table("case | way | text | perplexity | KL | same top token | seconds | peak MB", [
        [case, way, text, f"{found['perplexity']:.2f}", f"{found['kl']:.4f}", f"{100 * found['agreement']:.2f} %",
         f"{rows[case, way].get('seconds', 0):.0f}", f"{rows[case, way].get('peak_rss_bytes', 0) / 1e6:.0f}"]
        for case, way in ordered if (case, way) in rows for text, found in rows[case, way]["texts"].items()
    ])  # fmt: skip


if __name__ == "__main__":
    main()
