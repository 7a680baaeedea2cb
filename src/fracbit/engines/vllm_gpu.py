"""vLLM on GPUs, where Marlin's kernels serve 4 and 8 bits. Nothing of this entry was tried: it needs a GPU."""

from dataclasses import replace

from fracbit.checkpoint.export.coded import IntegerForms
from fracbit.engines.engine import ServingEngine
from fracbit.engines.vllm_cpu import VLLM_CPU

VLLM: ServingEngine = replace(
    VLLM_CPU,
    title="vLLM (GPU)",
    installs=(("vllm",),),
    removes=(),
    variables={"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"},
    serves=IntegerForms(bits=(4, 8), offsets=("none", "zero"), blocks=(32, 64, 128)),
)
