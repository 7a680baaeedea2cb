"""The one judge: perplexity and divergence of a single pass, exact, and the same from kept predictions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from fracbit.errors import DataError, FormatError, OutputError, WeightError
from fracbit.evaluation import (
    Divergence,
    Ids,
    Reference,
    Windowing,
    cut_windows,
    judge,
    keep_expected,
    keep_logits,
    open_logits,
    perplexity,
)
from fracbit.evaluation.divergence import distribution, token_divergence

ROOM = 1 << 30


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


@pytest.fixture(scope="session", params=[None, 1], ids=["no-bos", "bos"])
def windows(stream: Tensor, request: pytest.FixtureRequest) -> Windowing:
    """Windows of several lengths over three documents, overlapping."""
    return cut_windows(
        [stream[:50], stream[50:150], stream[150:161]], window=20, stride=11, bos=request.param
    )


def divergence(
    reference: PreTrainedModel | Reference, model: PreTrainedModel, ids: Ids, window: int = 64
) -> Divergence:
    found = judge(model, cut_windows(ids, window=window), reference=reference).divergence
    assert found is not None
    return found


def kl(logits: Tensor, others: Tensor) -> Tensor:
    return token_divergence(distribution(logits), others.log_softmax(1))


def test_token_divergence_is_the_definition() -> None:
    logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))
    p, q = logits.double().softmax(-1)
    wanted = (p * (p / q).log()).sum(1)
    assert torch.allclose(kl(*logits).double(), wanted, atol=1e-6)
    assert torch.allclose(kl(logits[0] + 5, logits[1] - 3).double(), wanted, atol=1e-5)


@pytest.mark.parametrize("other", [-9.0, -torch.inf])
def test_a_word_that_the_reference_rules_out_adds_nothing(other: float) -> None:
    p = torch.tensor([[0.0, 0.0, -torch.inf]])
    q = torch.tensor([[0.0, 0.0, other]])
    assert float(kl(p, q)) == pytest.approx(float((q.exp().sum() / 2).log()), abs=1e-6)


def test_a_word_that_only_the_model_rules_out_is_infinitely_far() -> None:
    p, q = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -torch.inf]])
    assert float(kl(p, q)) == torch.inf


def test_equals_a_pass_by_hand(model: LlamaForCausalLM, coarse: PreTrainedModel, stream: Tensor) -> None:
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


def test_a_model_does_not_differ_from_itself(model: LlamaForCausalLM, stream: Tensor) -> None:
    found = divergence(model, model, stream, window=32)
    assert (found.kl, found.kl_max, found.agreement) == (0.0, 0.0, 1.0)


def test_finer_steps_are_nearer(model: LlamaForCausalLM, stream: Tensor) -> None:
    found = [divergence(model, rounded(model, step), stream, window=64) for step in (0.4, 0.1, 0.02)]
    assert found[0].kl > found[1].kl > found[2].kl > 0
    assert found[0].agreement < found[2].agreement


def test_a_reference_does_not_change_the_loss(
    model: LlamaForCausalLM, coarse: PreTrainedModel, windows: Windowing, tmp_path: Path
) -> None:
    alone = judge(coarse, windows, batch=3)
    assert alone.divergence is None
    references: list[PreTrainedModel | Reference] = [
        model,
        keep_expected(model, windows, room_bytes=ROOM),
        keep_logits(model, windows, tmp_path / "float.safetensors"),
    ]
    for reference in references:
        beside = judge(coarse, windows, batch=3, reference=reference).perplexity
        assert (beside.nll, beside.window_nll) == (alone.perplexity.nll, alone.perplexity.window_nll)


def test_the_loss_is_the_perplexity_function_s(coarse: PreTrainedModel, stream: Tensor) -> None:
    documents = [stream[:50], stream[50:150], stream[150:161]]
    found = perplexity(coarse, documents, window=20, stride=11)
    judged = judge(coarse, cut_windows(documents, window=20, stride=11)).perplexity
    assert (found.nll, found.window_nll, found.tokens) == (judged.nll, judged.window_nll, 49 + 99 + 10)


def test_expectations_in_memory_equal_the_float_model_beside(
    model: LlamaForCausalLM, coarse: PreTrainedModel, windows: Windowing
) -> None:
    beside = judge(coarse, windows, reference=model).divergence
    kept = judge(coarse, windows, reference=keep_expected(model, windows, room_bytes=ROOM)).divergence
    assert beside is not None
    assert kept is not None
    assert (kept.kl, kept.kl_median, kept.kl_max) == (beside.kl, beside.kl_median, beside.kl_max)
    assert (kept.agreement, kept.tokens) == (beside.agreement, windows.protocol.tokens)


def test_windows_beyond_the_room_are_judged_without_divergence(
    model: LlamaForCausalLM, coarse: PreTrainedModel, stream: Tensor
) -> None:
    windows = cut_windows(stream, window=51)  # five windows of 51 ids and one of 46
    full = judge(coarse, windows)
    for whole_windows in range(3):
        room = 8 * 61 * 50 * whole_windows + 8 * 61 * 44  # one id too few for the shortest window
        found = judge(coarse, windows, reference=keep_expected(model, windows, room_bytes=room))
        assert found.perplexity.window_nll == full.perplexity.window_nll
        assert (0 if found.divergence is None else found.divergence.tokens) == 50 * whole_windows
    part = divergence(model, coarse, list(stream[:102].view(2, 51)))
    assert found.divergence is not None
    assert found.divergence.kl == pytest.approx(part.kl, abs=1e-6)
    assert "over the 100 tokens" in str(found.divergence)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 3e-4)])
def test_kept_logits_serve_as_the_float_model(
    model: LlamaForCausalLM, coarse: PreTrainedModel, windows: Windowing, tmp_path: Path, dtype: str, tolerance: float
) -> None:  # fmt: skip
    path = tmp_path / "float.safetensors"
    kept = keep_logits(model, windows, path, dtype=dtype)  # type: ignore[arg-type]
    assert sorted(tmp_path.iterdir()) == [path]
    direct = judge(coarse, windows, reference=model).divergence
    found = judge(coarse, windows, batch=2, reference=kept).divergence
    again = judge(coarse, windows, batch=2, reference=open_logits(path)).divergence
    assert direct is not None
    assert found is not None
    assert again is not None
    assert found.kl == pytest.approx(direct.kl, abs=tolerance)
    assert found.kl_max == pytest.approx(direct.kl_max, abs=10 * tolerance)
    assert abs(found.agreement - direct.agreement) <= (0.02 if dtype == "float16" else 0)
    assert again.kl == found.kl


@pytest.mark.parametrize("stored", [False, True])
def test_predictions_kept_for_another_text(
    model: LlamaForCausalLM, stream: Tensor, tmp_path: Path, stored: bool
) -> None:
    windows = cut_windows(stream[:60], window=20)
    kept: Reference = (
        keep_logits(model, windows, tmp_path / "kept")
        if stored
        else keep_expected(model, windows, room_bytes=ROOM)
    )
    for ids, window in ((stream[:61], 20), (stream[1:61], 20), (stream[:60], 21)):
        with pytest.raises(DataError, match="belong to another text"):
            divergence(kept, model, ids, window=window)


def test_files_that_hold_no_logits(model: LlamaForCausalLM, stream: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    windows = cut_windows(stream[:60], window=20)
    keep_logits(model, windows, path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(FormatError, match="holds no kept logits"):
        open_logits(path)
    with pytest.raises(FormatError, match="holds no kept logits"):
        open_logits(tmp_path / "absent")
    with pytest.raises(OutputError, match="cannot be written"):
        keep_logits(model, windows, tmp_path / "absent" / "kept")


def test_a_full_disk(model: LlamaForCausalLM, stream: Tensor, tmp_path: Path) -> None:
    (tmp_path / "kept.partial").symlink_to("/dev/full")
    with pytest.raises(OutputError, match="No space left"):
        keep_logits(model, cut_windows(stream[:60], window=20), tmp_path / "kept")
    assert list(tmp_path.iterdir()) == []


def test_two_vocabularies(
    model: LlamaForCausalLM, tiny_llama: Callable[..., LlamaForCausalLM], stream: Tensor
) -> None:
    with pytest.raises(DataError, match="96 tokens in its vocabulary, the quantized one 61"):
        divergence(tiny_llama(), model, stream, window=20)


def test_infinite_logits_name_the_window(model: LlamaForCausalLM, stream: Tensor, tmp_path: Path) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_output_embeddings().weight[3] = torch.inf
    windows = cut_windows(stream[:20], window=20)
    with pytest.raises(WeightError, match="loss in window 0"):
        judge(broken, windows, reference=model)
    with pytest.raises(WeightError, match="divergence in window 0"):
        judge(model, windows, reference=broken)
    with pytest.raises(WeightError, match="window 0"):
        keep_logits(broken, windows, tmp_path / "kept")
    with pytest.raises(WeightError, match="window 0"):
        keep_expected(broken, windows, room_bytes=ROOM)


def test_gradients_work_between_the_windows(
    model: LlamaForCausalLM, coarse: PreTrainedModel, stream: Tensor
) -> None:
    seen = []
    judge(
        coarse,
        cut_windows(stream, window=32),
        reference=model,
        progress=lambda what, done, total: seen.append(torch.is_grad_enabled()),
    )
    assert all(seen)
    assert torch.is_grad_enabled()


def test_keeping_counts_windows(model: LlamaForCausalLM, stream: Tensor, tmp_path: Path) -> None:
    windows = cut_windows(stream, window=64)
    seen: list[tuple[str, int, int]] = []
    keep_expected(model, windows, room_bytes=ROOM, progress=lambda *step: seen.append(step))
    keep_logits(model, windows, tmp_path / "kept", progress=lambda *step: seen.append(step))
    assert seen == 2 * [("float model", done, 5) for done in (1, 2, 3, 4, 5)]


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
