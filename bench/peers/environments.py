"""One virtual environment per peer, made once: which versions, and how to run a peer's script in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"
PEERS = {
    "gptqmodel": ("gptqmodel==7.6.0",),  # 7.7.0 asks for torch 2.14.1
    "llmcompressor": ("llmcompressor==0.14.0.1",),
    "autoround": ("auto-round==0.16.1",),
    "hqq": ("hqq==0.2.8.post1",),
}
# GPTQModel plans for half of the cores and then asks for two workers: on two cores that fails without this.
EXTRA = {
    "GPTQMODEL_CPU_WORKERS": "2",
    "BUILD_CUDA_EXT": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def environment(name: str, folder: Path) -> Path:
    """The interpreter of a peer's environment below `folder`; installs it when it is not there."""
    place = folder / name
    python, done = place / "bin" / "python", place / ".installed"
    wanted = " ".join((TORCH, *PEERS[name]))
    if done.is_file() and done.read_text() == wanted:
        return python
    print(f"installing {wanted} into {place}", file=sys.stderr)
    venv.create(place, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, TORCH, "setuptools", "wheel"], check=True)
    # The second call repeats torch, so that no dependency replaces it; GPTQModel is built from source and needs to see it.
    flags = ["--no-build-isolation"] if name == "gptqmodel" else []
    subprocess.run([*pip, TORCH, *PEERS[name], *flags], check=True, env=os.environ | EXTRA)
    done.write_text(wanted)
    return python


def command(
    name: str, folder: Path, model: Path, ids: Path, out: Path, settings: Sequence[dict]
) -> list[str]:
    """The command that runs a peer over `settings`, results below `out` (see frame.py)."""
    out.mkdir(parents=True, exist_ok=True)
    order = out / "settings.json"
    order.write_text(json.dumps(list(settings)))
    script = HERE / f"run_{name}.py"
    return [str(environment(name, folder)), str(script), str(model), str(ids), str(out), str(order)]


def surroundings(threads: int | None = None) -> dict[str, str]:
    """The environment variables that peers run with."""
    own = os.environ | EXTRA
    return (
        own if threads is None else own | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    )
