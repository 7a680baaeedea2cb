"""The table of families tells the truth about every architecture: laws over tiny random models."""

from collections import Counter

import torch
from transformers import PreTrainedModel

from fracbit.models.blocks import (
    blocks,
    expand,
    groups,
    is_linear,
    linears,
    norms,
    pairs,
    source_rows,
    sublayer_of,
    weight_of,
)
from fracbit.models.experts import split_experts
from fracbit.models.families import FAMILIES
from fracbit.models.family import Norm
from fracbit.models.find import discover, family_of
from fracbit.models.fold import fold_norm, fold_pair, scaling_sites, tie
from fracbit.models.install import materialize, release
from fracbit.models.walk import advance, embed, peek, record, replay
from outputs import logits
from tensors import seeded


def test_names_are_unique_and_every_entry_is_reachable() -> None:
    names = Counter(family.name for family in FAMILIES)
    assert max(names.values()) == 1


def test_every_linear_is_found_exactly_once(model: PreTrainedModel) -> None:
    split_experts(model)
    family = family_of(model)
    assert not family.note
    for _, block in blocks(model, family):
        found = [name for group in groups(block, family) for name in group]
        kept = expand(block, family.keep_float)
        scan = {name for name, module in block.named_modules() if is_linear(module)}
        assert max(Counter(found).values()) == 1
        assert set(found) | (set(kept) & scan) == scan
        assert not set(found) & set(kept)


def test_groups_share_one_input_and_no_other_linear_has_it(
    model: PreTrainedModel, tokens: torch.Tensor
) -> None:
    split_experts(model)
    family = family_of(model)
    hidden = embed(model, family, tokens)
    for _, block in blocks(model, family):
        inputs: dict[str, torch.Tensor] = {}
        peek(block, hidden, list(linears(block, family)), inputs.__setitem__)
        for one in inputs:
            for other in inputs:
                together = any(one in group and other in group for group in groups(block, family))
                same = inputs[one].shape == inputs[other].shape and torch.equal(inputs[one], inputs[other])
                # Experts of one block may see the same tokens by chance, and shared experts see those of
                # none.
                if together or "experts" not in one + other:
                    assert together == same, (one, other)
        hidden = advance(block, hidden)


def test_order_of_groups_is_order_of_use(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    split_experts(model)
    family = family_of(model)
    hidden = embed(model, family, tokens)
    for _, block in blocks(model, family):
        seen: list[str] = []
        peek(block, hidden, list(linears(block, family)), lambda name, _, seen=seen: seen.append(name))
        position = {name: index for index, group in enumerate(groups(block, family)) for name in group}
        first_use = list(dict.fromkeys(position[name] for name in seen if "experts." not in name))
        assert first_use == sorted(first_use)
        hidden = advance(block, hidden)


def test_rescaling_norm_gains_and_their_readers_changes_nothing(
    model: PreTrainedModel, tokens: torch.Tensor
) -> None:
    split_experts(model)
    family = family_of(model)
    before = model(tokens).logits
    done = 0
    for _, block in blocks(model, family):
        for norm in norms(block, family):
            if norm.exclusive:
                _rescale_norm(block, family.gain_offset, norm.name, norm.readers)
                done += 1
    torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-5)
    wanted = 0 if "norms last" in family.name or "after the norm" in family.name else 1
    assert done >= wanted * len(blocks(model, family))


def _rescale_norm(block: torch.nn.Module, gain_offset: float, name: str, readers: tuple[str, ...]) -> None:
    norm = block.get_submodule(name)
    scale = torch.exp(torch.randn(norm.weight.shape))
    with torch.no_grad():
        norm.weight.copy_((norm.weight + gain_offset) * scale - gain_offset)
        if getattr(norm, "bias", None) is not None:
            norm.bias.mul_(scale)
        for reader in readers:
            module = block.get_submodule(reader)
            transposed = type(module).__name__ == "Conv1D"
            module.weight.copy_(module.weight / (scale[:, None] if transposed else scale))


def test_rescaling_scaling_pairs_changes_nothing(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    split_experts(model)
    family = family_of(model)
    before = model(tokens).logits
    done = 0
    for _, block in blocks(model, family):
        for pair in pairs(block, family, model.config):
            rows = source_rows(block, pair, model.config)
            source = block.get_submodule(pair.source)
            conv = type(source).__name__ == "Conv1D"
            scale = torch.ones(source.weight.shape[1 if conv else 0])
            scale[rows.unique()] = torch.exp(torch.randn(len(rows.unique())))
            with torch.no_grad():
                source.weight.mul_(scale if conv else scale[:, None])
                if getattr(source, "bias", None) is not None:
                    source.bias.mul_(scale)
                for reader in pair.readers:
                    weight = block.get_submodule(reader).weight
                    weight.div_(scale[rows][:, None] if conv else scale[rows])
            done += 1
    torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-5)
    assert done >= len(blocks(model, family))


def test_units_replay_and_feel_their_linears(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    split_experts(model)
    family = family_of(model)
    hidden = embed(model, family, tokens)
    for _, block in blocks(model, family)[:1]:
        for name, module in linears(block, family).items():
            unit = sublayer_of(family, name)
            calls = record(block, hidden, unit)
            if "experts." in name and not calls:
                continue
            with torch.no_grad():
                before = replay(block, unit, calls[0])
                module.weight.mul_(1.5)
                after = replay(block, unit, calls[0])
                module.weight.div_(1.5)
            assert not torch.allclose(before, after), name


def test_release_and_materialize_are_inverse(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    family = family_of(model)
    before = model(tokens).logits
    for _, block in blocks(model, family):
        state = {name: value.clone() for name, value in block.state_dict().items()}
        kinds = {name: type(value) for name, value in block.named_parameters()}
        release(block)
        assert all(value.is_meta for value in block.state_dict().values())
        materialize(block, state)
        assert kinds == {name: type(value) for name, value in block.named_parameters()}
    assert torch.equal(model(tokens).logits, before)


def test_structure_agrees_with_the_table(model: PreTrainedModel) -> None:
    split_experts(model)
    known, found = family_of(model), discover(model)
    assert found.blocks == known.blocks
    assert found.head == known.head
    assert found.embeddings == known.embeddings[:1]
    for _, block in blocks(model, known):
        # BLOOM's code reads some weights, on a path that no released model takes.
        left_out = set(linears(block, known)) - set(linears(block, found))
        assert left_out <= set(found.keep_float)
        assert set(linears(block, found)) <= set(linears(block, known))


def test_folding_any_factors_leaves_the_output(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    split_experts(model)
    before = logits(model, tokens)
    family, random, sites = family_of(model), seeded(2), 0
    for _, block in blocks(model, family):
        for readers, producer in scaling_sites(block, family, model.config):
            width = weight_of(block.get_submodule(readers[0])).shape[1]
            factors = torch.exp(torch.randn(width, generator=random))
            if isinstance(producer, Norm):
                fold_norm(block, family, producer, factors)
            else:
                fold_pair(block, producer, tie(block, producer, factors, model.config), model.config)
            sites += 1
    assert sites >= len(blocks(model, family))
    torch.testing.assert_close(logits(model, tokens), before, rtol=1e-4, atol=1e-5)
