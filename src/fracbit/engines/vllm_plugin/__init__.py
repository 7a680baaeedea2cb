"""A plug-in for vLLM: with fracbit installed beside it, `vllm serve OUT` and `vllm.LLM(OUT)` run any fracbit checkpoint.

vLLM finds `register` by the entry point `vllm.general_plugins` of pyproject.toml. Importing this package imports neither torch
nor vLLM; `register` imports both.

- fused.py: which linears of the checkpoint a layer of vLLM is made of, and their product. It knows nothing of vLLM.
- arrivals.py: the parameters that take stored tensors while vLLM loads.
- linear_method.py, embedding_method.py, experts_method.py: what vLLM calls a quantization method, for each kind of layer.
- config.py: which layer of vLLM gets which method.
- ops.py: operators for graphs that vLLM compiles.

Products are the operator `fracbit::linear`: native code on CPUs, Triton on GPUs. The plug-in was run on CPUs alone. Weights are
not cut for tensor parallelism yet.
"""

from __future__ import annotations


def register() -> None:
    """Make the quantization method `fracbit` known to vLLM; once more does no harm. Raises `ImportError` without vLLM."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from fracbit.checkpoint.format import QUANT_METHOD
    from fracbit.engines.vllm_plugin.config import FracbitQuantization

    register_quantization_config(QUANT_METHOD)(FracbitQuantization)
