"""AQLM: groups of weights as sums of vectors, one of every codebook, times a scale for their outputs (Egiazarian et al. 2024).

    codes int [out / a, in / b, codebooks]   codebooks [codebooks, 2^bits, a, b]   scales [out / a, 1, 1, 1]

    w[i a + r, j b + c] = scales[i] * sum over k of codebooks[k, codes[i, j, k], r, c]

A code is stored in the least signed integer that has its bits, so the upper half of them are negative numbers.

Ref: arXiv:2401.06118.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fracbit.checkpoint.formats.codes import decoded_type
from fracbit.checkpoint.formats.decoding import Decoding, Part
from fracbit.checkpoint.formats.known import Decoded, SourceFormat
from fracbit.checkpoint.source import FLOATS, Source, TensorInfo
from fracbit.errors import SourceError

CODES, BOOKS, SCALES = ".codes", ".codebooks", ".scales"
INTEGERS = ("I8", "I16", "I32")


def seen(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether integers have codebooks beside them."""
    return any(
        name.endswith(CODES) and info.dtype in INTEGERS and name.removesuffix(CODES) + BOOKS in tensors
        for name, info in tensors.items()
    )


def decode(source: Source, settings: Mapping[str, Any]) -> Decoded:
    """Every layer with codes. Raises `SourceError` naming a tensor that is missing or does not fit."""
    layers = [name.removesuffix(CODES) for name in source.tensors if name.endswith(CODES)]
    if not layers:
        return Decoded("", {})
    found = {f"{layer}.weight": _decoding(source, layer) for layer in layers}
    shapes = {source.tensors[layer + BOOKS].shape for layer in layers}
    kinds = sorted(f"{books}x{size.bit_length() - 1}" for books, size, *_ in shapes)
    return Decoded(f"AQLM, {', '.join(dict.fromkeys(kinds))}", found)


def _decoding(source: Source, layer: str) -> Decoding:
    parts = {"codes": layer + CODES, "books": layer + BOOKS, "scales": layer + SCALES}
    infos = {role: source.tensors.get(name) for role, name in parts.items()}
    codes, books, scales = infos["codes"], infos["books"], infos["scales"]
    if codes is None or books is None or scales is None or not _fits(codes, books, scales):
        held = [
            "no " + role if info is None else f"{role} {info.dtype} {list(info.shape)}"
            for role, info in infos.items()
        ]
        raise SourceError(
            f"{source.name}: {layer} has {', '.join(held)}; AQLM has integer codes [out groups, in groups, codebooks], floats "
            "[codebooks, 2^bits, out group, in group] and scales [out groups, 1, 1, 1]: fetch the checkpoint again"
        )
    _, size, rows, columns = books.shape

    def values(tensors: Mapping[str, Tensor]) -> Tensor:
        chosen = tensors["codes"].long() % size  # [out groups, in groups, codebooks]
        vectors = tensors["books"].float()  # [codebooks, size, rows, columns]
        summed = torch.stack([book[chosen[..., k]] for k, book in enumerate(vectors)]).sum(0)
        groups = summed * tensors["scales"].float()  # [out groups, in groups, rows, columns]
        return groups.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # [out, in]

    return Decoding(
        TensorInfo(
            codes.file, decoded_type(source, scales), (codes.shape[0] * rows, codes.shape[1] * columns)
        ),
        {
            "codes": Part(parts["codes"], rows=rows),
            "books": Part(parts["books"]),
            "scales": Part(parts["scales"], rows=rows),
        },
        values,
        scheme=f"AQLM, {books.shape[0]} codebooks of {size} vectors [{rows}, {columns}]",
    )


def _fits(codes: TensorInfo, books: TensorInfo, scales: TensorInfo) -> bool:
    """Whether types and shapes are those of the format."""
    shaped = len(codes.shape) == 3 and len(books.shape) == 4 and codes.dtype in INTEGERS
    floats = books.dtype in FLOATS and scales.dtype in FLOATS
    if not shaped or not floats:
        return False
    groups = (codes.shape[0], 1, 1, 1)
    return scales.shape == groups and codes.shape[2] == books.shape[0] and books.shape[1].bit_count() == 1


AQLM = SourceFormat(seen, decode)
