"""The errors that the lens adds to a model: noise of a chosen strength, clipping, and rounding errors of schemes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from fracbit.errors import RecipeError, SchemeError, near_matches
from fracbit.numerics.datatypes import check_datatype
from fracbit.perturbation import (
    PERTURBATIONS,
    ScalingGroups,
    check_intensity,
    check_share,
    clipping,
    noise_on,
    perturb,
    perturb_like,
    perturbation,
    scheme_error,
)
from fracbit.records.allocation import read_level
from fracbit.records.scheme import Scheme

Error: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]
"""From a tensor x and a generator to the delta to add, of the same shape."""


def noise(kind: str, intensity: float, groups: ScalingGroups = "row") -> Error:
    """Noise of the table `PERTURBATIONS`, of this relative intensity in every scaling group. Raises `RecipeError`."""
    check_intensity(intensity)
    perturbation(kind)
    return lambda x, generator: perturb(x, kind, intensity, groups, generator=generator)


def rounding(scheme: Scheme) -> Error:
    """The error of round-to-nearest under `scheme`; it is not random."""
    return lambda x, generator: scheme_error(x, scheme)


def noise_like(kind: str, scheme: Scheme, groups: ScalingGroups | None = None) -> Error:
    """Noise with the L2 norm of the error of `scheme` in every scaling group."""
    perturbation(kind)
    return lambda x, generator: perturb_like(
        x, scheme_error(x, scheme), kind, groups or _groups_of(scheme, x), generator=generator
    )


def clip(share: float, groups: ScalingGroups = "row") -> Error:
    """Clipping of the largest `share` of |x| in every scaling group."""
    return lambda x, generator: clipping(x, share, groups)


def noise_like_clipping(share: float, groups: ScalingGroups = "row") -> Error:
    """The control for `clip`: Gaussian noise on the elements that clipping changes, with the norm of the change."""
    return lambda x, generator: noise_on(x, clipping(x, share, groups), generator)


def is_noise(kind: str) -> bool:
    """Whether a kind of error is drawn at a chosen intensity; the other kinds have a fixed one."""
    return kind in PERTURBATIONS


def named_error(kind: str, intensity: float) -> Error:
    """The error that a name stands for. Raises `RecipeError` for any other name.

    Names: noise of the table, at this intensity; clipping such as `clip:0.001`, the largest 0.1 % of every tensor; a
    scheme such as `int3z/64`.
    """
    if is_noise(kind):
        return noise(kind, intensity)
    return _share_or_scheme(kind, clip, rounding)


def control_for(kind: str) -> Error:
    """Gaussian noise as strong as clipping or a scheme: on the clipped elements, or in every block of the scheme."""
    return _share_or_scheme(kind, noise_like_clipping, partial(noise_like, "gaussian"))


def _share_or_scheme(
    kind: str, clipped: Callable[[float, ScalingGroups], Error], scheme: Callable[[Scheme], Error]
) -> Error:
    if kind.startswith("clip:"):
        try:
            share = float(kind.removeprefix("clip:"))
        except ValueError:
            share = math.nan
        check_share(share)
        return clipped(share, "tensor")
    try:
        level = read_level(kind)
    except SchemeError as error:
        raise RecipeError(
            f"unknown error {kind!r}; {near_matches(kind, PERTURBATIONS)}; or clip:0.001, or a scheme such as int3z/64"
        ) from error
    if level is None:
        raise RecipeError("float makes no error; name noise, clip:0.001 or a scheme such as int3z/64")
    check_datatype(level)
    return scheme(level)


def _groups_of(scheme: Scheme, x: Tensor) -> ScalingGroups:
    """The blocks of the scheme for weights; rows for activations [samples, tokens, in]."""
    return scheme if x.dim() == 2 else "row"
