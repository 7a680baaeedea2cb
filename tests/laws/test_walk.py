"""Law: walking block by block equals the whole forward, for every family, also with one block in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from families import tiny_llama, walked
from fracbit.errors import KernelError, SourceError
from fracbit.models.blocks import blocks, groups, linears
from fracbit.models.experts import split_experts
from fracbit.models.find import family_of
from fracbit.models.install import materialize, release
from fracbit.models.skeleton import skeleton
from fracbit.models.walk import advance, embed, head, observe, peek


def test_walk_is_the_whole_forward(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        whole = model(tokens).logits
    torch.testing.assert_close(walked(model, tokens), whole, rtol=1e-5, atol=1e-5)


def test_walk_with_one_block_in_memory(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        whole = model(tokens).logits
    split_experts(model)
    state = model.state_dict()
    empty = skeleton(model.config)
    family = family_of(empty)
    inside = f"{family.blocks}."
    materialize(
        empty, {name: value for name, value in state.items() if not name.startswith(inside)}, partial=True
    )
    hidden = embed(empty, family, tokens, batch=3)
    for path, block in blocks(empty, family):
        own = {
            name.removeprefix(f"{path}."): value
            for name, value in state.items()
            if name.startswith(f"{path}.")
        }
        materialize(block, own)
        hidden = advance(block, hidden, out=hidden.states)
        release(block)
        assert all(parameter.is_meta for parameter in block.parameters())
    torch.testing.assert_close(head(empty, family, hidden), whole, rtol=1e-5, atol=1e-5)


def test_nothing_stays_behind(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    split_experts(model)
    before = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    walked(model, tokens)
    family = family_of(model)
    _, block = blocks(model, family)[0]
    hidden = embed(model, family, tokens)
    names = list(linears(block, family))

    def fail(name: str, x: torch.Tensor) -> None:
        raise ArithmeticError

    for watch in (observe, peek):
        with pytest.raises(ArithmeticError):
            watch(block, hidden, names, fail)
    assert before == {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_observe_shows_every_token_once(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    split_experts(model)
    family = family_of(model)
    hidden = embed(model, family, tokens, batch=2)
    for _, block in blocks(model, family):
        seen: dict[str, list[torch.Tensor]] = {}
        names = [group[0] for group in groups(block, family)]
        after = observe(block, hidden, names, lambda name, x, seen=seen: seen.setdefault(name, []).append(x))
        for name in seen:
            rows = torch.cat(seen[name])
            assert rows.shape[1] == block.get_submodule(name).weight.shape[0 if "Conv1D" in str(block) else 1]
            if ".experts." not in name:
                assert len(rows) == tokens.numel()
        torch.testing.assert_close(after.states, advance(block, hidden).states)
        hidden = after


def test_equal_arguments_are_kept_once(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    hidden = embed(model, family_of(model), tokens, batch=2)
    assert [(batch.start, batch.stop) for batch in hidden.batches] == [(0, 2), (2, 4), (4, 5)]
    assert hidden.batches[0].calls is hidden.batches[1].calls


def test_memory_that_ran_out_does_not_read_as_a_fault_of_the_model(tokens: torch.Tensor) -> None:
    model = tiny_llama()
    family = family_of(model)
    hidden = embed(model, family, tokens)
    _, block = blocks(model, family)[0]

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    block.forward = full
    with pytest.raises(
        SourceError, match=r"block 0 \(LlamaDecoderLayer\): memory ran out; take fewer samples"
    ):
        advance(block, hidden)
    model.model.embed_tokens.forward = full
    with pytest.raises(SourceError, match="memory ran out") as found:
        embed(model, family, tokens)
    assert isinstance(found.value.__cause__, torch.OutOfMemoryError)


def test_an_error_of_a_kernel_outside_the_blocks_is_told_as_it_is(tokens: torch.Tensor) -> None:
    model = tiny_llama()

    def wrong(*_: Any, **__: Any) -> None:
        raise KernelError("a buffer does not fit")

    model.model.embed_tokens.forward = wrong
    with pytest.raises(KernelError, match="does not fit"):
        embed(model, family_of(model), tokens)
