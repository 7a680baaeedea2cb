"""What every peer's script does around its own library: read the order, time it, count what was stored, save the weights.

    python run_NAME.py MODEL IDS.npy FOLDER SETTINGS.json

SETTINGS.json is a list of objects, each `{"label": ..., ...}`; one folder FOLDER/LABEL per setting gets `weights.safetensors`
(the dequantized linears, [out, in], by their names in the model) and `facts.json` (bytes and weights per linear, seconds, peak
resident bytes, notes). With `"keep": true` the peer's own checkpoint stays beside them and no weights are written: for timings.
"""

import json
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

Weights = dict[str, torch.Tensor]
Sizes = dict[str, int]
Run = Callable[[str, torch.Tensor, dict, Path], tuple[Weights, Sizes, list[str]]]
"""(model folder, ids [samples, length], setting, folder for a checkpoint) -> dequantized weights, stored bytes, notes."""


def main(run: Run, version: str) -> None:
    model, ids, folder, settings = sys.argv[1:5]
    tokens = torch.from_numpy(np.load(ids)).long()
    for setting in json.loads(Path(settings).read_text()):
        place = Path(folder) / setting["label"]
        place.mkdir(parents=True, exist_ok=True)
        facts: dict = {"setting": setting, "version": version}
        started = time.perf_counter()
        try:
            weights, sizes, notes = run(model, tokens, dict(setting), place)
            facts |= {"seconds": time.perf_counter() - started, "bytes": sizes, "notes": notes}
            facts["weights"] = {name: weight.numel() for name, weight in weights.items()}
            if not setting.get("keep"):
                save_file(
                    {n: w.float().contiguous() for n, w in weights.items()}, place / "weights.safetensors"
                )
        except Exception as error:  # noqa: BLE001 a setting that a peer refuses is a line of the table, not the end of it
            traceback.print_exc()
            facts["error"] = f"{type(error).__name__}: {error}".strip()[:300]
        facts["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        (place / "facts.json").write_text(json.dumps(facts))
        print(setting["label"], facts.get("error") or f"{facts['seconds']:.1f} s", flush=True)


def stored_tensors(folder: Path) -> Weights:
    """Everything in the safetensors files of a checkpoint."""
    found: Weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 not a dict
    return found


def stored_bytes(tensors: Weights, names: list[str], left_out: tuple[str, ...]) -> Sizes:
    """Bytes of the tensors below each linear's name; those whose last part is in `left_out` say nothing that was learned."""
    sizes = dict.fromkeys(names, 0)
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if layer in sizes and part not in left_out and part != "bias":
            sizes[layer] += tensor.numel() * tensor.element_size()
    return sizes


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linears of the blocks of a Hugging Face Llama."""
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}
