"""KL divergence and agreement: exact on one pass, the same from kept logits, zero for a model and itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from fracbit.errors import DataError, FormatError, OutputError, WeightError
from fracbit.evaluation import compare, divergence, keep_logits, open_logits, perplexity
from fracbit.evaluation.divergence import token_divergence


def rounded(model: PreTrainedModel, step: float) -> PreTrainedModel:
    """A copy with the weights of its blocks rounded to multiples of `step`."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in result.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                weight.copy_((weight / step).round() * step)
    return result


@pytest.fixture(scope="session")
def coarse(model: LlamaForCausalLM) -> PreTrainedModel:
    return rounded(model, 0.2)


def test_token_divergence_is_the_definition() -> None:
    logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))
    p, q = logits.double().softmax(-1)
    wanted = (p * (p / q).log()).sum(1)
    assert torch.allclose(token_divergence(*logits).double(), wanted, atol=1e-6)
    assert torch.allclose(token_divergence(logits[0] + 5, logits[1] - 3).double(), wanted, atol=1e-5)


def test_a_word_that_the_reference_rules_out_adds_nothing() -> None:
    p = torch.tensor([[0.0, 0.0, -torch.inf]])
    q = torch.tensor([[0.0, 0.0, -9.0]])
    assert float(token_divergence(p, q)) == pytest.approx(float((q.exp().sum() / 2).log()), abs=1e-6)


def test_equals_a_pass_by_hand(
    model: LlamaForCausalLM, coarse: PreTrainedModel, stream: torch.Tensor
) -> None:
    ids = stream[:64]
    with torch.no_grad():
        p = model(ids[None]).logits[0, :-1].log_softmax(-1)
        q = coarse(ids[None]).logits[0, :-1].log_softmax(-1)
    wanted = (p.exp() * (p - q)).sum(1)
    found = divergence(model, coarse, ids)
    assert found.kl == pytest.approx(float(wanted.mean()), abs=1e-5)
    assert found.kl_max == pytest.approx(float(wanted.max()), abs=1e-4)
    assert found.agreement == float((p.argmax(1) == q.argmax(1)).double().mean())
    assert found.tokens == 63


def test_a_model_does_not_differ_from_itself(model: LlamaForCausalLM, stream: torch.Tensor) -> None:
    found = divergence(model, model, stream, window=32, stride=16)
    assert (found.kl, found.kl_max, found.agreement) == (0.0, 0.0, 1.0)


def test_finer_steps_are_nearer(model: LlamaForCausalLM, stream: torch.Tensor) -> None:
    found = [divergence(model, rounded(model, step), stream, window=64) for step in (0.4, 0.1, 0.02)]
    assert found[0].kl > found[1].kl > found[2].kl > 0
    assert found[0].agreement < found[2].agreement


def test_compare_gives_both_figures(
    model: LlamaForCausalLM, coarse: PreTrainedModel, stream: torch.Tensor
) -> None:
    documents = [stream[:50], stream[50:150], stream[150:161]]
    cost, apart = compare(model, coarse, documents, window=20, stride=11, batch=3)
    assert cost.nll == pytest.approx(perplexity(coarse, documents, window=20, stride=11).nll, abs=1e-6)
    assert apart.kl == pytest.approx(divergence(model, coarse, documents, window=20, stride=11).kl, abs=1e-6)
    assert apart.tokens == cost.tokens == 49 + 99 + 10


@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 3e-4)])
@pytest.mark.parametrize("stored", [False, True])
def test_kept_logits_serve_as_the_float_model(
    model: LlamaForCausalLM, coarse: PreTrainedModel, stream: torch.Tensor, tmp_path: Path,
    bos: int | None, dtype: str, tolerance: float, stored: bool,
) -> None:  # fmt: skip
    documents = [stream[:50], stream[50:150], stream[150:161]]
    path = tmp_path / "float.safetensors" if stored else None
    kept = keep_logits(model, documents, window=20, stride=11, bos=bos, path=path, dtype=dtype)  # type: ignore[arg-type]
    direct = divergence(model, coarse, documents, window=20, stride=11, bos=bos)
    found = divergence(kept, coarse, documents, window=20, stride=11, bos=bos, batch=2)
    assert found.kl == pytest.approx(direct.kl, abs=tolerance)
    assert found.kl_max == pytest.approx(direct.kl_max, abs=10 * tolerance)
    assert abs(found.agreement - direct.agreement) <= (0.02 if dtype == "float16" else 0)
    if path is not None:
        assert sorted(tmp_path.iterdir()) == [path]
        again = divergence(open_logits(path), coarse, documents, window=20, stride=11, bos=bos, batch=2)
        assert again.kl == found.kl


def test_kept_logits_of_another_text(model: LlamaForCausalLM, stream: torch.Tensor) -> None:
    kept = keep_logits(model, stream[:60], window=20)
    for ids, window in ((stream[:61], 20), (stream[1:61], 20), (stream[:60], 21)):
        with pytest.raises(DataError, match="belong to another text"):
            divergence(kept, model, ids, window=window)


def test_files_that_hold_no_logits(model: LlamaForCausalLM, stream: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    keep_logits(model, stream[:60], window=20, path=path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(FormatError, match="holds no kept logits"):
        open_logits(path)
    with pytest.raises(FormatError, match="holds no kept logits"):
        open_logits(tmp_path / "absent")
    with pytest.raises(OutputError, match="cannot be written"):
        keep_logits(model, stream[:60], window=20, path=tmp_path / "absent" / "kept")


def test_a_full_disk(model: LlamaForCausalLM, stream: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / "kept.partial").symlink_to("/dev/full")
    with pytest.raises(OutputError, match="No space left"):
        keep_logits(model, stream[:60], window=20, path=tmp_path / "kept")
    assert list(tmp_path.iterdir()) == []


def test_two_vocabularies(
    model: LlamaForCausalLM, tiny_llama: Callable[..., LlamaForCausalLM], stream: torch.Tensor
) -> None:
    with pytest.raises(DataError, match="96 words and the quantized one 61"):
        divergence(tiny_llama(), model, stream, window=20)


def test_infinite_logits_name_the_window(model: LlamaForCausalLM, stream: torch.Tensor) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_output_embeddings().weight[3] = torch.inf
    with pytest.raises(WeightError, match="window 0"):
        compare(model, broken, stream[:20], window=20)
    with pytest.raises(WeightError, match="window 0"):
        compare(broken, model, stream[:20], window=20)
    with pytest.raises(WeightError, match="window 0"):
        keep_logits(broken, stream[:20], window=20)


def test_gradients_work_between_the_windows(
    model: LlamaForCausalLM, coarse: PreTrainedModel, stream: torch.Tensor
) -> None:
    seen = []
    compare(
        model, coarse, stream, window=32, progress=lambda done, total: seen.append(torch.is_grad_enabled())
    )
    assert all(seen)
    assert torch.is_grad_enabled()


def test_shared_models_one_against_the_other(
    shared: Path, shared_model: Callable[[str], PreTrainedModel]
) -> None:
    import numpy as np

    ids = torch.from_numpy(np.fromfile(shared / "data" / "tales-evaluation.u16", "<u2").astype(np.int64))
    documents = list(ids.view(-1, 512)[:6])
    model = shared_model("tales-s")
    found = divergence(model, rounded(model, 0.1), documents, window=512)
    assert 0 < found.kl_median < found.kl < found.kl_p99 < found.kl_max
    assert 0.5 < found.agreement < 1
