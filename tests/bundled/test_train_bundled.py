"""The training script's own arithmetic: it must be the function transformers computes, and the same on every run."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "train_bundled.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_bundled", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_bundled"] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    yield module
    del sys.modules["train_bundled"]


@pytest.fixture(scope="module")
def plan(script):
    return script.Plan(
        vocab=300, width=20, heads=2, kv_heads=1, mlp=36, layers=2, context=32, tokens=6400, batch_tokens=64,
        windows=((0.5, 8), (1.0, 32)), warmup=10,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(script, plan):
    return script.train_tokenizer(["def f(x):\n    return x + 1\n" * 40], plan)


def test_training_forward_is_the_transformers_model(script, plan, tokenizer):
    generator = torch.Generator().manual_seed(3)
    weights = {
        name: weight.to(torch.bfloat16).float() + (weight.dim() == 1) * 0.25
        for name, weight in script.fresh_weights(plan).items()
    }
    ids = torch.randint(0, plan.vocab, (3, 33), generator=generator)
    ours = script.make_loss(plan, torch.float32)(weights, ids[:, :-1], ids[:, 1:])
    model = script.to_transformers(weights, plan, tokenizer).float()
    logits = model(ids[:, :-1]).logits
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_tokenizer_learns_and_round_trips(tokenizer, plan):
    text = "def f(x):\n    return x + 1\n"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text) / 2
    assert len(tokenizer) <= plan.vocab


def test_stream_marks_where_texts_begin_and_end(script, tokenizer):
    stream = script.token_stream(["ab", "c"], tokenizer)
    assert stream.dtype == np.uint16
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert [int(n) for n in stream if n in (bos, eos)] == [bos, eos, bos, eos]


def test_batches_depend_on_seed_and_step_only(script, plan):
    stream = np.arange(1000, dtype=np.uint16)
    whole, following = script.batch_at(stream, plan, 7, 0, 1)
    assert whole.shape == (8, 8)
    assert torch.equal(following, whole + 1)
    halves = [script.batch_at(stream, plan, 7, rank, 2)[0] for rank in (0, 1)]
    assert torch.equal(torch.stack(halves, 1).flatten(0, 1), whole)
    assert not torch.equal(script.batch_at(stream, plan, 8, 0, 1)[0], whole)
    assert script.batch_at(stream, plan, plan.steps - 1, 0, 1)[0].shape == (2, 32)


def test_rate_rises_holds_and_falls_to_zero(script, plan):
    rates = [plan.rate_at(step) for step in range(plan.steps + 1)]
    assert rates[0] == pytest.approx(plan.rate / 10)
    assert rates[10] == rates[50] == plan.rate
    assert rates[-1] == 0
    assert sorted(rates[55:], reverse=True) == rates[55:]


def test_state_survives_a_save(script, plan, tmp_path):
    weights = {name: weight.requires_grad_() for name, weight in script.fresh_weights(plan).items()}
    optimizer = torch.optim.AdamW(list(weights.values()), lr=1e-3)
    ids = torch.arange(33).view(1, 33)
    script.make_loss(plan, torch.float32)(weights, ids[:, :-1], ids[:, 1:]).backward()
    optimizer.step()
    script.save_state(tmp_path / "latest.pt", weights, optimizer, 12, 3.5)
    assert [path.name for path in tmp_path.iterdir()] == ["latest.pt"]
    fresh = {name: weight.requires_grad_() for name, weight in script.fresh_weights(plan).items()}
    other = torch.optim.AdamW(list(fresh.values()), lr=1e-3)
    assert script.load_state(tmp_path / "latest.pt", fresh, other) == (12, 3.5)
    assert all(torch.equal(fresh[name], weight) for name, weight in weights.items())
    assert len(other.state_dict()["state"]) == len(weights)


def test_corpus_has_no_held_out_text(script):
    texts, digest = script.corpus()
    assert len(set(texts)) == len(texts) > 250
    assert len(digest) == 64
    assert not any(script.module_text(name) in set(texts) for name in script.HELD_OUT)


def test_loss_of_fresh_weights_is_near_uniform(script, plan):
    ids = torch.arange(33).view(1, 33)
    loss = script.make_loss(plan, torch.float32)(script.fresh_weights(plan), ids[:, :-1], ids[:, 1:])
    assert abs(loss.item() - math.log(plan.vocab)) < 1
