"""transformers without fracbit, with the readers of formats that it has on processors."""

from fracbit.engines.engine import ServingEngine

TRANSFORMERS = ServingEngine(
    title="transformers 5.23",
    formats=("float", "compressed-tensors"),
    installs=(
        ("torch==2.13.0", "numpy"),
        ("transformers==5.23.0", "compressed-tensors==0.18.0", "accelerate"),
    ),
    runner="run_transformers.py",
    variables={"HF_HUB_OFFLINE": "1"},
)
