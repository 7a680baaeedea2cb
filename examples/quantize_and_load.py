"""Quantize a model to 4 bits, load it with transformers, and let it write a few lines of Python.

python examples/quantize_and_load.py
"""

import tempfile

from transformers import AutoModelForCausalLM, AutoTokenizer

import fracbit
from fracbit.bundled import bundled_model

with tempfile.TemporaryDirectory() as folder:
    scheme = fracbit.Scheme(dtype="nf", bits=4, block=64)  # NF4: 4-bit codes, one fp16 scale for 64 weights
    result = fracbit.quantize(bundled_model(), f"{folder}/nf4", scheme)
    print(f"{result.bits_per_weight:.3f} bits per weight, {result.bytes / 1000:.0f} kB")

    # `import fracbit` is all that transformers needs.
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/nf4")
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/nf4")
    prompt = tokenizer("def read(self, ", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=40, repetition_penalty=1.3, pad_token_id=0)
    print(tokenizer.decode(written[0]))
