"""What makes every type work: mixtures of all layouts become linears, and blocks of all manners are walked."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny
import torch

import families
import fracbit
from fracbit.models.experts import Cut, SplitExperts, split_experts
from fracbit.models.quant_linear import QuantEmbedding

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, of types that are not ours to mend

MIXTURES = (
    "causal:gpt_oss",  # transposed, interleaved, with biases
    "causal:llama4_text",  # transposed; every expert sees all tokens
    "causal:aria_text",  # transposed
    "causal:dbrx",  # flat
    "causal:nemotron_h",  # no gate
    "causal:jetmoe",  # one linear an expert, tokens sorted
    "causal:inkling_text",  # shared experts in one stack
    "causal:longcat_flash",  # experts that do nothing
    "causal:deepseek_v4",  # a gate of its own
)
WALKED = (
    "causal:rwkv",  # three values from a block to the next
    "causal:glm_moe_dsa",  # two
    "causal:openai-gpt",  # a list
    "causal:gemma3n_text",  # four states a token, in front
    "causal:deepseek_v4",  # four states a token, behind
    "causal:xlnet",  # tokens before samples
    "causal:falcon_h1",  # buffers that no file holds
    "causal:blt",  # patches of ids
)


def ids() -> torch.Tensor:
    return torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(0))  # [samples, tokens]


@pytest.mark.parametrize("kind", MIXTURES)
def test_split_experts_give_the_same_logits(kind: str) -> None:
    fused = tiny.model_of(kind)
    if fused._can_set_experts_implementation():
        fused.set_experts_implementation("eager")
    split = copy.deepcopy(fused)
    assert split_experts(split)
    with torch.no_grad():
        torch.testing.assert_close(split(ids()).logits, fused(ids()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MIXTURES[:-2])
def test_cuts_of_a_layout_fill_its_tensors(kind: str) -> None:
    fused = tiny.model_of(kind)
    tensors = dict(fused.named_parameters())
    split = copy.deepcopy(fused)
    split_experts(split)
    for path, module in split.named_modules():
        if not isinstance(module, SplitExperts):
            continue
        parts: dict[str, list[tuple[str, Cut]]] = {}
        for name, tensor, cut in module.layout.cuts(len(module)):
            parts.setdefault(f"{path}.{tensor}", []).append((f"{path}.{name}", cut))
        for tensor, held in parts.items():
            whole = torch.full(tensors[tensor].shape, torch.nan)
            for name, cut in held:
                cut.write(whole, split.get_parameter(name).detach())
            assert torch.equal(whole, tensors[tensor])


@pytest.mark.parametrize("kind", WALKED)
def test_a_walk_is_the_whole_forward(kind: str) -> None:
    model = tiny.model_of(kind)
    split_experts(model)
    with torch.no_grad():
        whole = model(ids()).logits
    torch.testing.assert_close(families.walked(model, ids()), whole, rtol=1e-4, atol=1e-5)


def test_tables_of_blocks_are_embeddings(tmp_path: Path) -> None:
    model = tiny.model_of("causal:gemma3n_text")
    model.save_pretrained(tmp_path / "float")
    recipe = {"model": str(tmp_path / "float"), "scheme": "int8/16", "embeddings": "int8/16"}
    fracbit.quantize(fracbit.Recipe.model_validate(recipe), tmp_path / "out", progress=False)
    packed = fracbit.load(tmp_path / "out", "float32")
    assert isinstance(packed.model.embed_tokens_per_layer, QuantEmbedding)
    with torch.no_grad():
        away = (packed(ids()).logits - model(ids()).logits).norm() / model(ids()).logits.norm()
    assert float(away) < 0.25
