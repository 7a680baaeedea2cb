"""`torch.ops.fracbit.linear`: the packed product as an operator that torch.compile, export and autograd understand.

    fracbit::linear(Tensor x, Tensor[] parts, str spec, str activations) -> Tensor
    fracbit::rows(Tensor rows, Tensor[] parts, str spec) -> Tensor

`parts` are the tensors of the packed weight, codes first; `spec` is the rest of it as JSON (`spec_of`): scheme, shape, names of
the parts. So a graph holds the packed buffers and nothing else. Kernels derive small tables from a weight when they first
see it; these live as long as the tensor of codes, and are made again when a part was written to.

The gradient with respect to `x` is grad @ W; the packed weight itself is not trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, MutableMapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fracbit.kernels.kernel import Kernel, check_activations, check_input
from fracbit.kernels.table import choose
from fracbit.numerics.packed import PackedTensor, decode, decode_rows, from_parts
from fracbit.records.scheme import Scheme

_Entry = tuple[tuple[int, ...], tuple[int, ...], str, Kernel, Any]
_prepared: MutableMapping[Tensor, _Entry] = WeakIdKeyDictionary()


def spec_of(scheme: Scheme, shape: tuple[int, int], names: Iterable[str], deterministic: bool = False) -> str:
    """Everything about a packed weight that is not a tensor, as JSON: the `spec` of the operator. `names` of its parts.

    `deterministic`: as in `PackedLinear`.
    """
    told = {"scheme": scheme.to_json(), "shape": list(shape), "parts": list(names)}
    return json.dumps(told | ({"deterministic": True} if deterministic else {}))


def packed_of(parts: list[Tensor], spec: str) -> PackedTensor:
    """The weight of `parts` and `spec_of`. Raises `FormatError` when a part does not fit."""
    scheme, shape, names = _read(spec)
    return from_parts(scheme, shape, dict(zip(names, parts, strict=True)))


@torch.library.custom_op("fracbit::linear", mutates_args=())
def linear_op(x: Tensor, parts: list[Tensor], spec: str, activations: str) -> Tensor:
    """`x` [..., in] times the packed weight: [..., out] in the type of `x`."""
    kernel, prepared = _kernel_for(parts, spec, activations)
    rows, columns = _read(spec)[1]
    check_input(x, columns, parts[0].device)
    flat = x.reshape(-1, columns)  # [tokens, in]
    flat = flat if flat.stride(1) == 1 and flat.stride(0) >= columns else flat.contiguous()
    run = kernel.runner(_is_deterministic(spec))
    return run(prepared, flat).view(*x.shape[:-1], rows)  # [..., out]


@linear_op.register_fake
def _(x: Tensor, parts: list[Tensor], spec: str, activations: str) -> Tensor:
    check_activations(activations)
    rows, columns = _read(spec)[1]
    check_input(x, columns, parts[0].device)
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.custom_op("fracbit::linear_gradient", mutates_args=())
def gradient_op(grad: Tensor, parts: list[Tensor], spec: str) -> Tensor:
    """`grad` [..., out] times the packed weight: [..., in], the gradient of `linear` with respect to its input."""
    return grad @ decode(packed_of(parts, spec), grad.dtype)  # [..., in]


@gradient_op.register_fake
def _(grad: Tensor, parts: list[Tensor], spec: str) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], _read(spec)[1][1]))


@torch.library.custom_op("fracbit::rows", mutates_args=())
def rows_op(rows: Tensor, parts: list[Tensor], spec: str) -> Tensor:
    """Rows `rows` [n] of the packed weight, fp32 [n, in]: an embedding's lookup."""
    return decode_rows(packed_of(parts, spec), rows)


@rows_op.register_fake
def _(rows: Tensor, parts: list[Tensor], spec: str) -> Tensor:
    return parts[0].new_empty((rows.shape[0], _read(spec)[1][1]), dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Tensor, list[Tensor], str, str], output: Tensor) -> None:
    _, parts, ctx.spec, _ = inputs
    ctx.save_for_backward(*parts)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, list[None], None, None]:
    parts = list(ctx.saved_tensors)
    return gradient_op(grad, parts, ctx.spec), [None] * len(parts), None, None


linear_op.register_autograd(_gradient, setup_context=_keep)


def _kernel_for(parts: list[Tensor], spec: str, activations: str) -> tuple[Kernel, Any]:
    """The kernel for a weight, and what it prepared; prepared again when a part is another tensor or was written to."""
    names = tuple(id(part) for part in parts)
    versions = tuple(0 if part.is_inference() else part._version for part in parts)
    entry = _prepared.get(parts[0])
    if entry is not None and entry[:3] == (names, versions, spec + activations):
        return entry[3], entry[4]
    packed = packed_of(parts, spec)
    kernel = choose(packed.scheme, parts[0].device, packed.shape)
    check_activations(activations)
    prepared = kernel.prepare(packed, activations)  # type: ignore[arg-type]
    _prepared[parts[0]] = (names, versions, spec + activations, kernel, prepared)
    return kernel, prepared


@lru_cache(maxsize=4096)
def _is_deterministic(spec: str) -> bool:
    return bool(json.loads(spec).get("deterministic"))


@lru_cache(maxsize=4096)
def _read(spec: str) -> tuple[Scheme, tuple[int, int], tuple[str, ...]]:
    data = json.loads(spec)
    return Scheme.from_json(data["scheme"]), (data["shape"][0], data["shape"][1]), tuple(data["parts"])
