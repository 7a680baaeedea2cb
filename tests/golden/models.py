"""The float models behind the kept files: written tensor by tensor from hashed numbers, the same bits on every machine.

Neither torch's nor numpy's random streams are asked, nor transformers for the names: what is written is what the hub's files
of these architectures hold.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

VOCABULARY = 64
PROMPT = (1, 5, 9, 33, 2, 60, 17, 17, 4, 48, 63, 30)
TEXT = "ids.u16"
LENGTH, SAMPLES = 24, 16
Shapes = dict[str, tuple[int, ...]]

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 32,
    "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    "bos_token_id": 1, "eos_token_id": 2, "dtype": "float32",
}  # fmt: skip
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2,
    "n_head": 4, "n_inner": 44, "n_positions": 64, "activation_function": "gelu_new", "bos_token_id": 1, "eos_token_id": 2,
    "dtype": "float32",
}  # fmt: skip
MOE: dict[str, Any] = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


def shapes_llama(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of a Llama with grouped queries and a tied head."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    found: Shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    for number in range(config["num_hidden_layers"]):
        block = f"model.layers.{number}"
        found |= _attention(block, config)
        found |= {f"{block}.mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        found[f"{block}.mlp.down_proj.weight"] = (width, inner)
    return found


def shapes_moe(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of a Qwen3 mixture of experts."""
    width, inner, heads = config["hidden_size"], config["moe_intermediate_size"], config["head_dim"]
    found: Shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    found["lm_head.weight"] = (config["vocab_size"], width)
    for number in range(config["num_hidden_layers"]):
        block = f"model.layers.{number}"
        found |= _attention(block, config) | {f"{block}.mlp.gate.weight": (config["num_experts"], width)}
        found |= {f"{block}.self_attn.{name}_norm.weight": (heads,) for name in ("q", "k")}
        for expert in range(config["num_experts"]):
            inside = f"{block}.mlp.experts.{expert}"
            found |= {f"{inside}.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
            found[f"{inside}.down_proj.weight"] = (width, inner)
    return found


def shapes_gpt2(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of a GPT-2, its linears stored [in, out]."""
    width, inner = config["n_embd"], config["n_inner"]
    found: Shapes = {
        "transformer.wte.weight": (config["vocab_size"], width),
        "transformer.wpe.weight": (config["n_positions"], width),
    }
    norms, linears = ["transformer.ln_f"], {}
    for number in range(config["n_layer"]):
        block = f"transformer.h.{number}"
        norms += [f"{block}.ln_1", f"{block}.ln_2"]
        linears |= {f"{block}.attn.c_attn": (width, 3 * width), f"{block}.attn.c_proj": (width, width)}
        linears |= {f"{block}.mlp.c_fc": (width, inner), f"{block}.mlp.c_proj": (inner, width)}
    for norm in norms:
        found |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for name, shape in linears.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[1:]}
    return found


def _attention(block: str, config: Mapping[str, Any]) -> Shapes:
    width, size = config["hidden_size"], config["head_dim"]
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    heads["v"] = heads["k"]
    found: Shapes = {
        f"{block}.{norm}.weight": (width,) for norm in ("input_layernorm", "post_attention_layernorm")
    }
    found |= {f"{block}.self_attn.{name}_proj.weight": (count * size, width) for name, count in heads.items()}
    found[f"{block}.self_attn.o_proj.weight"] = (width, heads["q"] * size)
    return found


MODELS = {"llama": (LLAMA, shapes_llama), "gpt2": (GPT2, shapes_gpt2), "moe": (MOE, shapes_moe)}


def hashed(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers fp32 of a bell shape around 0, deviation about 0.58, multiples of 2^-8: sums of four bytes of a hash."""
    count = math.prod(shape)
    raw = np.frombuffer(hashlib.shake_256(name.encode()).digest(4 * count), dtype=np.uint8)
    sums = raw.reshape(count, 4).astype(np.int64).sum(1) - 510
    return torch.from_numpy(sums.astype(np.float32) / 256).view(shape)


def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of a model: gains about 1, biases about 0, matrices of about 1 / sqrt(32), a few of their inputs larger."""
    values = hashed(name, shape)
    if len(shape) == 1:
        return values / 4 + (1.0 if name.endswith(".weight") else 0.0)
    if "embed" in name or ".wte." in name:
        return values
    values = values / 4
    inputs = 0 if any(part in name for part in (".c_attn.", ".c_proj.", ".c_fc.")) else 1
    values.narrow(inputs, 3, 1).mul_(4)  # an input that every rule would keep in 16 bits
    return values


def write_model(kind: str, folder: Path) -> None:
    """Write the float checkpoint of a model into `folder`."""
    config, shapes = MODELS[kind]
    folder.mkdir(parents=True)
    dtype = getattr(torch, config["dtype"])
    tensors = {name: tensor(name, shape).to(dtype) for name, shape in shapes(config).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def write_text(path: Path) -> None:
    """Write the calibration ids: as many samples as the recipes take and half as many more."""
    count = 3 * SAMPLES * LENGTH // 2
    raw = np.frombuffer(hashlib.shake_256(b"text").digest(count), dtype=np.uint8)
    (raw % VOCABULARY).astype("<u2").tofile(path)
