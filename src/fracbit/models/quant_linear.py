"""`QuantLinear`: a linear that holds its packed weight as buffers and multiplies through the kernels.

`QuantEmbedding` looks up rows of such a weight, and `TiedHead` multiplies by an embedding's bytes without a copy of them.
The codes are the buffer `weight`, flattened to one dimension: a reader that does not know fracbit finds a `weight` of the
wrong shape and stops, instead of leaving the layer at random values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fracbit.kernels import Activations, PackedLinear, multiply_each
from fracbit.kernels.op import linear_op, rows_op, spec_of
from fracbit.numerics.activations import int8_pays, int8_product, is_int8, round_inputs
from fracbit.numerics.packed import (
    PackedTensor,
    decode,
    decode_rows,
    from_parts,
    part_shapes,
    parts_of,
)
from fracbit.records.inputs import Inputs
from fracbit.records.scheme import Scheme
from fracbit.transforms.rotation import turn_factors, turn_inputs


class _PackedBuffers(nn.Module):
    """Holds a `PackedTensor` as buffers: `weight` (codes, flat) and `weight_<part>` for every other part."""

    def __init__(self, scheme: Scheme, shape: tuple[int, int], outliers: int, sixteen: torch.dtype) -> None:
        super().__init__()
        self.scheme, self.shape, self._parts = scheme, shape, part_shapes(scheme, shape, outliers)
        self.activations: Activations = "float"
        self.deterministic = False
        self._ready: PackedLinear | None = None
        self._spec = spec_of(scheme, shape, self._parts)
        for name, (dtypes, size) in self._parts.items():
            dtype = sixteen if name == "outliers" else dtypes[0]
            buffer = torch.empty(torch.Size(size).numel() if name == "codes" else size, dtype=dtype)
            self.register_buffer(buffer_name(name), buffer)

    @property
    def packed(self) -> PackedTensor:
        """The packed weight, sharing the buffers' memory."""
        return from_parts(self.scheme, self.shape, self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        """The parts of the packed weight by their names, codes first."""
        parts = {name: self._held(name) for name in self._parts}
        parts["codes"] = parts["codes"].view(self._parts["codes"][1])  # [out, bytes of a row]
        return parts

    def __setattr__(self, name: str, value: Any) -> None:
        """Take over a part without looking at what is held: torch asks for the attribute, which may be decoded."""
        if isinstance(value, Tensor) and name in self.__dict__.get("_buffers", ()):
            self._buffers[name] = value
        else:
            super().__setattr__(name, value)

    def _held(self, part: str) -> Tensor:
        """The buffer of a part."""
        held = self._buffers[buffer_name(part)]
        assert held is not None
        return held

    def multiply(self, x: Tensor) -> Tensor:
        """`x` [..., in] -> [..., out] through the kernel for this scheme and device, prepared at the first call."""
        if torch.compiler.is_compiling():
            # A graph holds the bytes; what a kernel derives from them is made when it runs.
            product: Tensor = linear_op(x, list(self._tensors().values()), self._spec, self.activations)
            return product
        return self.ready()(x)

    def ready(self) -> PackedLinear:
        """The packed weight with its kernel, prepared once."""
        if self._ready is None:
            self._ready = PackedLinear(self.packed, self.activations, self.deterministic)
        return self._ready

    def choose(self, activations: Activations) -> None:
        """Multiply by exact activations (`"float"`) or by ones rounded to 8 bits (`"int8"`, faster on CPUs)."""
        self.activations, self._ready = activations, None

    def make_deterministic(self, wanted: bool) -> None:
        """Let a row of the product be the same to the bit in any batch, which takes longer for many rows; or no longer."""
        self.deterministic, self._ready = wanted, None
        self._spec = spec_of(self.scheme, self.shape, self._parts, wanted)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _PackedBuffers:
        """Move the bytes with the model; a cast (`model.to(torch.bfloat16)`) does not change them."""
        self._ready = None  # the buffers move: what was prepared points at the old ones
        packed = {id(buffer) for buffer in self._buffers.values()}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            cast = id(tensor) in packed and moved.dtype != tensor.dtype
            return tensor.to(moved.device) if cast else moved

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._ready = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": None}  # made again where the copy lives

    def fill(self, packed: PackedTensor) -> None:
        """Take over the bytes of `packed`, without a copy."""
        self._ready = None
        for name, part in parts_of(packed):
            setattr(self, buffer_name(name), part.reshape(-1) if name == "codes" else part)

    def extra_repr(self) -> str:
        """Shape and scheme, as `print(model)` shows them."""
        return f"in_features={self.shape[1]}, out_features={self.shape[0]}, scheme={self.scheme}"


class QuantLinear(_PackedBuffers):
    """`y = x W^T + bias` with W held packed. `x` [..., in] -> [..., out] in the type of `x`."""

    def __init__(
        self,
        scheme: Scheme,
        shape: tuple[int, int],
        *,
        bias: bool = False,
        outliers: int = 0,
        sixteen: torch.dtype = torch.bfloat16,
        inputs: Inputs | None = None,
        rotated: bool = False,
    ) -> None:
        super().__init__(scheme, shape, outliers, sixteen)
        self.dtype = torch.get_default_dtype()
        self.decodes: Literal["no", "type", "yes"] = "no"
        self.inputs, self.rotated = inputs, rotated
        self._turn: tuple[Tensor, ...] | None = None
        self.in_features, self.out_features = shape[1], shape[0]
        self.bias = nn.Parameter(torch.empty(shape[0]), requires_grad=False) if bias else None  # [out]

    @property
    def weight(self) -> Tensor:
        """The buffer of that name; where the model's code reads it (`decodes`), the decoded weight [out, in], made anew.

        What is written into the latter is lost. Code that asks for its type alone gets a tensor without values.
        """
        codes = self._buffers.get("weight")
        if codes is None:  # while the module is made
            raise AttributeError("weight")
        if codes.is_meta or self.decodes == "no":
            return codes
        if self.decodes == "type":
            return torch.empty(0, self.in_features, dtype=self.dtype, device=codes.device)
        weight = decode(self.packed, self.dtype)  # [out, in]
        return turn_inputs(weight, turn_factors(self.in_features, codes.device)) if self.rotated else weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        self.dtype = _cast(fn, self.dtype, self._held("codes").device)
        super()._apply(fn, recurse)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Multiply `x` [..., in], rotated and rounded as the checkpoint says, by the packed weight."""
        x = self._turned(x) if self.rotated else x
        y = self.multiply(x) if self.inputs is None else self._multiply_rounded(x, self.inputs)
        return y if self.bias is None else y + self.bias

    def _turned(self, x: Tensor) -> Tensor:
        """`x` [..., in] times the Hadamard matrix; the weight has been multiplied by its inverse."""
        if self._turn is None or any(factor.device != x.device for factor in self._turn):
            self._turn = turn_factors(self.in_features, x.device)
        return turn_inputs(x, self._turn)

    def _multiply_rounded(self, x: Tensor, inputs: Inputs) -> Tensor:
        """The product of `x` [..., in] rounded as `inputs` says, in integers where that is faster."""
        packed = self.packed
        if not self.deterministic and is_int8(packed, inputs) and int8_pays(packed, x.numel() // x.shape[-1]):
            return int8_product(x, packed, inputs)
        return self.multiply(round_inputs(x, inputs))


def is_plain(module: nn.Module) -> bool:
    """Whether a packed linear does nothing but multiply and add a bias: no hook sees it, and its inputs are as they come."""
    if not isinstance(module, QuantLinear) or module.inputs is not None or module.rotated:
        return False
    return not (module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module))


def through_each(linears: Sequence[QuantLinear], x: Tensor, sizes: Sequence[int]) -> Tensor:
    """The next of `sizes` rows of `x` [n, in] through each of the linears, which are plain and of one shape: [n, out]."""
    y = multiply_each([linear.ready() for linear in linears], x, sizes)  # [n, out]
    if all(linear.bias is None for linear in linears):
        return y
    parts = zip(linears, y.split(list(sizes)), strict=True)
    return torch.cat([part if linear.bias is None else part + linear.bias for linear, part in parts])


class QuantEmbedding(_PackedBuffers):
    """Rows of a packed `[vocabulary, width]` matrix, times `factor` (Gemma's scaled embedding; 1 elsewhere)."""

    def __init__(
        self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, factor: float = 1.0
    ) -> None:
        super().__init__(scheme, shape, 0, torch.bfloat16)
        self.num_embeddings, self.embedding_dim = shape
        self.dtype, self.factor = dtype, factor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantEmbedding:
        self.dtype = _cast(fn, self.dtype, self._held("codes").device)
        super()._apply(fn, recurse)
        return self

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings [..., width] of token `ids` [...]; only the rows asked for are decoded."""
        flat = ids.reshape(-1)  # [tokens]
        if torch.compiler.is_compiling():
            rows: Tensor = rows_op(flat, list(self._tensors().values()), self._spec)
        else:
            rows = decode_rows(self.packed, flat)  # [tokens, width]
        return (rows * self.factor).to(self.dtype).view(*ids.shape, -1)  # [..., width]


class TiedCopy(nn.Module):
    """A module that shares its weight with another of its kind: blocks that repeat (Zamba), a second embedding table."""

    def __init__(self, owner: QuantLinear | QuantEmbedding) -> None:
        super().__init__()
        self._shared = (owner,)  # a tuple hides it from the module tree: the bytes are saved once

    @property
    def weight(self) -> Tensor:
        """That of the other module."""
        return getattr(self._shared[0], "weight")  # type: ignore[no-any-return]  # noqa: B009

    def forward(self, x: Tensor) -> Tensor:
        """What the other module gives for `x`."""
        return self._shared[0](x)  # type: ignore[no-any-return]


class TiedHead(nn.Module):
    """The output head of a model with quantized and tied embeddings: multiplies by the embedding's own bytes."""

    def __init__(self, embedding: QuantEmbedding) -> None:
        super().__init__()
        self._shared = (embedding,)  # a tuple hides it from the module tree: the bytes are saved once

    @property
    def embedding(self) -> QuantEmbedding:
        """The embedding with the bytes that are multiplied."""
        return self._shared[0]

    @property
    def weight(self) -> Tensor:
        """A tensor without values, of the type and on the device of the model: code of models asks a head for both."""
        owner = self.embedding
        return torch.empty(
            0, owner.embedding_dim, dtype=owner.dtype, device=owner.get_buffer("weight").device
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., vocabulary] of hidden states `x` [..., width]."""
        return self.embedding.multiply(x)


def _cast(fn: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type that `fn`, which moves or casts the tensors of a module, makes of floats of type `dtype`."""
    return fn(torch.empty(0, dtype=dtype, device=device)).dtype


def buffer_name(part: str) -> str:
    """Name of the buffer that holds a part of a packed tensor; in a file it follows the layer's name."""
    return "weight" if part == "codes" else f"weight_{part}"
