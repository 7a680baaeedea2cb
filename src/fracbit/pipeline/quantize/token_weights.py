"""How much each token counts at each linear: the size of the gradient of the end loss at its output.

    s_t = root of the mean over outputs j of (dl / dz_tj)^2, divided by its mean over tokens;    H = sum of s_t x_t x_t^T

z = W x are the outputs of the linear in the float model, l the sum of next-token losses on the calibration samples. This is
eq. 7 of GuidedQuant (Kim et al. 2025, arXiv:2505.07004) with one group of outputs, but for the root: squares have heavy tails,
a few tokens make up most of H, and less was gained with them (docs/LOG.md). One backward pass gives the weights of all linears
(models/backward.py).

Experts of a mixture see the tokens that are routed to them, and the quantized chain may route otherwise: they have no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fracbit.checkpoint.output import Shards
from fracbit.models.backward import Stack, gradient_squares
from fracbit.models.blocks import blocks
from fracbit.models.install import materialize, release
from fracbit.models.walk import Hidden
from fracbit.pipeline.quantize.observe import is_expert
from fracbit.pipeline.quantize.reader import read_items
from fracbit.pipeline.quantize.schedule import Item
from fracbit.pipeline.quantize.shared import borrowed_floats
from fracbit.pipeline.quantize.work import Work, walk_key
from fracbit.records.progress import WEIGHING, phase

FILE = "token-weights.safetensors"


def token_weights(work: Work, target: Shards, embed: Callable[[], Hidden]) -> Mapping[str, Tensor]:
    """The weights [samples * tokens] fp32 of every linear by its full name, mean 1; from an earlier run where there is one.

    `embed` gives the states at the first block of the model as it is in the source: a rotation does not change gradients at the
    outputs of linears.
    """
    path = None if target.journal is None else target.journal / FILE
    if path is not None and path.is_file():
        return load_file(path)
    known = {} if work.memory is None else work.memory.token_weights
    key = walk_key(work)
    if key not in known:
        known[key] = _measured(work, embed())
    if path is not None:
        part = path.with_suffix(".tmp")
        save_file(dict(known[key]), part)
        part.replace(path)
    return known[key]


def _measured(work: Work, hidden: Hidden) -> dict[str, Tensor]:
    assert work.samples is not None
    squares = gradient_squares(stack_of(work), hidden, work.samples.ids, phase(work.show, WEIGHING))
    sizes = {name: each.sqrt() for name, each in squares.items() if not is_expert(_inside(work, name))}
    return {name: each / each.mean().clamp(min=torch.finfo(each.dtype).tiny) for name, each in sizes.items()}


def _inside(work: Work, name: str) -> str:
    """The name of a linear inside its block."""
    return name.removeprefix(f"{work.opened.family.blocks}.").partition(".")[2]


def stack_of(work: Work) -> Stack:
    """The float model of a run; its blocks are read from the source while they are used."""
    shards: Sequence[Sequence[Item]] = list(work.schedule.shards.values())[1:]

    @contextmanager
    def loaded(number: int) -> Iterator[nn.Module]:
        path, module = blocks(work.opened.model, work.opened.family)[number]
        tensors = read_items(work.reader, shards[number])[0]
        inside = {name.removeprefix(f"{path}."): tensor for name, tensor in tensors.items()}
        inside |= borrowed_floats(work, path)
        materialize(module, inside, work.dtype, work.device)
        try:
            yield module
        finally:
            release(module)

    return Stack(work.opened.model, work.opened.family, loaded)
