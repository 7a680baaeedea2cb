"""Which way blocks should run, told from the scales of a weight alone: AdaDim without its trials.

Blocks along the output (one input column) win where columns differ more in size than rows do: the scale of a block is then
not shared between neighbours of unlike size. So the spread of the logarithm of the columns' largest weights, less that of the
rows', decides; columns count by the energy of their inputs, since an error in a dead column costs nothing. AdaDim itself
(Heo et al. 2023, arXiv:2309.15531, Eq. 1) tries both and compares what the unit around the linear gives: pipeline/axis.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fracbit.records.scheme import Axis


def scale_spread(weight: Tensor, energy: Tensor | None = None) -> float:
    """Spread of log column size minus spread of log row size (nats) of `weight` [out, in]; `energy` [in] weights the columns.

    Above 0, columns differ more than rows: blocks along the output should win.
    """
    size = weight.float().abs()
    return _log_spread(size.amax(0), energy) - _log_spread(size.amax(1), None)


def predicted_axis(weight: Tensor, energy: Tensor | None = None) -> Axis:
    """The axis that the scales speak for."""
    return "out" if scale_spread(weight, energy) > 0 else "in"


def _log_spread(size: Tensor, mass: Tensor | None) -> float:
    """Weighted standard deviation of log size; lines of zeros do not count."""
    mass = torch.ones_like(size) if mass is None else mass
    alive = (size > 0) & (mass > 0)
    if not bool(alive.any()):
        return 0.0
    logs, share = size[alive].log(), mass[alive] / mass[alive].sum()
    mean = (share * logs).sum()
    return float((share * (logs - mean).square()).sum().sqrt())
