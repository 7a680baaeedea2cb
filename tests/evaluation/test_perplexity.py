"""Perplexity equals transformers' own loss, the transformers documentation's loop and the shared models'
known figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from fracbit.errors import DataError, WeightError
from fracbit.evaluation import cut_windows, perplexity


def labelled_nll(model: PreTrainedModel, ids: torch.Tensor, window: int, stride: int) -> float:
    """The documentation's loop with transformers' own loss, weighted by the targets that survive the label
    shift.
    """
    total, tokens, previous = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        inputs = ids[begin:end].unsqueeze(0)
        labels = inputs.clone()
        labels[:, : -(end - previous)] = -100
        count = int((labels[:, 1:] != -100).sum())
        if count:
            with torch.no_grad():
                total += count * float(model(inputs, labels=labels).loss)
            tokens += count
        previous = end
        if end == len(ids):
            break
    return total / tokens


@pytest.mark.parametrize(
    ("window", "stride"), [(64, 64), (64, 16), (50, 49), (33, 1), (2, 2), (2, 1), (60, 60)]
)
def test_equals_transformers_own_loss(
    model: LlamaForCausalLM, stream: torch.Tensor, window: int, stride: int
) -> None:
    ids = stream[: 90 if stride == 1 else None]
    measured = perplexity(model, ids, window=window, stride=stride)
    assert measured.nll == pytest.approx(labelled_nll(model, ids, window, stride), abs=1e-5)
    assert measured.perplexity == pytest.approx(math.exp(measured.nll))


def test_a_single_window_is_the_plain_loss(model: LlamaForCausalLM, stream: torch.Tensor) -> None:
    ids = stream[:64]
    with torch.no_grad():
        loss = float(model(ids.unsqueeze(0), labels=ids.unsqueeze(0)).loss)
    measured = perplexity(model, ids)
    assert measured.nll == pytest.approx(loss, abs=1e-5)
    assert measured.tokens == 63


FAMILIES = [
    GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    OPTForCausalLM(
        OPTConfig(
            vocab_size=61, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=32,
        )
    ),
    BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4)),
    Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=64, final_logit_softcapping=5.0,
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.config.model_type)
def test_every_family_equals_its_own_loss_though_windows_share_a_batch(
    family: PreTrainedModel, stream: torch.Tensor
) -> None:
    family.eval()
    documents = [stream[:5], stream[10:60], stream[70:90]]
    wanted = sum(labelled_nll(family, ids, 32, 16) * (len(ids) - 1) for ids in documents) / (4 + 49 + 19)
    assert perplexity(family, documents, window=32, stride=16, batch=8).nll == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 3, 64])
def test_the_batch_does_not_change_the_figure(
    model: LlamaForCausalLM, stream: torch.Tensor, batch: int
) -> None:
    alone = perplexity(model, stream, window=20, stride=7, batch=1)
    together = perplexity(model, stream, window=20, stride=7, batch=batch)
    assert together.nll == pytest.approx(alone.nll, abs=1e-5)
    assert together.window_nll == pytest.approx(alone.window_nll, abs=1e-3)


def test_documents_do_not_see_each_other(model: LlamaForCausalLM, stream: torch.Tensor) -> None:
    first, second = stream[:40], stream[40:55]
    both = perplexity(model, [first, second], window=64)
    parts = [perplexity(model, part, window=64) for part in (first, second)]
    assert both.tokens == 39 + 14
    assert both.nll * both.tokens == pytest.approx(sum(part.nll * part.tokens for part in parts), abs=1e-3)


def test_bos_opens_every_window_and_every_id_is_scored(model: LlamaForCausalLM, stream: torch.Tensor) -> None:
    ids = stream[:50]
    measured = perplexity(model, ids, window=21, bos=1)
    wanted = 0.0
    for piece in (ids[:20], ids[20:40], ids[40:]):
        fed = torch.cat([torch.tensor([1]), piece]).unsqueeze(0)
        with torch.no_grad():
            wanted += len(piece) * float(model(fed, labels=fed).loss)
    assert measured.tokens == 50
    assert measured.nll == pytest.approx(wanted / 50, abs=1e-5)


def test_bos_is_not_doubled(model: LlamaForCausalLM, stream: torch.Tensor) -> None:
    opened = torch.cat([torch.tensor([1]), stream[:30]])
    assert perplexity(model, opened, window=40, bos=1).nll == pytest.approx(
        perplexity(model, opened, window=40).nll, abs=1e-5
    )


@given(
    length=st.integers(2, 90), window=st.integers(2, 40), data=st.data(), bos=st.sampled_from([None, 1]),
)  # fmt: skip
@settings(deadline=None)
def test_every_id_is_scored_at_most_once_and_overlap_is_context(
    length: int, window: int, data: st.DataObject, bos: int | None
) -> None:
    room = window if bos is None else window - 1
    stride = data.draw(st.integers(1, room))
    windows = cut_windows(torch.arange(length) + 5, window=window, stride=stride, bos=bos)
    targets = torch.cat([windows.targets(piece) for piece in windows.all]) - 5
    assert targets.unique().numel() == targets.numel() == windows.protocol.tokens
    assert all(len(windows.inputs(piece)) <= window for piece in windows.all)
    if bos is not None:
        assert targets.tolist() == list(range(length))
    elif stride < window:
        assert targets.tolist() == list(range(1, length))


def test_a_training_model_is_scored_without_dropout_and_left_training(stream: torch.Tensor) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=2, n_positions=64)).train()
    first, second = (perplexity(model, stream, window=32).nll for _ in range(2))
    assert first == second
    assert model.training


def test_a_bf16_model_is_scored_in_fp32(shared_model: Callable[..., PreTrainedModel], shared: Path) -> None:
    ids = read_ids(shared / "data" / "tales-evaluation.u16")[:8]
    fine = perplexity(shared_model("tales-s"), list(ids), window=512)
    coarse = perplexity(shared_model("tales-s", torch.bfloat16), list(ids), window=512)
    assert coarse.nll == pytest.approx(fine.nll, rel=1e-3)


def read_ids(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.fromfile(path, "<u2").astype(np.int64)).reshape(-1, 512)


# The table of the shared folder's README was measured on the first 60 documents of the calibration file.
KNOWN = [
    ("tales-calibration.u16", "tales-xs", 3.79),
    ("tales-calibration.u16", "tales-s", 4.88),
    ("tales-calibration.u16", "tales-m", 4.44),
    ("tales-calibration.u16", "tales-l", 4.56),
    ("tales-evaluation.u16", "tales-xs", 3.765),
    ("tales-evaluation.u16", "tales-s", 4.798),
]


@pytest.mark.parametrize(("file", "name", "known"), KNOWN)
def test_shared_models_have_their_known_perplexity(
    shared_model: Callable[..., PreTrainedModel], shared: Path, file: str, name: str, known: float
) -> None:
    documents = list(read_ids(shared / "data" / file)[:60, :256])
    measured = perplexity(shared_model(name), documents, window=256)
    assert measured.perplexity == pytest.approx(known, abs=0.006)
    assert measured.tokens == 60 * 255


def test_the_record_says_how_it_was_measured(model: LlamaForCausalLM, stream: torch.Tensor) -> None:
    record = perplexity(model, stream, window=64, stride=32).to_json()
    protocol = record["protocol"]
    assert isinstance(protocol, dict)
    assert protocol["text"] == "300 tokens scored, window 64, stride 32, no id added, one stream"
    assert record["tokens"] == 300


def test_progress_counts_windows(model: LlamaForCausalLM, stream: torch.Tensor) -> None:
    seen: list[tuple[str, int, int]] = []
    perplexity(model, stream, window=64, batch=2, progress=lambda *step: seen.append(step))
    assert seen == [("perplexity", done, 5) for done in (1, 2, 3, 4, 5)]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"window": 65}, "64 positions"),
        ({"window": 1}, "at least 2"),
        ({"window": 8, "stride": 9}, "never be scored"),
        ({"window": 8, "stride": 0}, "does not move"),
        ({"window": 8, "stride": -3}, "does not move"),
        ({"window": 8, "stride": 8, "bos": 1}, "use a stride of 1..7"),
        ({"window": 8, "batch": 0}, "batch 0"),
        ({"window": 0}, "at least 2"),
    ],
)
def test_impossible_windows(
    model: LlamaForCausalLM, stream: torch.Tensor, options: dict[str, int], complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint):
        perplexity(model, stream, **options)


@pytest.mark.parametrize(
    ("ids", "complaint"),
    [
        (torch.tensor([], dtype=torch.int64), "document 0 has 0 ids"),
        (torch.tensor([3]), "document 0 has 1 ids"),
        ([torch.tensor([3, 4]), torch.tensor([3])], "document 1 has 1 ids"),
        ([], "no documents"),
        (torch.tensor([[3, 4]]), "1-D"),
        (
            torch.tensor([3, 61, 2]),
            "id 61 at position 1 of document 0 is outside the model's vocabulary 0..60",
        ),
        (torch.tensor([3, 4, -1]), "id -1 at position 2"),
    ],
)
def test_impossible_ids(model: LlamaForCausalLM, ids: torch.Tensor, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        perplexity(model, ids, window=8)


def test_nan_logits_name_the_window(stream: torch.Tensor, tiny: Callable[[int], LlamaForCausalLM]) -> None:
    broken = tiny(0)
    with torch.no_grad():
        broken.get_input_embeddings().weight[60] = float("nan")
    ids = stream[stream != 60][:40].clone()
    ids[25] = 60
    with pytest.raises(WeightError, match=r"window 1 \(ids 20..39 of document 0\)"):
        perplexity(broken, ids, window=20, batch=1)
