"""Walking block by block: where states are kept, what is shared between batches, and what is refused."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from families import walked
from fracbit.errors import DataError, OutputError, SourceError, WeightError
from fracbit.models.blocks import blocks
from fracbit.models.find import family_of
from fracbit.models.skeleton import skeleton
from fracbit.models.spill import storage
from fracbit.models.walk import Hidden, advance, embed, forward, head


def test_forward_is_differentiable(llama: PreTrainedModel, tokens: torch.Tensor) -> None:
    family = family_of(llama)
    hidden = embed(llama, family, tokens)
    _, block = blocks(llama, family)[0]
    forward(block, hidden.states, hidden.batches[0].calls[0]).sum().backward()
    assert block.get_parameter("input_layernorm.weight").grad is not None


def test_states_may_be_mapped_to_a_file(llama: PreTrainedModel, tokens: torch.Tensor, tmp_path: Path) -> None:
    family = family_of(llama)
    room = storage((5, 11, 40), torch.float32, tmp_path)
    hidden = embed(llama, family, tokens, 2, room=lambda shape, dtype: room)
    for _, block in blocks(llama, family):
        hidden = advance(block, hidden, out=room)
    torch.testing.assert_close(head(llama, family, hidden), llama(tokens).logits, rtol=1e-5, atol=1e-5)
    assert list(tmp_path.iterdir()) == []


def test_storage_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="set aside"):
        storage((1 << 30, 1 << 20), torch.float32, tmp_path)
    with pytest.raises(OutputError):
        storage((4,), torch.float32, tmp_path / "absent")


def test_a_bad_activation_names_layer_and_sample(llama: PreTrainedModel, tokens: torch.Tensor) -> None:
    family = family_of(llama)
    hidden = embed(llama, family, tokens, batch=2)
    hidden.states[3, 4, 5] = float("inf")
    _, block = blocks(llama, family)[0]
    with pytest.raises(WeightError, match="block 0 gives NaN or Inf for sample 3, first in input_layernorm"):
        advance(block, hidden)


@pytest.mark.parametrize(
    "bad", [torch.full((1, 3), 67), torch.full((1, 3), -1), torch.zeros(3, dtype=torch.long)]
)
def test_bad_tokens_are_refused(llama: PreTrainedModel, bad: torch.Tensor) -> None:
    with pytest.raises(DataError):
        embed(llama, family_of(llama), bad)


def test_embedding_needs_the_tensors_outside_the_blocks(llama: PreTrainedModel, tokens: torch.Tensor) -> None:
    empty = skeleton(llama.config)
    with pytest.raises(SourceError, match=r"model\.embed_tokens\.weight"):
        embed(empty, family_of(empty), tokens)


@pytest.mark.parametrize("name", ["tales-xs", "tales-s", "tales-m", "tales-l"])
def test_walk_on_shared_models(shared: Path, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(shared / "models" / name, dtype=torch.float32).eval()
    tokens = torch.randint(0, 512, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(tokens).logits
    torch.testing.assert_close(walked(model, tokens), whole, rtol=1e-4, atol=1e-4)


def test_hidden_is_frozen(llama: PreTrainedModel, tokens: torch.Tensor) -> None:
    hidden: Hidden = embed(llama, family_of(llama), tokens)
    with pytest.raises(AttributeError):
        hidden.index = 3  # type: ignore[misc]


def test_arguments_that_depend_on_the_tokens_are_not_shared(
    llama: PreTrainedModel, tokens: torch.Tensor
) -> None:
    whole = llama.model.forward
    llama.model.forward = lambda input_ids, **kwargs: whole(input_ids, seen=input_ids, **kwargs)  # type: ignore[method-assign]
    hidden = embed(llama, family_of(llama), tokens, batch=1)
    for batch in hidden.batches:
        assert torch.equal(batch.calls[0].kwargs["seen"], tokens[batch.start : batch.stop])
    assert len({id(batch.calls) for batch in hidden.batches}) == len(tokens)
