"""What a model with a large vocabulary takes in memory: to quantize it, to load it, to run it once (docs/guide.md).

    python bench/memory.py --work FOLDER [--json bench/results/memory.json]

Makes a Gemma 3 of 270M parameters with random bf16 weights in FOLDER; its embedding table of 262144 x 640 is two thirds of it.
Memory is resident size, mapped files included, over that of a process that has imported fracbit and the model's class.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from frame import RESULTS, arguments, fracbit, table, write_json

SCHEMES = {"int4/32": ("--scheme", "int4/32", "--set", "embeddings=int8/64")}
SCHEMES |= {"int4/32, search": (*SCHEMES["int4/32"], "--set", "search=true")}
LOAD = """
import json, sys, torch, fracbit
from transformers import Gemma3ForCausalLM

def resident(key):
    (line,) = (line for line in open("/proc/self/status") if line.startswith(key))
    return 1024 * int(line.split()[1])

before = resident("VmRSS")
model = fracbit.load(sys.argv[1])
loaded, peak = resident("VmRSS"), resident("VmHWM")
with torch.no_grad():
    model(torch.tensor([[1, 2, 3]]))
found = {"loaded": loaded, "load_peak": peak, "run": resident("VmRSS")}
print(json.dumps({"imports": before} | {name: size - before for name, size in found.items()}))
"""


def make_model(folder: Path) -> None:
    """Write the checkpoint; nothing is done when it is there."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    if (folder / "config.json").exists():
        return
    config = Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, sliding_window=512,
    )  # fmt: skip
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).bfloat16().save_pretrained(folder)


def main() -> None:
    parser = arguments(__doc__, work=None, json=RESULTS / "memory.json")
    given = parser.parse_args()
    source, target = given.work.resolve() / "gemma", given.work.resolve() / "quantized"
    # In a process of its own: the memory of this one would count as that of the processes that it starts.
    with ProcessPoolExecutor(1, get_context("spawn")) as apart:
        apart.submit(make_model, source).result()
    rows = []
    for name, words in SCHEMES.items():
        _, ran = fracbit("quantize", source, "-o", target, *words, "--overwrite")
        loaded = subprocess.run(
            [sys.executable, "-c", LOAD, target], check=True, capture_output=True, text=True
        )
        found = json.loads(loaded.stdout.splitlines()[-1])
        file = sum(path.stat().st_size for path in target.glob("*.safetensors"))
        quantize = ran.peak_rss_bytes - found["imports"]
        rows.append({"scheme": name, "file": file, "quantize": quantize, "beside_file": quantize - file, **found,
                     "loaded_share": found["loaded"] / file, "cpu_seconds": ran.cpu_seconds})  # fmt: skip
    table(
        "scheme | file, MB | quantizing, peak MB | loading, peak MB | loaded, MB | of the file | after a pass, MB",
        ([row["scheme"], *(f"{row[key] / 1e6:.0f}" for key in ("file", "quantize", "load_peak", "loaded")),
          f"{row['loaded_share']:.2f}", f"{row['run'] / 1e6:.0f}"] for row in rows),
    )  # fmt: skip
    write_json(given.json, {"rows": rows})


if __name__ == "__main__":
    main()
