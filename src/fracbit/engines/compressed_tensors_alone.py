"""The library compressed-tensors: its own decoding of every layer. It runs no model."""

from fracbit.engines.engine import ServingEngine

COMPRESSED_TENSORS = ServingEngine(
    title="compressed-tensors 0.19",
    formats=("compressed-tensors",),
    installs=(("torch==2.13.0", "numpy"), ("compressed-tensors==0.19.0", "safetensors")),
    runner="run_compressed_tensors.py",
    dtype="",
    variables={"HF_HUB_OFFLINE": "1"},
)
