"""LoRA adapters alone, beside a model and within it; Mistral's own files; pickles: merged, or refused with what they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fracbit
from families import model_of, tiny_llama
from fracbit.checkpoint.load import load_tokenizer
from fracbit.checkpoint.opened import open_float
from fracbit.checkpoint.source import open_source
from fracbit.errors import SourceError
from rounded import SIZES, Packed, check_quantized, check_read, rounded_groups, stream_of

CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM",
    "lora_dropout": 0.1, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "inference_mode": True,
}  # fmt: skip
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}
TARGETS = ("q_proj.weight", "up_proj.weight")


def scale_of(config: dict[str, Any], module: str) -> float:
    alpha = 10.0 if config.get("alpha_pattern") and "up_proj" in module else config["lora_alpha"]
    return float(alpha / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"]))


def folders(
    tmp_path: Path, config: dict[str, Any], inner: str = ".weight", prefix: str = "base_model.model."
) -> tuple[Path, dict[str, Tensor], dict[str, Tensor]]:
    """A base model in `base`; the tensors of an adapter; and the weights with it merged."""
    tiny_llama(**SIZES).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    adapter: dict[str, Tensor] = {}
    merged = dict(weights)
    for name, weight in weights.items():
        if name.endswith(TARGETS):
            module = name.removesuffix(".weight")
            down = torch.randn(config["r"], weight.shape[1], generator=generator)
            up = torch.randn(weight.shape[0], config["r"], generator=generator) * 0.02
            adapter |= {f"{prefix}{module}.lora_A{inner}": down, f"{prefix}{module}.lora_B{inner}": up}
            delta = scale_of(config, module) * (up.double() @ down.double())
            merged[name] = (weight.double() + delta).to(weight.dtype)
    return tmp_path / "base", adapter, merged


def gptq(name: str, weight: Tensor) -> Packed:
    """4 bits in the layout of GPTQ, version 2."""
    layer, index = name.removesuffix(".weight"), torch.arange(weight.shape[1]) // 32
    codes, scale, zero = rounded_groups(weight, 4, 32, asymmetric=True)
    words = {"qweight": stream_of(codes, 4).T, "qzeros": stream_of(zero.T, 4), "scales": scale.T}
    value = (codes - zero[:, index]) * scale.float()[:, index]
    return {f"{layer}.{part}": tensor for part, tensor in words.items()}, value.to(weight.dtype)


def write_adapter(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def write_plain(folder: Path, base: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text((base / "config.json").read_text())
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"alpha_pattern": {"up_proj": 10}}], ids=str)
def test_an_adapter_alone_is_merged_into_its_base(tmp_path: Path, more: dict[str, Any]) -> None:
    base, adapter, merged = folders(tmp_path, CONFIG | more)
    config = CONFIG | more | {"base_model_name_or_path": str(base)}
    alone = write_adapter(tmp_path / "adapter", adapter, config)
    found = check_read(alone, write_plain(tmp_path / "plain", base, merged))
    assert found.decoded == "LoRA merged into 4 weights"
    assert any("LoRA adapter was merged" in note for note in found.notes)


def test_an_adapter_alone_is_quantized_with_its_own_tokenizer(tmp_path: Path) -> None:
    from fracbit.bundled import bundled_model

    base, adapter, merged = folders(tmp_path, CONFIG)
    alone = write_adapter(tmp_path / "adapter", adapter, CONFIG | {"base_model_name_or_path": str(base)})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (alone / name).write_bytes((bundled_model() / name).read_bytes())
    plain = write_plain(tmp_path / "plain", base, merged)
    made = fracbit.quantize(alone, tmp_path / "out", "int4/64", progress=None)
    fracbit.quantize(plain, tmp_path / "out-plain", "int4/64", progress=None)
    first, second = (load_file(tmp_path / out / "model.safetensors") for out in ("out", "out-plain"))
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert any("LoRA" in note for note in made.notes)
    assert len(load_tokenizer(tmp_path / "out")) == 768
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    fracbit.load(tmp_path / "out")


def test_an_adapter_beside_its_model_is_merged(tmp_path: Path) -> None:
    base, adapter, merged = folders(tmp_path, CONFIG)
    plain = write_plain(tmp_path / "plain", base, merged)
    write_adapter(base, adapter, CONFIG | {"base_model_name_or_path": "somewhere/else"})
    check_read(base, plain)
    fracbit.quantize(base, tmp_path / "out", "int4/64", progress=None)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_a_model_that_was_saved_before_it_was_merged(tmp_path: Path, prefix: str) -> None:
    base, adapter, merged = folders(tmp_path, CONFIG, inner=".default.weight", prefix=prefix)
    weights = load_file(base / "model.safetensors")
    inside = {
        prefix + (name.replace(".weight", ".base_layer.weight") if name.endswith(TARGETS) else name): tensor
        for name, tensor in weights.items()
    }
    folder = write_plain(tmp_path / "inside", base, inside | adapter)
    with pytest.raises(
        SourceError, match=r"saved before its LoRA adapter was merged .*and has no adapter_config\.json"
    ):
        open_float(folder)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    check_read(folder, write_plain(tmp_path / "plain", base, merged))


def test_an_adapter_of_a_quantized_base(tmp_path: Path) -> None:
    """QLoRA's: the base is decoded, then the adapter is added."""
    base, adapter, _ = folders(tmp_path, CONFIG)
    weights = load_file(base / "model.safetensors")
    stored: dict[str, Tensor] = {}
    merged: dict[str, Tensor] = {}
    for name, weight in weights.items():
        linear = name.endswith("_proj.weight")
        parts, value = gptq(name, weight) if linear else ({name: weight}, weight)
        stored |= parts
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if name.endswith(TARGETS):
            delta = 1.5 * (
                adapter[f"{key}.lora_B.weight"].double() @ adapter[f"{key}.lora_A.weight"].double()
            )
            value = (value.double() + delta).to(value.dtype)
        merged[name] = value
    coded = write_plain(tmp_path / "coded", base, stored)
    config = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps(config | {"quantization_config": GPTQ}))
    alone = write_adapter(tmp_path / "adapter", adapter, CONFIG | {"base_model_name_or_path": str(coded)})
    plain = write_plain(tmp_path / "plain", base, merged)
    found = check_read(alone, plain)
    assert found.decoded == "GPTQ version 2, 4 bits; LoRA merged into 4 weights"
    check_quantized(alone, plain, tmp_path)


@pytest.mark.filterwarnings("ignore")  # peft's own
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_merges_the_same(tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft", reason="compared with peft where it is installed")
    model = model_of("gpt2", n_embd=64) if kind == "gpt2" else tiny_llama(**SIZES)
    model.save_pretrained(tmp_path / "base")
    targets, saved = (
        (["c_attn", "c_proj"], None) if kind == "gpt2" else (["q_proj", "down_proj"], ["lm_head"])
    )
    config = peft.LoraConfig(
        r=4, lora_alpha=7, target_modules=targets, modules_to_save=saved, use_rslora=True, init_lora_weights=False,
        rank_pattern={targets[1]: 8}, alpha_pattern={targets[1]: 3}, fan_in_fan_out=kind == "gpt2",
    )  # fmt: skip
    torch.manual_seed(0)
    tuned = peft.get_peft_model(model, config)
    if saved:
        with torch.no_grad():
            tuned.base_model.model.lm_head.modules_to_save["default"].weight.normal_()
    tuned.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "adapter")
    theirs = tuned.merge_and_unload().state_dict()
    opened = open_float(tmp_path / "adapter")
    from fracbit.checkpoint.source import read_tensor

    for name, place in opened.origins.tensors.items():
        assert torch.allclose(
            place.read([read_tensor(opened.source, n) for n in place.names]), theirs[name], atol=1e-6
        ), name
    mine = fracbit.load(tmp_path / "adapter")
    assert torch.allclose(
        mine(torch.arange(3, 20)[None]).logits, tuned.base_model(torch.arange(3, 20)[None]).logits, atol=1e-4
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"use_dora": True}, "LORA with use_dora = True"),
        ({"init_lora_weights": "pissa"}, "LORA with init_lora_weights = 'pissa'"),
        ({"peft_type": "IA3"}, r"an adapter of peft \(IA3"),
        ({"bias": "all"}, "LORA with bias = 'all'"),
        ({"layer_replication": [[0, 2]]}, "LORA with layer_replication"),
        (
            {"base_model_name_or_path": "nobody/nothing"},
            "is an adapter of nobody/nothing, which is not there",
        ),
        ({"base_model_name_or_path": None}, "names no base model"),
    ],
)
def test_other_adapters_are_refused_with_what_they_are(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    base, adapter, _ = folders(tmp_path, CONFIG)
    alone = write_adapter(
        tmp_path / "adapter", adapter, CONFIG | {"base_model_name_or_path": str(base)} | change
    )
    with pytest.raises(SourceError, match=rf"{says}.*merge it with peft"):
        open_float(alone)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda tensors: tensors.pop(next(iter(tensors)).replace("lora_A", "lora_B")),
            r"lora_B\.weight is not there",
        ),
        (
            lambda tensors: tensors.update({"base_model.model.other.lora_A.weight": torch.ones(4, 4)}),
            "adapts other, and",
        ),
        (
            lambda tensors: tensors.update({k: torch.ones(4, 7) for k in tensors if "lora_A" in k}),
            "which do not fit",
        ),
        (
            lambda tensors: tensors.update({"base_model.model.lora_embedding_A": torch.ones(4)}),
            "has no place in",
        ),
        (
            lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(9, 9)}),
            "has no place in",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], says: str
) -> None:
    base, adapter, _ = folders(tmp_path, CONFIG)
    change(adapter)
    alone = write_adapter(tmp_path / "adapter", adapter, CONFIG | {"base_model_name_or_path": str(base)})
    with pytest.raises(SourceError, match=says):
        open_float(alone)


def test_an_adapter_in_a_pickle(tmp_path: Path) -> None:
    base, adapter, _ = folders(tmp_path, CONFIG)
    alone = write_adapter(tmp_path / "adapter", adapter, CONFIG | {"base_model_name_or_path": str(base)})
    (alone / "adapter_model.safetensors").rename(alone / "adapter_model.bin")
    with pytest.raises(
        SourceError, match=r"has adapter_config\.json and no adapter_model\.safetensors; if a pickle"
    ):
        open_float(alone)


def test_mistrals_own_files_are_refused_and_ignored_beside_others(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    save_file({"layers.0.attention.wq.weight": torch.ones(2, 2)}, own / "consolidated.safetensors")
    (own / "params.json").write_text("{}")
    with pytest.raises(
        SourceError,
        match=r"in Mistral's own form \(consolidated\.safetensors, params\.json\).*use the files model-",
    ):
        open_float(own)
    tiny_llama(num_hidden_layers=1).save_pretrained(own)
    assert not any("attention.wq" in name for name in open_source(str(own)).tensors)
