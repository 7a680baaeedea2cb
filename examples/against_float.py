"""Compare quantized models with the float model they were made from: perplexity, KL divergence and agreement.

Perplexity alone can hide a change; the divergence of the two models' predictions cannot.

    python examples/against_float.py
"""

import tempfile

import fracbit
from fracbit.bundled import bundled_model

TEXT = "bundled:held-out?keep=4096"

print(f"float    perplexity {fracbit.evaluate(bundled_model(), TEXT).perplexity:.2f}")
with tempfile.TemporaryDirectory() as folder:
    for bits in (8, 4, 3):
        output = f"{folder}/int{bits}"
        fracbit.quantize(bundled_model(), output, fracbit.Scheme(bits=bits, block=64, offset="zero"))
        judged = fracbit.evaluate(output, TEXT, against=bundled_model())
        print(
            f"{bits} bits   perplexity {judged.perplexity:.2f}, KL {judged.divergence.kl:.4f} nats per token, "
            f"same first choice {judged.divergence.agreement:.1%}"
        )
