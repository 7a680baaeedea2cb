"""LoRA on a packed model, through peft's own dispatch for layers that it does not know.

    config = packed_lora(LoraConfig(target_modules=["q_proj", "v_proj"]))
    model = get_peft_model(fracbit.load("OUT"), config)                          # train it; the codes stay as they are
    model.save_pretrained("adapter")
    model = PeftModel.from_pretrained(fracbit.load("OUT"), "adapter", config=packed_lora("adapter"))

The packed linear computes W x and passes the gradient on; B A x is added in floats. Merging is refused: the sum has no codes.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fracbit.errors import FormatError
from fracbit.models.quant_linear import QuantEmbedding, QuantLinear, TiedCopy, TiedHead
from fracbit.records.extras import install

UNMERGED = (
    "an adapter is not merged into packed weights, whose sum with it has no codes: keep it beside the model, or merge it into "
    "the float model and quantize that"
)


def packed_lora(config: Any) -> Any:
    """A copy of a peft `LoraConfig`, or the one in the folder of an adapter, that adapts packed linears too.

    peft saves no trace of that, so an adapter is loaded with it as well. Raises `FormatError` without peft.
    """
    from_folder = isinstance(config, str | Path)
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise FormatError(f"adapters need peft: {install('peft')} ({error})") from error
    made = LoraConfig.from_pretrained(str(config)) if from_folder else deepcopy(config)
    made._register_custom_module(
        {QuantLinear: _layer(), **dict.fromkeys((QuantEmbedding, TiedHead, TiedCopy), _refuse)}
    )
    return made


def _refuse(target: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    raise FormatError(
        f"no adapter for a {type(target).__name__}: tables, and heads that share a weight, take none while they are packed; "
        "leave them out of target_modules"
    )


@cache
def _layer() -> type[nn.Module]:
    """The layer that peft puts around a packed linear; made here because its base class comes with peft."""
    from peft.tuners.lora.layer import LoraLayer

    class PackedLora(nn.Module, LoraLayer):  # type: ignore[misc]
        """y = W x + b + scaling * B A x with W packed."""

        def __init__(
            self,
            base_layer: QuantLinear,
            adapter_name: str,
            *,
            config: Any,
            r: int,
            lora_alpha: int,
            **others: Any,
        ) -> None:
            super().__init__()
            LoraLayer.__init__(self, base_layer)
            self._active_adapter = adapter_name
            layer: Any = self
            layer.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

        def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
            """The sizes of a packed linear, which peft cannot know."""
            held: Any = module
            return held.in_features, held.out_features

        def forward(self, x: Tensor) -> Tensor:
            """`x` [..., in] -> [..., out] in the type of `x`."""
            layer: Any = self
            y: Tensor = layer.base_layer(x)  # [..., out]
            for name in () if layer.disable_adapters else layer.active_adapters:
                if name in layer.lora_A:
                    down, up = layer.lora_A[name], layer.lora_B[name]
                    inner = layer.lora_dropout[name](layer._cast_input_dtype(x, down.weight.dtype))
                    y = y + (up(down(inner)) * layer.scaling[name]).to(y.dtype)
            return y

        def merge(self, *args: Any, **kwargs: Any) -> None:
            """Raises `FormatError`."""
            raise FormatError(UNMERGED)

        unmerge = merge

    return PackedLora
