"""MLX with mlx-lm, on processors here; the same files run on Apple GPUs."""

from dataclasses import replace

from fracbit.checkpoint.export.mlx import HELD, INTEGERS
from fracbit.engines.engine import ServingEngine

MLX = ServingEngine(
    title="MLX 0.32 with mlx-lm",
    formats=("mlx",),
    installs=(("mlx[cpu]==0.32.4", "mlx-lm"),),
    runner="run_mlx.py",
    variables={"HF_HUB_OFFLINE": "1"},
    serves=replace(HELD, integers=replace(INTEGERS, offsets=("float",))),  # a symmetric grid stores as much
    head=True,
)
