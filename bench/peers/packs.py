"""How other libraries pack linears: for each, what replaces the bf16 linears below a module, and its bytes a weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

Pack = Callable[[nn.Module], object]


def torchao_int8(module: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(module, Int8WeightOnlyConfig())


def bitsandbytes_nf4(module: nn.Module) -> None:
    """On the device where the weights are; quantized on the way there."""
    import bitsandbytes as bnb

    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear):
            packed = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16,
                compress_statistics=False, quant_type="nf4",
            )  # fmt: skip
            packed.load_state_dict({"weight": layer.weight.data.cpu()})
            module.set_submodule(name, packed.to(layer.weight.device).eval())


def quanto(weights: str, module: nn.Module) -> None:
    from optimum import quanto as library

    library.quantize(module, weights=getattr(library, weights))
    library.freeze(module)


PACKS: dict[str, dict[str, tuple[Pack, float]]] = {
    "torchao": {"torchao int8 weight-only": (torchao_int8, 1.0)},
    "bitsandbytes": {"bitsandbytes nf4/64": (bitsandbytes_nf4, 0.5 + 4 / 64)},
    "optimum-quanto": {
        "optimum-quanto int8": (partial(quanto, "qint8"), 1.0),
        "optimum-quanto int4/128": (partial(quanto, "qint4"), 0.5 + 4 / 128),
    },
}
