"""The errors that the lens puts into a model: noise of a chosen strength, clipping, and what schemes really do."""

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
"""What to add to a tensor: x and a generator in, delta of the same shape out."""


def noise(kind: str, intensity: float, groups: ScalingGroups = "row") -> Error:
    """Noise of the table `PERTURBATIONS`, of this relative intensity in every scaling group. Raises `RecipeError`."""
    check_intensity(intensity)
    perturbation(kind)
    return lambda x, generator: perturb(x, kind, intensity, groups, generator=generator)


def rounding(scheme: Scheme) -> Error:
    """The error that round-to-nearest under `scheme` really makes; no chance in it."""
    return lambda x, generator: scheme_error(x, scheme)


def noise_like(kind: str, scheme: Scheme, groups: ScalingGroups | None = None) -> Error:
    """Noise that has, in every scaling group, the L2 norm of the error that `scheme` makes there."""
    perturbation(kind)
    return lambda x, generator: perturb_like(
        x, scheme_error(x, scheme), kind, groups or _groups_of(scheme, x), generator=generator
    )


def clip(share: float, groups: ScalingGroups = "row") -> Error:
    """Clipping of the largest `share` of |x| in every scaling group."""
    return lambda x, generator: clipping(x, share, groups)


def noise_like_clipping(share: float, groups: ScalingGroups = "row") -> Error:
    """The control for `clip`: Gaussian noise on the elements that it moves, of the norm that it moves them by."""
    return lambda x, generator: noise_on(x, clipping(x, share, groups), generator)


def is_noise(kind: str) -> bool:
    """Whether a kind of error is drawn at an intensity that one chooses; the others are what they are."""
    return kind in PERTURBATIONS


def named_error(kind: str, intensity: float) -> Error:
    """The error that a word stands for: noise of the table at this intensity, clipping such as `clip:0.001` of the largest in
    every tensor, or what a scheme such as `int3z/64` really does. Raises `RecipeError` for anything else.
    """
    if is_noise(kind):
        return noise(kind, intensity)
    return _share_or_scheme(kind, clip, rounding)


def control_for(kind: str) -> Error:
    """Gaussian noise as strong as clipping or a scheme: on the elements that are clipped, or in every block of the scheme."""
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
    """A scheme's blocks, for weights; activations [samples, tokens, in] have them inside a token only when they divide."""
    return scheme if x.dim() == 2 else "row"
