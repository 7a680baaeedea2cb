"""Operators for graphs that vLLM compiles: they run with any number of tokens, and dynamo does not look inside them.

    fracbit::round_inputs(Tensor x, str inputs) -> Tensor
    fracbit::table_rows(Tensor ids, Tensor[] parts, str spec) -> Tensor

Products are `fracbit::linear` of fracbit.kernels.op.
"""

from __future__ import annotations

import json
from functools import lru_cache

import torch
from torch import Tensor

from fracbit.kernels.op import packed_of
from fracbit.numerics import activations
from fracbit.numerics.packed import decode_rows
from fracbit.records.inputs import Inputs


@torch.library.custom_op("fracbit::round_inputs", mutates_args=())
def round_inputs(x: Tensor, inputs: str) -> Tensor:
    """`x` [..., in] rounded as `inputs`, an `Inputs` in JSON, says; in the type of `x`."""
    return activations.round_inputs(x, _read(inputs))


@round_inputs.register_fake
def _(x: Tensor, inputs: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("fracbit::table_rows", mutates_args=())
def table_rows(ids: Tensor, parts: list[Tensor], spec: str) -> Tensor:
    """Rows `ids` [n] of the packed table of `parts` and `spec_of`, fp32 [n, width]."""
    return decode_rows(packed_of(parts, spec), ids)


@table_rows.register_fake
def _(ids: Tensor, parts: list[Tensor], spec: str) -> Tensor:
    return parts[0].new_empty((ids.shape[0], json.loads(spec)["shape"][1]), dtype=torch.float32)


@lru_cache(maxsize=64)
def _read(inputs: str) -> Inputs:
    return Inputs.from_json(json.loads(inputs))
