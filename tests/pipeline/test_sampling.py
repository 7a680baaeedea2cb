"""Samples of rows: what they leave out changes a score by no more than they say, and they are read as the whole would be."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

import families
from fracbit.checkpoint.opened import open_float
from fracbit.errors import SourceError
from fracbit.importance import SCORES
from fracbit.pipeline.plan.sampling import group_of, relative_error, sample_rows, sampling_notes
from fracbit.pipeline.plan.scoring import make_losses, make_scores
from fracbit.pipeline.study.float_model import float_model_of
from fracbit.pipeline.study.weights import weights_on_disk
from fracbit.records.allocation import read_levels
from fracbit.records.scheme import Scheme

DATA_FREE = [name for name, method in SCORES.items() if method.data_free and "weights" in method.needs]


@given(
    st.lists(st.tuples(st.integers(64, 900), st.integers(1, 400)), min_size=1, max_size=4),
    st.sampled_from([1, 16, 48]),
    st.integers(1, 4000),
)
def test_halves_are_disjoint_and_every_linear_gives_one_share(
    shapes: list[tuple[int, int]], group: int, weights: int
) -> None:
    named = {f"l{i}": shape for i, shape in enumerate(shapes)}
    found = sample_rows(named, group, weights)
    if found is None:
        return
    assert found == sample_rows(named, group, weights)
    for name, (out, _) in named.items():
        rows = [row for half in found[name] for cut in half for row in range(out)[cut]]
        assert len(rows) == len(set(rows))
        assert all(cut.start % group == 0 and cut.stop - cut.start == group for h in found[name] for cut in h)
        assert len(found[name][0]) == len(found[name][1]) >= 1
        share = max(
            len(named) * weights / sum(o * w for o, w in shapes), 2 * group / min(o for o, _ in shapes)
        )
        assert abs(len(rows) - out * share) <= group + 1e-6
    assert sample_rows(named, group, 10**9) is None


def test_blocks_across_rows_stay_together_and_whole_tensors_are_read_whole() -> None:
    assert group_of(read_levels("int4z/64,nf3/row,float,kmeans2/32,int4/64 s=int8:256")) == 1
    assert group_of(read_levels("int4z/64 out,nf3/48 out")) == 192
    assert group_of(read_levels("int4z/64 out,ocp8/96x128")) == 192
    for label in ("int4/tensor", "int4/flat:64", "int4/row out"):
        assert group_of([*read_levels("nf4/64"), *read_levels(label)]) is None


@pytest.mark.parametrize("granularity", ["block", "linear"])
@pytest.mark.parametrize("name", DATA_FREE)
def test_a_sample_is_off_by_what_it_says(
    name: str, granularity: str, tiny_llama: Callable[..., LlamaForCausalLM]
) -> None:
    model = tiny_llama(hidden_size=192, intermediate_size=320, num_hidden_layers=4)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():  # heavy tails, rows of different scale
            if parameter.dim() == 2:
                parameter.mul_(1 + 3 * torch.rand(len(parameter), 1)).copy_(parameter**3)
    weights = float_model_of(model).weights
    units = weights.units(granularity)  # type: ignore[arg-type]
    levels = (Scheme(bits=2, block=48), Scheme("nf", 3, 8, "out"))
    sampled = replace(weights, sample=1 << 12)

    def rows(where: object) -> tuple[dict[str, tuple[float, ...]], dict[str, float]]:
        if SCORES[name].of_scheme:
            losses = make_losses(where, units, name, levels)  # type: ignore[arg-type]
            return dict(losses.rows), losses.protocol.get("sampled", {})
        scores = make_scores(where, units, name)  # type: ignore[arg-type]
        return {key: (value,) for key, value in scores.values.items()}, scores.protocol.get("sampled", {})

    whole, nothing = rows(weights)
    part, said = rows(sampled)
    assert not nothing
    assert said["weights"] < 0.5 * said["of"]
    off = [abs(a / b - 1) for unit, row in whole.items() for a, b in zip(part[unit], row, strict=True)]
    assert part != whole
    assert math.sqrt(sum(x * x for x in off) / len(off)) < 3 * said["largest_error"]
    assert "--whole" in sampling_notes({"sampled": said})[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_rows_on_disk_are_those_of_the_whole(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    families.model_of(name).to(dtype).save_pretrained(tmp_path)
    weights = weights_on_disk(open_float(tmp_path))
    cuts = (slice(1, 3), slice(6, 7))
    for layer in weights.layers:
        whole = weights.read(layer)
        assert torch.equal(weights.rows(layer, cuts), torch.cat([whole[cut] for cut in cuts]))
    assert weights_on_disk(open_float(tmp_path), whole=True).sample is None


def test_a_shard_that_shrank_since_is_named(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    tiny_llama().save_pretrained(tmp_path)
    weights = weights_on_disk(open_float(tmp_path))
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(SourceError, match=r"shard model.safetensors ends"):
        [weights.rows(layer, (slice(0, 2),)) for layer in weights.layers]


def test_the_error_is_half_the_distance_over_the_mean() -> None:
    assert relative_error((1.0, 3.0)) == 0.5
    assert relative_error((0.0, 0.0)) == 0
    assert sampling_notes({"seed": 0}) == ()
