"""Pruned checkpoints load, are the model without those blocks for every family, and nothing is left changed in memory."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import families
from fracbit.checkpoint.load import load
from fracbit.errors import OutputError, RecipeError
from fracbit.models.blocks import blocks
from fracbit.pipeline.study.float_model import float_model_of, load_float, measure
from fracbit.pipeline.study.prune import least_important, prune, pruned_config
from fracbit.pipeline.study.variants import loss_table
from fracbit.records.scores import Scores


@pytest.mark.parametrize("name", families.CONFIGS)
def test_every_family_loses_a_block(name: str, tmp_path: Path) -> None:
    model = families.model_of(name)
    model.save_pretrained(tmp_path / "whole")
    float_model = float_model_of(model)
    names = [path for path, _ in blocks(float_model.model, float_model.family)]
    ids = families.tokens(2, 12)
    base = measure(float_model, ids).nll
    done = prune(tmp_path / "whole", [names[1]], tmp_path / "pruned")
    assert done.blocks == len(names) - 1
    picks = tuple(int(name == names[1]) for name in names)
    inside = loss_table(float_model, [picks], lambda block, number: None if number else {}, ids)[picks]
    assert measure(float_model, ids).nll == base
    loaded = load(tmp_path / "pruned", torch.float32)
    assert sum(p.numel() for p in loaded.parameters()) <= done.parameters
    assert measure(float_model_of(loaded), ids).nll == pytest.approx(inside, abs=1e-6)
    assert inside != base


def test_a_pruned_model_generates_and_quantizes(
    tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM]
) -> None:
    from fracbit import quantize

    tiny_llama().bfloat16().save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "tokenizer.json").write_text("{}")
    prune(tmp_path / "whole", ["model.layers.0"], tmp_path / "pruned")
    loaded = load(tmp_path / "pruned")
    assert loaded.dtype == torch.bfloat16
    assert loaded.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=4, do_sample=False).shape == (
        1,
        7,
    )
    assert (tmp_path / "pruned" / "tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "pruned" / "fracbit.json").read_text())["pruned"]["dropped"] == [
        "model.layers.0"
    ]
    assert quantize(tmp_path / "pruned", tmp_path / "small").bits_per_weight is not None


def test_the_least_important_go() -> None:
    names = [f"l{i}" for i in range(4)]
    scores = Scores(dict(zip(names, [3.0, 1.0, 2.0, 4.0], strict=True)), "lim", "")
    assert least_important(scores, 2, names) == ("l1", "l2")
    for count in (0, 4, -1):
        with pytest.raises(RecipeError, match="leaves no pruned model"):
            least_important(scores, count, names)


def test_config_entries_follow_the_blocks() -> None:
    config = {
        "num_hidden_layers": 3,
        "layer_types": ["a", "b", "c"],
        "hidden_size": 3,
        "no_rope_layers": None,
    }
    assert pruned_config(config, [0, 2]) == {"num_hidden_layers": 2, "layer_types": ["a", "c"]}


def test_bad_requests_are_refused(tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    tiny_llama().save_pretrained(tmp_path / "whole")
    with pytest.raises(RecipeError, match=r"model.layers.7 is not a block.*did you mean"):
        prune(tmp_path / "whole", ["model.layers.7"], tmp_path / "out")
    with pytest.raises(RecipeError, match="leaves no pruned model"):
        prune(tmp_path / "whole", [], tmp_path / "out")
    with pytest.raises(OutputError, match="is the model itself"):
        prune(tmp_path / "whole", ["model.layers.0"], tmp_path / "whole")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(OutputError, match="not empty"):
        prune(tmp_path / "whole", ["model.layers.0"], tmp_path / "full")
    assert not (tmp_path / "out").exists()
    assert len(blocks(load_float(tmp_path / "whole").model, load_float(tmp_path / "whole").family)) == 3
