"""Which way blocks should run, told from the scales alone: AdaDim without its trials.

Blocks along the output (one input column) win where columns differ more in size than rows do: the scale of a block is then not
shared between neighbours of unlike size. A rounding error is spread evenly over a step, so its expected square is the scale's,
up to a constant that both axes share, and an error in column j counts with the energy h_j of that input:

    axis = argmin sum_ij scale_axis(i, j)^2 h_j.

Two passes over the weight, nothing is rounded. AdaDim itself (Heo et al. 2023, arXiv:2309.15531, Eq. 1) tries both and compares
what the unit around the linear gives: pipeline/quantize/axis.py. bench/calibrated/measure.py says how often the two agree.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fracbit.numerics.layout import spread
from fracbit.numerics.ranges import fit
from fracbit.records.scheme import Axis, Scheme


def expected_error(weight: Tensor, scheme: Scheme, energy: Tensor | None = None) -> float:
    """Sum of the squared scale over the weights [out, in], by input `energy` [in]: to compare schemes of one type and width."""
    plain = replace(
        scheme, dtype="int", bits=4, scale="fp32"
    )  # places the blocks' ranges as any type does, and fits no table
    grid = fit(weight.float(), plain)
    squares = spread(grid.scale, grid.shape, plain).expand(grid.shape).square().sum(0)  # [in]
    return float((squares if energy is None else squares * energy).sum())


def predicted_axis(weight: Tensor, scheme: Scheme, energy: Tensor | None = None) -> Axis:
    """The axis that the scales speak for; `in` where they are even."""
    along_in = expected_error(weight, replace(scheme, axis="in"), energy)
    along_out = expected_error(weight, replace(scheme, axis="out"), energy)
    return "out" if along_out < along_in else "in"
