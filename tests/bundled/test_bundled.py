"""The bundled model must load with stock transformers, predict Python it never saw, and feel quantization.

A demo model that hardly feels rounding makes every method look equal, so the last group of tests states how much the
perplexity must rise under plain round-to-nearest. It is written out here in ten lines: an independent reference.
"""

import json
import math
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from fracbit.bundled import (
    HELD_OUT,
    bundled_model,
    held_out_text,
    module_text,
    training_modules,
    training_text,
)
from fracbit.errors import DataError

WINDOW = 256
WINDOWS = 120  # spread over all held-out modules, about 30 000 tokens: seconds on one core


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(bundled_model())


@pytest.fixture(scope="module")
def windows(tokenizer):
    ids = tokenizer(held_out_text()).input_ids
    every = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
    return every[:: len(every) // WINDOWS][:WINDOWS]


def load():
    return AutoModelForCausalLM.from_pretrained(bundled_model(), dtype=torch.float32).eval()


def perplexity(model, windows):
    with torch.no_grad():
        losses = [model(part, labels=part).loss.item() for part in windows.split(8)]
    return math.exp(sum(losses) / len(losses))


def round_to_nearest(weight, bits, block=64):
    """Min-max affine codes with an integer zero point, blocks of consecutive input channels, the last one short."""
    rounded = []
    for part in weight.split(block, dim=1):
        low = part.amin(1, keepdim=True).clamp(max=0)
        high = part.amax(1, keepdim=True).clamp(min=0)
        scale = (high - low) / (2**bits - 1)
        zero = (-low / scale).round()
        rounded.append((((part / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale)
    return torch.cat(rounded, dim=1)


def quantized(bits):
    model = load()
    with torch.no_grad():
        for layer in model.model.layers:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.copy_(round_to_nearest(module.weight, bits))
    return model


@pytest.fixture(scope="module")
def float_perplexity(windows):
    return perplexity(load(), windows)


def test_folder_is_small_and_complete():
    files = [
        path for path in bundled_model().rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert sum(path.stat().st_size for path in files) < 4_000_000
    names = {path.name for path in files}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        "training.json",
    } <= names


def test_shape_exercises_short_blocks():
    config = json.loads((bundled_model() / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["tie_word_embeddings"]
    assert config["hidden_size"] % 64 != 0
    assert config["intermediate_size"] % 64 != 0
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["max_position_embeddings"] >= 512
    assert 512 <= config["vocab_size"] <= 1024


def test_parameters_and_training_length():
    model = load()
    count = sum(parameter.numel() for parameter in model.parameters())
    record = json.loads((bundled_model() / "training.json").read_text())
    assert count == record["parameters"]
    assert 250_000 <= count <= 500_000
    assert record["training_tokens"] / count >= 200


def test_card_states_the_record():
    record = json.loads((bundled_model() / "training.json").read_text())
    card = (bundled_model() / "README.md").read_text()
    rounded = [f"{row['perplexity']:.2f}" for row in record["rounded"].values()]
    figures = [
        f"{record['parameters']:,}",
        record["corpus_sha256"],
        f"{record['training_tokens']:,}",
        *rounded,
    ]
    assert [figure for figure in figures if figure not in card] == []


@pytest.mark.parametrize(
    "text",
    [
        "def main():\n    return 0\n",
        "",
        "\t\r\n  x",
        "naïve ∑ 漢字 🐍",
        "<|bos|>a<|eos|>",
        "a  b\n\n\n   c ",
        "\x00\x7f\ufeff",
    ],
)
def test_tokenizer_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_round_trip_on_modules(tokenizer):
    text = held_out_text()
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert len(text) / len(ids) > 2
    assert max(ids) < len(tokenizer)
    assert tokenizer.bos_token_id != tokenizer.eos_token_id


def test_predicts_unseen_modules(windows, float_perplexity):
    counts = Counter(windows.flatten().tolist())
    unigram = math.exp(-sum(n * math.log(n / windows.numel()) for n in counts.values()) / windows.numel())
    assert float_perplexity < 14  # 12.0 on the text of Python 3.11, 11.7 on 3.10, 12.6 on 3.12 and 3.13
    assert float_perplexity < unigram / 10


def test_bfloat16_loads_as_well(windows, float_perplexity):
    model = AutoModelForCausalLM.from_pretrained(bundled_model(), dtype=torch.bfloat16).eval()
    assert perplexity(model, windows[:16]) == pytest.approx(perplexity(load(), windows[:16]), rel=0.02)


def test_long_context_helps(tokenizer):
    ids = torch.tensor(tokenizer(held_out_text()).input_ids[: 512 * 40]).view(40, 512)
    model = load()
    with torch.no_grad():
        long = model(ids).logits[:, 384:-1]
        short = model(ids[:, 320:]).logits[:, 64:-1]
    losses = [F.cross_entropy(logits.transpose(1, 2), ids[:, 385:]) for logits in (long, short)]
    assert losses[0] < losses[1]


def test_three_bits_cost_more_than_ten_percent(windows, float_perplexity):
    assert perplexity(quantized(3), windows) > 1.10 * float_perplexity


def test_two_bits_at_least_double(windows, float_perplexity):
    assert perplexity(quantized(2), windows) > 2 * float_perplexity


def test_eight_bits_cost_nothing(windows, float_perplexity):
    assert perplexity(quantized(8), windows) == pytest.approx(float_perplexity, rel=0.01)


def test_generates_python(tokenizer):
    prompt = tokenizer("def main(", return_tensors="pt")
    ids = load().generate(**prompt, max_new_tokens=64, do_sample=False)
    text = tokenizer.decode(ids[0])
    assert text.startswith("def main(")
    assert "):\n    " in text


def test_held_out_is_never_trained_on():
    modules = training_modules()
    assert not set(modules) & set(HELD_OUT)
    assert len(modules) > 250
    assert len(set(HELD_OUT)) == len(HELD_OUT) >= 25
    assert not any("test" in Path(name).parts for name in modules)
    texts = {module_text(name) for name in modules}
    assert not any(module_text(name) in texts for name in HELD_OUT)


def test_texts():
    assert len(held_out_text()) > 250_000
    assert module_text("argparse.py") in held_out_text()
    assert len(training_text(10_000)) == 10_000
    assert training_text(300_000).startswith(training_text(10_000))


def test_limit_must_be_positive():
    with pytest.raises(DataError, match="got limit=0"):
        training_text(0)


def test_missing_source_is_a_clear_error(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match=r"cannot read .*queue\.py.*ships its"):
        held_out_text()
    with pytest.raises(DataError, match="got no Python source"):
        training_text(10)
