"""Make the files that tests/laws/test_kept.py holds fracbit to: `cd tests && python -m golden.make FOLDER`.

The files in this folder were made by fracbit 0.1.0 as of its first layout (fracbit.pipeline.run and
fracbit.pipeline.calibrated), before `fracbit.quantize` took a recipe. They are the past and are not made again to let a test
pass. New ones are for what did not exist then: name another folder and take what is new from it.

    recipes.json            what each stored tensor of each recipe hashes to, losses, and where the sums were made
    codes.safetensors       the codes of the calibrated recipes
    checkpoints/NAME        a stored checkpoint
    logits.safetensors      what the stored checkpoints answer to the prompt
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fracbit
from golden.models import PROMPT, TEXT, hashed, write_model, write_text
from golden.recipes import CALIBRATED, CHECKPOINTS, FREE, Table

HEX = 16  # digits of a hash that are kept


def quantize(kind: str, table: Table, output: str) -> None:
    """Quantize a model of the working folder, which is made there when it is missing."""
    if not Path(kind).exists():
        write_model(kind, Path(kind))
    if not Path(TEXT).exists():
        write_text(Path(TEXT))
    recipe = fracbit.Recipe.model_validate({"model": kind, **table})
    try:
        from fracbit.pipeline.calibrated import run_calibrated
        from fracbit.pipeline.run import run
    except ModuleNotFoundError:
        fracbit.quantize(recipe, output)
    else:  # the layout that made the files
        (run if recipe.calibration is None else run_calibrated)(recipe, output)


def stored(folder: str) -> dict[str, Tensor]:
    """Every stored tensor of a checkpoint."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def digest(tensor: Tensor) -> str:
    """Hash of a tensor's type, shape and bytes."""
    head = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} "
    raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(head.encode() + raw).hexdigest()[:HEX]


def digests(folder: str) -> dict[str, str]:
    """Hashes of all stored tensors by their names."""
    return {name: digest(tensor) for name, tensor in sorted(stored(folder).items())}


def losses(folder: str) -> dict[str, float]:
    """What each quantized layer lost, by the manifest."""
    layers = json.loads((Path(folder) / "fracbit.json").read_text())["layers"]
    return {name: row["loss"] for name, row in layers.items() if "loss" in row}


def codes(folder: str) -> Tensor:
    """The packed codes uint8 of all quantized layers of a checkpoint, one after another by their names."""
    everything = stored(folder)
    return torch.cat([everything[f"{name}.weight"].view(-1) for name in sorted(losses(folder))])


def answers(folder: str) -> Tensor:
    """Logits fp32 of the kept prompt, on one thread."""
    model = fracbit.load(folder, dtype="float32")
    with torch.no_grad():
        found: Tensor = model(torch.tensor([PROMPT])).logits[0]
    return found


def machine() -> dict[str, str]:
    """How this machine adds floats: the instruction set that torch uses, and what a list of sums comes to, hashed.

    Two machines with equal hashes round alike wherever it was looked at, and are held to equal bytes.
    """
    wide, square = hashed("wide", (96, 32)), hashed("square", (32, 32))
    gram = wide.T @ wide + torch.eye(32)
    found = [
        gram,
        wide @ square,
        square @ wide[0],
        wide.mean(0),
        wide.sum(1),
        wide.square().mean(),
        wide.std(),
    ]
    found += [
        torch.linalg.cholesky(gram),
        torch.linalg.inv(gram),
        torch.cholesky_inverse(torch.linalg.cholesky(gram)),
    ]
    found += [
        wide.softmax(1),
        wide.exp(),
        torch.nn.functional.silu(wide),
        wide.tanh(),
        wide.abs().pow(1 / 3),
        wide.abs().log(),
    ]
    found += [
        torch.rsqrt(wide.square().mean(1) + 1e-6),
        torch.nn.functional.layer_norm(wide, (32,)),
        wide.double().cumsum(0),
    ]
    found += [
        torch.nn.functional.scaled_dot_product_attention(*[wide.view(1, 4, 24, 32)] * 3, is_causal=True)
    ]
    return {
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "sums": hashlib.sha256("".join(map(digest, found)).encode()).hexdigest()[:HEX],
    }


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order: everything here on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make(target: Path) -> None:
    """Write all kept files into `target`; the working folder is used for models and outputs."""
    rows: dict[str, Any] = {"fracbit": fracbit.__version__, "torch": torch.__version__, "machine": machine()}
    kept: dict[str, Tensor] = {}
    for part, recipes in (("free", FREE), ("calibrated", CALIBRATED)):
        rows[part] = {}
        for name, (kind, table) in recipes.items():
            quantize(kind, table, f"{part}-{name}")
            rows[part][name] = {"tensors": digests(f"{part}-{name}")}
            if part == "calibrated":
                rows[part][name]["losses"] = {n: round(x, 8) for n, x in losses(f"{part}-{name}").items()}
                kept[name] = codes(f"{part}-{name}")
    logits = {}
    for name, (kind, table) in CHECKPOINTS.items():
        quantize(kind, table, str(target / "checkpoints" / name))
        (target / "checkpoints" / name / "README.md").unlink()  # the card; nothing reads it
        logits[name] = answers(str(target / "checkpoints" / name))
    save_file(kept, target / "codes.safetensors")
    save_file(logits, target / "logits.safetensors")
    (target / "recipes.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    made = Path(sys.argv[1]).resolve()
    made.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as working, one_thread():
        os.chdir(working)
        make(made)
