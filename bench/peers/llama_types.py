"""Whole files of llama.cpp's types, by llama-quantize with an importance matrix. Runs in the environment of the peer llamacpp.

    python llama_types.py MODEL IDS FOLDER TYPE [TYPE ...]

MODEL: a folder with a float model and its tokenizer; IDS: calibration ids [samples, length] as .npy. FOLDER gets TYPE.gguf for
each, and facts.json: seconds, and type and bytes of every tensor.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from transformers import AutoTokenizer


def main() -> None:
    model, ids, folder, *types = sys.argv[1:]
    home, threads = Path(sys.prefix) / "llama.cpp", os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    plain, text, matrix = (Path(folder) / name for name in ("plain.gguf", "text.txt", "imatrix.gguf"))
    tokens = np.load(ids)  # [samples, length]
    text.write_text("".join(AutoTokenizer.from_pretrained(model).batch_decode(tokens)))
    convert = [sys.executable, home / "convert_hf_to_gguf.py", model, "--outtype", "f32", "--outfile", plain]
    observe = [home / "build/bin/llama-imatrix", "-m", plain, "-f", text, "-o", matrix]
    observe += ["-c", tokens.shape[1], "-t", threads, "--no-ppl"]
    started = time.monotonic()
    for words in (convert, observe):
        subprocess.run([str(word) for word in words], check=True)
    before, facts = time.monotonic() - started, {}
    for kind in types:
        made, started = Path(folder) / f"{kind}.gguf", time.monotonic()
        words = [home / "build/bin/llama-quantize", "--imatrix", matrix, plain, made, kind, threads]
        subprocess.run([str(word) for word in words], check=True)
        tensors = {each.name: [each.tensor_type.name, int(each.n_bytes)] for each in GGUFReader(made).tensors}
        seconds = before + time.monotonic() - started
        facts[kind] = {"bytes": made.stat().st_size, "seconds": seconds, "tensors": tensors}
    (Path(folder) / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
