"""The linear algebra of error feedback: how an error made in one input column should move the others.

With H the (damped) Gram matrix of the inputs, a weight W quantized to Q costs tr((W - Q) H (W - Q)^T). Factor H = A A^T with A
upper triangular: the cost is ||(W - Q) A||^2, and column i of (W - Q) A is A_ii (q_i - t_i) with

    t_i = w_i + sum_{j<i} (w_j - q_j) A_ji / A_ii.                                                      (1)

Rounding t_i in order is GPTQ (Frantar et al. 2022, arXiv:2210.17323; this form is Babai's nearest plane, Chen et al. 2025,
arXiv:2507.18553): one Cholesky factorization and no inverse. With all other columns held, the best value of column i is

    t_i = w_i + sum_{j!=i} (w_j - q_j) H_ji / H_ii,                                                    (2)

which is coordinate descent. Both are "target = weight + error @ coupling", so one sweep serves both.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fracbit.errors import WeightError

DAMPING = 0.01  # of the mean diagonal, as GPTQ
LARGEST_DAMPING = 10.0
PANELS = 8  # of a product of which half suffices: 56 % of it is done
ROWS = 512  # of errors whose products are taken at a time
NARROWEST = 128  # columns; narrower panels cost more in calls than they save


@dataclass(frozen=True, eq=False)
class Coupling:
    """How errors feed back, in the order in which columns are visited.

    - `order` int64 [in]: the column visited first, second, ...
    - `matrix` fp32 [in, in] in visiting order: (1) is strictly upper triangular, (2) has a zero diagonal.
    - `damping` in units of the mean diagonal; more than was asked for when the factorization needed it.
    """

    order: Tensor
    matrix: Tensor
    damping: float
    causal: bool


def damped(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """`gram` [in, in] divided by its mean diagonal, plus `damping` on the diagonal; dead inputs (a zero there) get 1."""
    diagonal = gram.diagonal()  # [in]
    mean = diagonal.mean()
    if not bool(torch.isfinite(mean)):
        raise WeightError(
            "the gram matrix holds NaN or Inf: activations of the calibration data overflow; use a float32 model or other text"
        )
    result = gram / mean if float(mean) > 0 else torch.zeros_like(gram)  # [in, in]
    result.diagonal().add_(damping)
    result.diagonal()[diagonal <= 0] = 1.0
    return result


def by_energy(gram: Tensor) -> Tensor:
    """Columns [in] by falling input energy, GPTQ's activation order: important ones first, while others can still repair."""
    return gram.diagonal().argsort(descending=True, stable=True)


def feedback(gram: Tensor, order: Tensor, damping: float = DAMPING) -> Coupling:
    """Coupling (1) of GPTQ. Where the damped matrix is not positive definite, the damping is raised until it is.

    The upper factor in visiting order is the lower one of the reversed order, reversed again.
    """
    used, backwards = damping, order.flip(0)
    while True:
        matrix = damped(gram, used).index_select(0, backwards).index_select(1, backwards)  # [in, in]
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if int(failed):
            factor, failed = torch.linalg.cholesky_ex(matrix.double())
        if not int(failed):
            break
        used = max(used * 10, 1e-4)
        if used > LARGEST_DAMPING:
            raise WeightError(
                f"the gram matrix cannot be factored, even with a damping of {LARGEST_DAMPING:g}: the calibration activations "
                "are not finite; use a float32 model or other text"
            )
    upper = factor.div_(factor.diagonal().clone()).float().flip(0, 1)  # [in, in]
    return Coupling(order, upper.fill_diagonal_(0), used, causal=True)


def descent(gram: Tensor, order: Tensor, damping: float = DAMPING) -> Coupling:
    """Coupling (2) of coordinate descent, in the same order as GPTQ's."""
    matrix = damped(gram, damping)[order][:, order]  # [in, in]
    matrix = matrix / matrix.diagonal()  # [in, in]
    matrix.fill_diagonal_(0)
    return Coupling(order, matrix, damping, causal=False)


def eliminate(
    gram: Tensor, quantized: Tensor, free: Tensor, damping: float = DAMPING
) -> tuple[Tensor, Tensor]:
    """The gram matrix of the `quantized` columns when the `free` ones follow optimally, and how they follow.

    Returns the Schur complement [quantized, quantized] and `follow` [quantized, free]: the best change of the free columns
    for an error E of the quantized ones is `E @ follow`.
    """
    matrix = damped(gram, damping)  # [in, in]
    cross = matrix[quantized][:, free]  # [quantized, free]
    follow = torch.linalg.solve(
        matrix[free][:, free].double(), cross.T.double()
    ).T.float()  # [quantized, free]
    return gram[quantized][:, quantized] - _scale_of(gram) * (follow @ cross.T), follow


def gram_errors(error: Tensor, gram: Tensor) -> Tensor:
    """Each row's part of tr(E G E^T): [out] for `error` [out, in] and a symmetric `gram` [in, in].

    Only the panels of the upper triangle are multiplied, since the lower one would give the same numbers. Rows go in runs
    of `ROWS`, so that products stay in the cache.
    """
    return torch.cat([_gram_errors(part.contiguous(), gram) for part in error.split(ROWS)])


def _gram_errors(error: Tensor, gram: Tensor) -> Tensor:
    total = error.new_zeros(len(error))  # [rows]
    for first, last in panels(error.shape[1]):
        part = error[:, first:last]  # [rows, panel]
        product = part @ gram[first:last, first:]  # [rows, in - first]
        product[:, last - first :] *= 2
        total += product.mul_(error[:, first:]).sum(1)
    return total


def add_gram(gram: Tensor, x: Tensor) -> Tensor:
    """`gram` [in, in] + x^T x of `x` [tokens, in]; the upper panels are multiplied, the lower ones mirrored."""
    result, x = torch.empty_like(gram), x.float()
    for first, last in panels(gram.shape[0]):
        part = torch.addmm(gram[first:last, first:], x[:, first:last].T, x[:, first:])  # [panel, in - first]
        result[first:last, first:] = part
        result[last:, first:last] = part[:, last - first :].T
    return result


def panels(width: int) -> list[tuple[int, int]]:
    """Columns cut into runs for products of which half suffices; narrow matrices stay whole."""
    count = min(PANELS, max(1, width // NARROWEST))
    edges = [width * number // count for number in range(count + 1)]
    return list(pairwise(edges))


def _scale_of(gram: Tensor) -> Tensor:
    return gram.diagonal().mean()
