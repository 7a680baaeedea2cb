"""Quantize to 3 bits twice, rounding to nearest and with GPTQ, and compare the perplexity.

GPTQ looks at calibration text: the inputs of each layer tell it which rounding errors matter (arXiv:2210.17323).

    python examples/calibrate_gptq.py
"""

import tempfile

import fracbit
from fracbit.bundled import bundled_model
from fracbit.records.calibration import Calibration

CALIBRATION = "bundled:train?documents=each&first=60"  # never the text that the model is judged on
TEXT = "bundled:held-out?keep=4096"

scheme = fracbit.Scheme(bits=3, block=64, offset="zero")
recipes = {
    "nearest": fracbit.Recipe(model=str(bundled_model()), scheme=scheme),
    "gptq": fracbit.Recipe(
        model=str(bundled_model()),
        scheme=scheme,
        quantizer="gptq",
        calibration=Calibration(texts=(CALIBRATION,), samples=16, length=256),
    ),
}
with tempfile.TemporaryDirectory() as folder:
    for name, recipe in recipes.items():
        fracbit.quantize(recipe, f"{folder}/{name}")
        print(f"{name:8} perplexity {fracbit.evaluate(f'{folder}/{name}', TEXT).perplexity:.2f}")
