"""`Decoder`: a loaded model's decode step in one native call, where its blocks have Llama's shape.

The model itself reads the prompt; the tokens after it are read one by one, without Python between the layers. `obstacle` says
why a model cannot be run this way; it then runs layer by layer, as transformers runs it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fracbit.errors import KernelError
from fracbit.kernels import Activations, DecoderBlock, DecoderShape, NativeDecoder, PackedLinear
from fracbit.kernels.cpu import NATIVE, NOTE
from fracbit.kernels.kernel import FLOAT_TYPES
from fracbit.models.quant_linear import QuantEmbedding, QuantLinear, TiedHead
from fracbit.models.store_cache import StoreCache

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Those that do not depend on the length of the text."""
LAYERS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def obstacle(model: PreTrainedModel) -> str | None:
    """Why `model` cannot take the native step, in a few words; None when it can."""
    config = model.config
    if NATIVE is None:
        return NOTE
    if model.device.type != "cpu":
        return f"the model is on {model.device}, and the native step runs on CPUs"
    if model.dtype not in FLOAT_TYPES:
        return f"it computes in {model.dtype}"
    if config.model_type not in MODEL_TYPES:
        return f"models of type {config.model_type} are not among {', '.join(MODEL_TYPES)}"
    if getattr(config, "hidden_act", "silu") != "silu":
        return f"the activation is {config.hidden_act}, not silu"
    rotation = config.rope_parameters
    if rotation.get("rope_type") not in FIXED_ROTATIONS or rotation.get("partial_rotary_factor", 1) != 1:
        return f"its rotation ({rotation.get('rope_type')}) is not one of {', '.join(FIXED_ROTATIONS)}"
    return _obstacle_in_layers(model)


def _obstacle_in_layers(model: PreTrainedModel) -> str | None:
    if any(kind != "full_attention" for kind in getattr(model.config, "layer_types", None) or ()):
        return "some layers attend to a sliding window"
    if getattr(model.config, "sliding_window", None) and getattr(model.config, "use_sliding_window", True):
        return "its layers attend to a sliding window"
    layers = list(_linears(model))
    packed = [layer for layer in layers if isinstance(layer, QuantLinear)]
    if not packed:
        return "its blocks are not quantized"
    if any(layer.rotated for layer in packed):
        return "its recipe rotates activations"
    if any(layer.inputs is not None for layer in packed):
        return "its recipe rounds activations"
    if any(not isinstance(layer, QuantLinear | nn.Linear) for layer in layers):
        return "a layer is neither packed nor a plain linear"
    if len({layer.activations for layer in packed}) > 1:
        return "its layers differ in how they take activations"
    return None


def _linears(model: PreTrainedModel) -> Iterator[nn.Module]:
    for block in model.model.layers:
        yield from (block.get_submodule(name) for name in LAYERS)


class Decoder:
    """The decode step of a model without an `obstacle`. Raises `KernelError` for one that has it.

    Made in milliseconds; holds the model's own bytes, so the model must stay as it is.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        reason = obstacle(model)
        if reason is not None:
            raise KernelError(f"this model has no native decode step: {reason}")
        config, self._rotary = model.config, model.model.rotary_emb
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        packed = next(layer for layer in _linears(model) if isinstance(layer, QuantLinear))
        activations: Activations = packed.activations
        shape = DecoderShape(
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head=head,
            epsilon=config.rms_norm_eps,
        )
        self._native = NativeDecoder(
            shape,
            embedding=_weight(model.get_input_embeddings()),
            logits=_weight(model.get_output_embeddings()),
            gain=model.model.norm.weight,
            blocks=[_block(block) for block in model.model.layers],
            activations=activations,
        )
        self._turns: tuple[Tensor, Tensor] | None = None

    def advance(self, tokens: Tensor, pads: Tensor, cache: StoreCache) -> Tensor:
        """Read `tokens` [batch] after what `cache` holds, which is at least one token; fp32 logits [batch, vocabulary].

        `pads` [batch]: positions at the start of each sequence that are masked.
        """
        held = cache.held
        if cache.data is None:
            raise KernelError("the cache is empty; let the model read the prompt first")
        cache.make_room(cache.part(0, 0), held + 1)
        cosines, sines = self._rotation(cache.data.shape[-2])  # [room, head]
        logits = self._native.advance(
            cache.data, held, tokens.contiguous(), pads=pads, cosines=cosines, sines=sines
        )  # [batch, vocabulary]
        cache.added(1)
        return logits

    def _rotation(self, room: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [room, head] of the first `room` positions."""
        if self._turns is None or len(self._turns[0]) != room:
            cosines, sines = self._rotary(torch.empty(1), torch.arange(room)[None])  # [1, room, head]
            self._turns = cosines[0].contiguous(), sines[0].contiguous()
        return self._turns


def _weight(module: nn.Module) -> PackedLinear | Tensor:
    if isinstance(module, TiedHead):
        return module.embedding.ready()
    if isinstance(module, QuantLinear | QuantEmbedding):
        return module.ready()
    weight: Tensor = module.get_parameter("weight")
    return weight.detach()


def _block(block: nn.Module) -> DecoderBlock:
    attention = block.get_submodule("self_attn")
    inside = [dict(attention.named_children()).get(name) for name in ("q_norm", "k_norm")]
    layers = [block.get_submodule(name) for name in LAYERS]
    gains = [block.get_submodule(name).weight for name in ("input_layernorm", "post_attention_layernorm")]
    return DecoderBlock(
        [(_weight(layer), layer.bias) for layer in layers],  # type: ignore[misc]
        [*gains, *(None if norm is None else norm.weight for norm in inside)],  # type: ignore[list-item]
    )
