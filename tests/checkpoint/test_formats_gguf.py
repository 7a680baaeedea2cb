"""GGUF files, with their config and tokenizer, decoded while they are read. llama.cpp's own package writes them here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fracbit
from families import build, config_of
from fracbit.bundled import bundled_model
from fracbit.checkpoint.load import load_tokenizer
from fracbit.checkpoint.opened import open_float
from fracbit.errors import SourceError
from fracbit.models.experts import split_experts
from rounded import check_quantized, check_read, is_linear

gguf = pytest.importorskip("gguf", reason="GGUF files need the extra: pip install 'fracbit[gguf]'")

BYTES = {
    "Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q2_K": (256, 84),
    "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
}  # fmt: skip
HALVES = {
    "Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2],
    "Q5_K": [0, 2], "Q6_K": [208],
}  # fmt: skip
"""Where the bytes of a block hold a float of 16 bits."""
SIZES = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "vocab_size": 768, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
Stored = tuple[np.ndarray, str, np.ndarray]
"""What a tensor is written as, the name of its type, and the floats that it stands for."""


def small_blocks(kind: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Random blocks [..., bytes of a row] whose scales are near 0.01."""
    weights, size = BYTES[kind]
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (*shape[:-1], shape[-1] // weights, size), dtype=np.uint8)
    for start in HALVES[kind]:
        scale = generator.uniform(0.005, 0.015, blocks.shape[:-1]).astype("<f2")
        blocks[..., start : start + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def number_by_number(kind: str, blocks: np.ndarray) -> np.ndarray:
    """The floats of blocks, each as ggml's header describes it. Types without a line here: as llama.cpp's package says."""
    if kind not in DECODERS:
        found: np.ndarray = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
        return found
    size = BYTES[kind][1]
    rows = blocks.reshape(-1, size)
    values = [list(DECODERS[kind](bytes(row))) for row in rows]
    return np.array(values, np.float32).reshape(*blocks.shape[:-1], -1)


def half(row: bytes, start: int) -> np.float32:
    return np.float32(np.frombuffer(row[start : start + 2], "<f2")[0])


def nibbles(row: bytes) -> list[int]:
    return [byte & 15 for byte in row] + [byte >> 4 for byte in row]


def fifths(row: bytes, start: int) -> list[int]:
    high = int.from_bytes(row[start : start + 4], "little")
    return [low | (high >> place & 1) << 4 for place, low in enumerate(nibbles(row[start + 4 :]))]


def q4_k(row: bytes) -> Iterator[np.float32]:
    scales, codes = row[4:16], row[16:]
    for j in range(8):
        if j < 4:
            scale, low = scales[j] & 63, scales[j + 4] & 63
        else:
            scale = scales[j + 4] & 15 | scales[j - 4] >> 6 << 4
            low = scales[j + 4] >> 4 | scales[j] >> 6 << 4
        for byte in codes[j // 2 * 32 : j // 2 * 32 + 32]:
            code = byte >> 4 if j % 2 else byte & 15
            yield half(row, 0) * np.float32(scale) * np.float32(code) - half(row, 2) * np.float32(low)


def q6_k(row: bytes) -> Iterator[np.float32]:
    for place in range(256):
        half_block, part, l = place // 128, place % 128 // 32, place % 32
        low = row[64 * half_block + l + 32 * (part % 2)]
        low = low >> 4 if part >= 2 else low & 15
        high = row[128 + 32 * half_block + l] >> (2 * part) & 3
        scale = np.frombuffer(row[192:208], np.int8)[8 * half_block + 2 * part + l // 16]
        yield half(row, 208) * np.float32(scale) * np.float32((low | high << 4) - 32)


DECODERS: dict[str, Callable[[bytes], Any]] = {
    "Q8_0": lambda row: (half(row, 0) * np.float32(code) for code in np.frombuffer(row[2:], np.int8)),
    "Q4_0": lambda row: (half(row, 0) * np.float32(code - 8) for code in nibbles(row[2:])),
    "Q4_1": lambda row: (half(row, 0) * np.float32(code) + half(row, 2) for code in nibbles(row[4:])),
    "Q5_0": lambda row: (half(row, 0) * np.float32(code - 16) for code in fifths(row, 2)),
    "Q5_1": lambda row: (half(row, 0) * np.float32(code) + half(row, 2) for code in fifths(row, 4)),
    "Q4_K": q4_k,
    "Q6_K": q6_k,
}


def blocks_of(kind: str) -> Callable[[str, Tensor], Stored]:
    """Linears in random blocks of a type; other matrices in F16, vectors in F32."""

    def encode(name: str, tensor: Tensor) -> Stored:
        if tensor.dim() == 1:
            return tensor.float().numpy(), "F32", tensor.float().numpy()
        if not is_linear(name, tensor[0] if tensor.dim() == 3 else tensor) or kind == "F16":
            return tensor.half().numpy(), "F16", tensor.half().numpy()
        if kind == "BF16":
            return (
                tensor.bfloat16().view(torch.int16).numpy().view(np.uint8),
                "BF16",
                tensor.bfloat16().float().numpy(),
            )
        stored = small_blocks(kind, tuple(tensor.shape), seed=len(name))
        return stored, kind, number_by_number(kind, stored)

    return encode


def twisted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q and k as llama.cpp orders them: pairs of a rotation side by side."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def untwisted(rows: np.ndarray, heads: int) -> np.ndarray:
    """The opposite."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def written(
    where: Path, model: Any, encode: Callable[[str, Tensor], Stored], arch: str = "llama", **metadata: Any
) -> tuple[Path, Path]:
    """A GGUF file of a model with the bundled tokenizer, and a folder with the floats that it stands for."""
    where.mkdir(exist_ok=True)
    config, file, plain = model.config, where / "model.gguf", where / "plain"
    names = gguf.get_tensor_name_map(
        {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], config.num_hidden_layers
    )
    writer = gguf.GGUFWriter(file, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(
        float(config.rope_parameters.get("rope_theta", 10000.0)) if config.rope_parameters else 10000.0
    )
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    for key, value in metadata.items():
        add = {
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            bool: writer.add_bool,
        }[type(value)]
        add(
            f"{arch}.{key.replace('__', '.')}" if not key.startswith("split") else key.replace("__", "."),
            value,
        )
    add_tokenizer(writer)
    values: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("lm_head.weight") and config.tie_word_embeddings:
            continue
        stem, _, leaf = name.rpartition(".")
        stored, kind, floats = encode(name, tensor)
        inside = f"{names.get_name(stem)}.{leaf}"
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(
            inside.split(".")[-2]
        )
        if heads and arch == "llama":
            if kind in ("F16", "F32"):  # the file holds the twisted rows of the model's
                stored = twisted(stored, heads)
            else:
                floats = untwisted(floats, heads)
        if arch == "gemma3" and leaf == "weight" and "norm" in stem:
            stored, floats = stored + 1, stored + 1 - 1
        writer.add_tensor(inside, np.ascontiguousarray(stored), raw_dtype=gguf.GGMLQuantizationType[kind])
        dtype = {"F32": torch.float32, "BF16": torch.bfloat16}.get(kind, torch.float16)
        values[name] = torch.from_numpy(np.ascontiguousarray(floats)).to(dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.save_pretrained(plain)
    save_file(
        {k: v.contiguous() for k, v in values.items()}, plain / "model.safetensors", metadata={"format": "pt"}
    )
    return file, plain


def add_tokenizer(writer: Any) -> None:
    """The tokenizer of the bundled model."""
    made = json.loads((bundled_model() / "tokenizer.json").read_text())
    vocabulary = sorted(made["model"]["vocab"].items(), key=lambda pair: pair[1])
    special = {token["content"] for token in made["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token in special else 1 for token, _ in vocabulary])
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in made["model"]["merges"]]
    )
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def llama(**changes: Any) -> Any:
    return build(config_of("LlamaConfig", **(SIZES | changes)))


@pytest.mark.parametrize("kind", ["F16", "BF16", *BYTES])
def test_every_type_of_blocks(tmp_path: Path, kind: str) -> None:
    file, plain = written(tmp_path, llama(), blocks_of(kind))
    found = check_read(file, plain)
    assert kind in found.decoded or found.decoded == "GGUF, floats"
    assert any("rounded before" in note for note in found.notes) == (kind in BYTES)


def test_the_header_of_a_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its vocabulary takes the reader seconds, and transformers would read it again for the config and for the tokenizer."""
    import gguf

    built: list[object] = []
    whole = gguf.GGUFReader.__init__

    def count(self: object, *args: object, **kwargs: object) -> None:
        built.append(self)
        whole(self, *args, **kwargs)

    file, _ = written(tmp_path, llama(), blocks_of("F16"))
    monkeypatch.setattr(gguf.GGUFReader, "__init__", count)
    opened = open_float(file)
    assert len(built) == 1
    assert opened.source.tensors
    assert gguf.GGUFReader is type(built[0]).__mro__[1]


def test_a_file_and_a_folder_that_holds_one_are_quantized_as_the_floats_are(tmp_path: Path) -> None:
    file, plain = written(tmp_path / "m", llama(tie_word_embeddings=True), blocks_of("Q4_K"))
    check_quantized(file, plain, tmp_path)
    alone = tmp_path / "alone"
    alone.mkdir()
    file.rename(alone / "other-name.gguf")
    made = fracbit.quantize(alone, tmp_path / "from-folder", "int4/64", progress=None)
    assert any("rounded before (GGUF, Q4_K)" in note for note in made.notes)
    first, second = (load_tokenizer(tmp_path / "from-folder"), load_tokenizer(bundled_model()))
    text = "def main(argv):\n    return 12 * len(argv)  # é"
    assert first(text)["input_ids"] == second(text)["input_ids"]
    config = json.loads((tmp_path / "from-folder" / "config.json").read_text())
    assert (config["hidden_size"], config["num_key_value_heads"], config["dtype"]) == (256, 2, "bfloat16")
    names = {path.name for path in (tmp_path / "from-folder").iterdir()}
    assert not any(name.endswith(".gguf") for name in names)
    assert str(tmp_path) not in (tmp_path / "from-folder" / "README.md").read_text()


def test_norms_of_gemma_are_stored_plus_one(tmp_path: Path) -> None:
    model = build(
        config_of("Gemma3TextConfig", **(SIZES | {"tie_word_embeddings": True, "sliding_window": 64}))
    )
    more = {"attention__key_length": 64, "attention__value_length": 64, "attention__sliding_window": 64}
    file, plain = written(tmp_path, model, blocks_of("Q8_0"), arch="gemma3", **more)
    check_read(file, plain)


def test_experts_are_read_one_by_one(tmp_path: Path) -> None:
    sizes = SIZES | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "norm_topk_prob": True,
    }
    model = build(config_of("Qwen3MoeConfig", **sizes))
    split_experts(model)
    state = model.state_dict()
    joined: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stem, _, rest = name.partition(".experts.")
        joined[f"{stem}.experts.{rest.partition('.')[2]}" if rest else name] = (
            torch.stack([state[f"{stem}.experts.{n}.{rest.partition('.')[2]}"] for n in range(4)])
            if rest
            else tensor
        )
    model.state_dict = lambda: joined
    where = tmp_path / "m"
    more = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 256}
    file, plain = written(where, model, blocks_of("Q6_K"), arch="qwen3moe", **more)
    opened = open_float(file)
    assert opened.origins.missing == ()
    from safetensors.torch import load_file

    from fracbit.checkpoint.source import read_tensor

    values = load_file(plain / "model.safetensors")
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        for expert in range(4):
            name = f"model.layers.0.mlp.experts.{expert}.{leaf}.weight"
            whole = values[f"model.layers.0.mlp.experts.{leaf}.weight"]
            assert torch.equal(read_tensor(opened.source, name), whole[expert])


def test_positions_of_llama_3_are_scaled_as_the_file_says(tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    model = llama(rope_parameters=scaling, max_position_embeddings=131072)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    factors = (500000.0 ** -(torch.arange(0, 64, 2) / 64)) / frequencies

    def add(factors: Tensor, folder: str) -> Path:
        writer_init = gguf.GGUFWriter.write_header_to_file

        def with_factors(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.add_tensor("rope_freqs.weight", factors.float().numpy())
            return writer_init(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gguf.GGUFWriter, "write_header_to_file", with_factors)
            return written(tmp_path / folder, model, blocks_of("F16"))[0]

    opened = open_float(add(factors, "right"))
    assert opened.source.config["rope_parameters"] == scaling
    assert opened.origins.unused == ()
    with pytest.raises(SourceError, match=r"factors .*that are not those of Llama 3"):
        open_float(add(factors * torch.linspace(1, 2, 32), "wrong"))


def test_other_scalings_of_positions(tmp_path: Path) -> None:
    how = {
        "rope__scaling__type": "yarn",
        "rope__scaling__factor": 4.0,
        "rope__scaling__original_context_length": 128,
    }
    file, _ = written(tmp_path / "yarn", llama(), blocks_of("F16"), **how)
    found = open_float(file).source.config["rope_parameters"]
    assert (found["rope_type"], found["factor"], found["original_max_position_embeddings"]) == (
        "yarn",
        4.0,
        128,
    )
    file, _ = written(
        tmp_path / "long", llama(), blocks_of("F16"), **(how | {"rope__scaling__type": "longrope"})
    )
    with pytest.raises(SourceError, match="scales positions in a way that is not read from GGUF"):
        open_float(file)


def test_what_is_broken_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = written(tmp_path / "m", llama(), blocks_of("Q4_0"))
    content = file.read_bytes()

    def refuses(says: str, path: Path) -> None:
        with pytest.raises(SourceError, match=says):
            open_float(path)

    cut = tmp_path / "cut.gguf"
    for kept in (0, 3, 40, 3000, len(content) // 2, len(content) - 40):
        cut.write_bytes(content[:kept])
        refuses(r"cut\.gguf (is no GGUF file, or cut|ends inside a tensor)", cut)
    split, _ = written(tmp_path / "split", llama(), blocks_of("F16"), split__count=3)
    refuses("one of 3 files of a model; join them", split)
    both = tmp_path / "both"
    both.mkdir()
    for name in ("a.gguf", "b.gguf"):
        (both / name).write_bytes(content)
    refuses(r"holds 2 GGUF files \(a\.gguf, b\.gguf\); name one", both)
    unknown = tmp_path / "unknown.gguf"
    unknown.write_bytes(content.replace(b"llama", b"lorem"))
    refuses("holds a lorem, which transformers does not read from GGUF", unknown)
    monkeypatch.setitem(sys.modules, "gguf", None)
    refuses(r"needs gguf, which is not installed: pip install", (file.rename(tmp_path / "new-name.gguf")))
