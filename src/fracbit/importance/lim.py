"""LIM, layer input modification: how far a block turns its input. Dumitru et al. 2024, arXiv:2406.17415, section 3.1.

    LIM(l) = - mean over tokens of <x, y> / (|x| |y|)       x: raw input of block l, y: its raw output, residual included

Larger (less alike) is more important. Position 0 is dropped: the first token holds activations hundreds of times larger than
all others and would decide the score of the early blocks alone. The raw output of the last block is taken before the final
norm; transformers' `hidden_states[-1]` is behind it, which makes the last block look important by the norm's gain and
probably explains the paper's third most important layer of LLaMA-2-13B, its last. `lim-final-norm` offers that reading.

LIM + 1 is ShortGPT's block influence: the two orders are one.
"""

from torch import Tensor

from fracbit.errors import DataError
from fracbit.importance.methods import ScoreMethod
from fracbit.importance.view import LayerView


def cosine_sum(entering: Tensor, leaving: Tensor, skip: int = 1) -> tuple[float, int]:
    """Sum of per-token cosines and how many were summed; states [samples, tokens, width], the first `skip` positions dropped.

    A token whose state is zero on either side counts as cosine 0. Raises `DataError` when no position is left.
    """
    if entering.shape[1] <= skip:
        raise DataError(
            f"samples of {entering.shape[1]} tokens leave none when the first {skip} are dropped; use longer ones"
        )
    x, y = entering[:, skip:].double(), leaving[:, skip:].double()  # [samples, tokens, width]
    norms = x.norm(dim=-1) * y.norm(dim=-1)  # [samples, tokens]
    cosines = (x * y).sum(-1) / norms.clamp(min=1e-300)
    return float(cosines.sum()), cosines.numel()


def layer_input_modification(view: LayerView) -> float:
    """LIM of the unit's block, in [-1, 1]; a linear has that of its block."""
    if view.cosine is None:
        raise ValueError(f"LIM of {view.name} needs the cosine of its block's input and output")
    return -view.cosine


LIM = ScoreMethod(
    "negative cosine of block input and output", layer_input_modification, needs=frozenset({"cosine"})
)
BEHIND_THE_FINAL_NORM = ScoreMethod(
    "lim, the last block read behind the final norm",
    layer_input_modification,
    needs=frozenset({"cosine behind the final norm"}),
)
