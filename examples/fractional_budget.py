"""Spend a budget of 3.5 bits per weight: plan which layer gets which width, then write the model.

python examples/fractional_budget.py
"""

import tempfile

import fracbit
from fracbit.bundled import bundled_model

TEXT = "bundled:held-out?keep=4096"  # the first 4096 tokens of modules that the model was never trained on

# The score `weight-error` needs no text. `levels` are the schemes that a layer may get.
spending = fracbit.Spending(average_bits=3.5, levels="int4z/64,int3z/64,int2z/64", score="weight-error")
plan = fracbit.plan(bundled_model(), spending)
print(f"planned: {plan.chosen.bits_per_weight:.4f} bits per weight")
for scheme, layers in plan.chosen.allocation.used().items():
    print(f"  {layers} layers in {scheme}")

with tempfile.TemporaryDirectory() as folder:
    result = fracbit.quantize(bundled_model(), f"{folder}/budget", spending=spending)
    uniform = fracbit.quantize(
        bundled_model(), f"{folder}/uniform", fracbit.Scheme(bits=3, block=64, offset="zero")
    )
    for name, written in (("budget", result), ("uniform", uniform)):
        judged = fracbit.evaluate(f"{folder}/{name}", TEXT)
        print(f"{name}: {written.bits_per_weight:.4f} bits, perplexity {judged.perplexity:.2f}")
