"""What transformers and peft do with packed models: bare models, other sizes of the table, adapters."""

from __future__ import annotations

import pickle
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

import fracbit
from families import model_of, tiny_llama, tokens
from fracbit.errors import FormatError
from fracbit.models.adapters import packed_lora
from fracbit.models.quant_linear import QuantLinear
from fracbit.records.recipe import Recipe
from fracbit.records.scheme import Scheme
from outputs import contents, logits


def quantized(folder: Path, family: str = "", **recipe: object) -> Path:
    """A packed tiny model of a family, else a Llama."""
    (model_of(family) if family else tiny_llama(num_hidden_layers=2)).save_pretrained(folder / "float")
    fracbit.quantize(
        Recipe(model=str(folder / "float"), scheme=Scheme("int", 4, 16), **recipe),
        folder / "q",
        progress=None,
    )  # type: ignore[arg-type]
    return folder / "q"


@pytest.mark.parametrize("family", ["llama", "llama-tied-biased", "gpt2", "qwen2_moe", "opt", "falcon-7b"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_bare_model_computes_what_the_whole_one_does(tmp_path: Path, family: str, packed: bool) -> None:
    """`AutoModel` has no head: one that is packed is left out, and everything else is where it belongs."""
    scheme = Scheme("int", 8, 16) if packed else None
    place = quantized(tmp_path, family, head=scheme, embeddings=scheme)
    whole, bare = fracbit.load(place), AutoModel.from_pretrained(place).eval()
    with torch.no_grad():
        expected = whole(tokens(), output_hidden_states=True).hidden_states[-1]  # [samples, tokens, width]
        assert torch.equal(bare(tokens()).last_hidden_state, expected)


def test_a_float_table_can_be_resized_and_a_packed_one_says_how(tmp_path: Path) -> None:
    model = fracbit.load(quantized(tmp_path / "float table"))
    rows = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(rows + 5)
    assert logits(model).shape[-1] == rows + 5
    for name in ("embeddings", "head"):
        model = fracbit.load(quantized(tmp_path / name, **{name: Scheme("int", 8, 16)}))
        before = logits(model)
        table = model.resize_token_embeddings(rows)
        assert table is model.get_input_embeddings()
        with pytest.raises(FormatError, match="resize the float model and quantize that"):
            model.resize_token_embeddings(rows + 5)
        assert torch.equal(logits(model), before)
        assert torch.equal(logits(deepcopy(model)), before)
        assert torch.equal(logits(pickle.loads(pickle.dumps(model))), before)


def test_an_adapter_is_trained_saved_and_loaded_and_not_merged(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="adapters need peft: pip install 'fracbit[adapters]'")
    place = quantized(tmp_path)
    before = contents(place)
    asked = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(fracbit.load(place), packed_lora(asked))
    assert not asked._custom_modules  # the caller's is left as it was
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 14
    ids, losses = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0)), []
    steps = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], 1e-2)
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        steps.step()
        steps.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
    model.eval().save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        fracbit.load(place), tmp_path / "adapter", config=packed_lora(tmp_path / "adapter")
    ).eval()
    assert torch.equal(logits(again), logits(model))
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(fracbit.load(place)))
    for merge in (again.merge_and_unload, again.merge_adapter):
        with pytest.raises(FormatError, match="not merged into packed weights"):
            merge()
    assert torch.equal(logits(again), logits(model))
    assert contents(place) == before


def test_what_takes_no_adapter_is_named(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="adapters need peft: pip install 'fracbit[adapters]'")
    place = quantized(tmp_path, embeddings=Scheme("int", 8, 16))
    with pytest.raises(FormatError, match="no adapter for a QuantEmbedding"):
        peft.get_peft_model(
            fracbit.load(place), packed_lora(peft.LoraConfig(target_modules=["embed_tokens"]))
        )
