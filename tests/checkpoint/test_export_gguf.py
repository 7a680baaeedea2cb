"""Export as GGUF: types bit for bit, by llama.cpp's package and by our reader; families, tokenizers, refusals, resuming."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import fracbit
from families import build, config_of, tiny_llama
from fracbit.bundled import bundled_model
from fracbit.checkpoint.export.exporter import export, open_stored
from fracbit.checkpoint.export.gguf import gguf_file, vocabulary
from fracbit.checkpoint.export.gguf.architectures import ARCHITECTURES
from fracbit.checkpoint.export.gguf.block_types import BLOCK_TYPES
from fracbit.checkpoint.export.gguf.pretokenizers import HASHES, sample_hash
from fracbit.checkpoint.export.gguf.sentencepiece_model import read_pieces
from fracbit.checkpoint.export.gguf.special_tokens import added_tokens, letters
from fracbit.checkpoint.folder import JOURNAL
from fracbit.checkpoint.load import load_tokenizer
from fracbit.checkpoint.opened import open_float
from fracbit.checkpoint.source import read_tensor
from fracbit.errors import FormatError, OutputError, RecipeError, SourceError
from fracbit.models.blocks import is_transposed
from fracbit.numerics import decode
from fracbit.pipeline.quantize.run import write_checkpoint
from fracbit.records.recipe import Override, Recipe
from fracbit.records.scheme import parse_scheme
from outputs import logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fracbit.checkpoint.export.exporter import StoredModel

gguf = pytest.importorskip("gguf", reason="GGUF files need the extra: pip install 'fracbit[gguf]'")

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WIDE = SIZES | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 1}
"""Widths of superblocks."""
FILES = {"MXFP4": "MXFP4_MOE", "Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
"""Types whose files llama.cpp calls after a mixture of them."""
SPARSE = SIZES | {
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "mlp_only_layers": [],
}
FALCON = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SIZES),
    "llama-tied": ("LlamaConfig", SIZES | {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", SIZES),
    "qwen2": ("Qwen2Config", SIZES),
    "qwen3": ("Qwen3Config", SIZES | {"head_dim": 128}),
    "qwen3_moe": ("Qwen3MoeConfig", SPARSE | {"norm_topk_prob": True}),
    "gemma2": ("Gemma2Config", SIZES | {"query_pre_attn_scalar": 16}),
    "gemma3": (
        "Gemma3TextConfig",
        SIZES | {"query_pre_attn_scalar": 16, "num_hidden_layers": 6, "sliding_window": 32},
    ),
    "phi3": ("Phi3Config", SIZES | {"vocab_size": 32064}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024, "n_ctx": 1024}),
    "starcoder2": ("Starcoder2Config", SIZES | {"vocab_size": 49152}),
    "stablelm": ("StableLmConfig", SIZES | {"use_qkv_bias": True}),
    "nemotron": ("NemotronConfig", SIZES),
    "mixtral": ("MixtralConfig", SPARSE | {"num_local_experts": 3}),
    "qwen2_moe": ("Qwen2MoeConfig", SPARSE | {"shared_expert_intermediate_size": 32}),
    "bloom": ("BloomConfig", {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "falcon": ("FalconConfig", FALCON | {"multi_query": True}),
    "falcon-large": ("FalconConfig", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
}
"""Models with widths of 32 and more that transformers reads from GGUF; sizes that it does not read are its defaults."""
UNREAD: Mapping[str, tuple[str, dict[str, Any]]] = {
    "smollm3": ("SmolLM3Config", SIZES | {"num_hidden_layers": 4}),
    "granite": (
        "GraniteConfig",
        {name: size for name, size in SIZES.items() if name != "head_dim"}
        | {"embedding_multiplier": 12.0, "attention_multiplier": 0.25},
    ),
    "seed_oss": ("SeedOssConfig", SIZES),
    "gpt_neox": ("GPTNeoXConfig", FALCON | {"intermediate_size": 96}),
    "gemma": ("GemmaConfig", SIZES),
}
"""Models that llama.cpp runs, and whose files transformers does not read."""


def quantized(
    model: PreTrainedModel,
    where: Path,
    scheme: str = "int:step8/32",
    tokenizer: Path | None = None,
    **recipe: Any,
) -> Path:
    """A fracbit checkpoint of a model below `where`, perhaps with the files of a tokenizer."""
    model.save_pretrained(where / "float")
    for file in [] if tokenizer is None else tokenizer.glob("token*"):
        shutil.copy(file, where / "float")
    write_checkpoint(Recipe(model=str(where / "float"), scheme=parse_scheme(scheme), **recipe), where / "q")
    return where / "q"


def exported(done: Path, where: Path, **options: Any) -> Path:
    """The GGUF file of a checkpoint."""
    export(done, where, "gguf", progress=None, **options)
    return where / "model.gguf"


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def stored_floats(file: Path) -> dict[str, tuple[str, np.ndarray]]:
    """The type of every tensor and its floats, as llama.cpp's package decodes them."""
    tensors = gguf.GGUFReader(file).tensors
    return {
        each.name: (each.tensor_type.name, gguf.dequantize(each.data, each.tensor_type)) for each in tensors
    }


def true_weights(stored: StoredModel) -> dict[str, torch.Tensor]:
    """Every weight of a checkpoint in fp32, by its name in the model."""
    layers = {f"{name}.weight": decode(stored.packed(name)) for name in stored.disk}
    return layers | {name: stored.tensor(name).float() for name in stored.rest}


def twisted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q and k as llama.cpp's Llama orders them: pairs of a rotation side by side."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_every_type_is_stored_bit_for_bit(kind: str, tmp_path: Path) -> None:
    scheme, sizes = BLOCK_TYPES[kind].scheme, WIDE if BLOCK_TYPES[kind].length > 32 else SIZES
    table = scheme if BLOCK_TYPES[kind].factor is None else None
    done = quantized(tiny_llama(**sizes), tmp_path, str(scheme), embeddings=table, search=True)
    held, weights = stored_floats(exported(done, tmp_path / "made")), true_weights(open_stored(done))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, sizes["num_hidden_layers"])
    for name, weight in weights.items():
        inside = names.get_name(name, try_suffixes=(".weight",))
        heads = {"attn_q": 4, "attn_k": 2}.get(inside.split(".")[-2])
        wanted = twisted(weight, heads) if heads else weight
        assert held[inside][0] == (kind if name.removesuffix(".weight") in open_stored(done).disk else "F32")
        beside = held.pop(f"{inside.removesuffix('.weight')}.scale", ("F32", np.ones(1, np.float32)))
        assert np.array_equal(held.pop(inside)[1] * beside[1], wanted.numpy()), inside
    assert not held, "the file holds nothing else"
    made = fields(tmp_path / "made" / "model.gguf")
    assert made["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{FILES.get(kind, kind)}"]
    assert made["general.quantization_version"] == gguf.GGML_QUANT_VERSION


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_reads_back_with_equal_weights(family: str, tmp_path: Path) -> None:
    """What transformers makes of llama.cpp's tensors is the model: rows in order, norms without 1, experts apart."""
    kind, sizes = FAMILIES[family]
    done = quantized(build(config_of(kind, **sizes)), tmp_path)
    opened = open_float(exported(done, tmp_path / "made"))
    assert opened.origins.missing == ()
    assert opened.origins.unused == ()
    stored = open_stored(done)
    for name, weight in true_weights(stored).items():
        place = opened.origins.tensors[name]
        found = place.read([read_tensor(opened.source, each) for each in place.names])
        if name.endswith(".weight") and is_transposed(
            stored.model.get_submodule(name.removesuffix(".weight"))
        ):
            weight = weight.T  # GPT-2's model holds it [in, out]
        assert torch.allclose(found.float(), weight.to(found.dtype).float(), rtol=2e-6, atol=1e-6), name


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "bloom", "falcon-large"])
def test_what_transformers_does_not_read_of_a_family_is_read_all_the_same(
    family: str, tmp_path: Path
) -> None:
    """Experts of a Llama, groups of heads, what keeps a norm from dividing by 0: the model predicts what it did."""
    kind, sizes = FAMILIES[family]
    epsilon = {"layer_norm_epsilon": 0.25} if family in ("bloom", "falcon-large") else {}
    done = quantized(build(config_of(kind, **sizes, **epsilon)), tmp_path)
    model = fracbit.load(exported(done, tmp_path / "made"), "float32")
    assert model.config.model_type == config_of(kind).model_type
    ids = torch.arange(3, 40)[None]
    assert torch.allclose(logits(model, ids), logits(fracbit.load(done), ids), atol=1e-2)


def test_every_family_of_the_table_is_tried_here() -> None:
    tried = {config_of(kind).model_type for kind, _ in (FAMILIES | UNREAD).values()}
    assert tried == set(ARCHITECTURES)


@pytest.mark.parametrize("family", UNREAD)
def test_a_family_that_transformers_does_not_read(family: str, tmp_path: Path) -> None:
    """Values by llama.cpp's package, in its order of rows; fracbit's own reader says that it cannot."""
    kind, sizes = UNREAD[family]
    done = quantized(build(config_of(kind, **sizes)), tmp_path)
    file = exported(done, tmp_path / "made")
    held, weights = stored_floats(file), true_weights(open_stored(done))
    names = gguf.get_tensor_name_map(
        {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[ARCHITECTURES[family].name], 4
    )
    for name, weight in weights.items():
        inside = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if family in ("smollm3", "granite") and ".attn_q." in inside:
            weight = twisted(weight, 4)
        if family in ("smollm3", "granite") and ".attn_k." in inside:
            weight = twisted(weight, sizes["num_key_value_heads"])
        if "attn_qkv" in inside:  # [heads, parts, head size, ...] before
            weight = weight.view(4, 3, 16, -1).transpose(0, 1).reshape(weight.shape)
        if family == "gemma" and "norm" in inside:
            weight = weight + 1
        assert np.allclose(held.pop(inside)[1], weight.numpy(), atol=1e-6), inside
    assert not held
    with pytest.raises(SourceError, match="does not read from GGUF"):
        open_float(file)


def test_what_llama_cpp_fixes_of_a_family_is_checked(tmp_path: Path) -> None:
    kind, sizes = UNREAD["smollm3"]
    cases = {
        r"not every 4\. layer": (kind, sizes | {"no_rope_layers": [1, 1, 0, 1]}),
        "base of its positions is 5000": (
            "GPTNeoXConfig",
            UNREAD["gpt_neox"][1]
            | {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 5000.0,
                    "partial_rotary_factor": 0.25,
                }
            },
        ),
        "attention_out_bias is True": ("SeedOssConfig", SIZES | {"attention_out_bias": True}),
    }
    for number, (says, (name, own)) in enumerate(cases.items()):
        done = quantized(build(config_of(name, **own)), tmp_path / str(number))
        with pytest.raises(FormatError, match=says):
            exported(done, tmp_path / f"made-{number}")


def test_falcons_heads_are_sorted_into_q_k_and_v(tmp_path: Path) -> None:
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    for number, more in enumerate(
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, {"multi_query": True})
    ):
        done = quantized(build(config_of("FalconConfig", **sizes, **more)), tmp_path / str(number))
        weight = decode(open_stored(done).packed("transformer.h.0.self_attention.query_key_value"))
        groups = 2 - number
        parts = weight.view(groups, 4 // groups + 2, 16, 64)  # [groups, heads of a group, head size, in]
        wanted = torch.cat(
            [parts[:, :-2].reshape(-1, 64), parts[:, -2].reshape(-1, 64), parts[:, -1].reshape(-1, 64)]
        )
        file = exported(done, tmp_path / f"made-{number}")
        assert np.array_equal(stored_floats(file)["blk.0.attn_qkv.weight"][1], wanted.numpy())
        assert fields(file)["falcon.attention.head_count_kv"] == groups


def test_blooms_heads_are_sorted_into_q_k_and_v(tmp_path: Path) -> None:
    done = quantized(
        build(config_of("BloomConfig", vocab_size=96, hidden_size=64, n_layer=1, n_head=4)), tmp_path
    )
    held, weights = stored_floats(exported(done, tmp_path / "made")), true_weights(open_stored(done))
    for leaf in ("weight", "bias"):
        rows = weights[f"transformer.h.0.self_attention.query_key_value.{leaf}"]
        wanted = (
            rows.view(4, 3, 16, -1).transpose(0, 1).reshape(rows.shape)
        )  # [heads, parts, head size, ...] before
        assert np.array_equal(held[f"blk.0.attn_qkv.{leaf}"][1], wanted.numpy())
    norm = weights["transformer.word_embeddings_layernorm.bias"]
    assert np.array_equal(held["token_embd_norm.bias"][1], norm.numpy())


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2Moe"])
def test_mixtures_share_a_tensor_and_a_type(kind: str, tmp_path: Path) -> None:
    sizes = SPARSE | {"num_local_experts": 3, "shared_expert_intermediate_size": 32}
    model = build(config_of(f"{kind}Config", **sizes))
    done = quantized(model, tmp_path)
    held, stored = stored_floats(exported(done, tmp_path / "made")), open_stored(done)
    for expert in range(3):
        for inside, leaf in (("ffn_down_exps", "down_proj"), ("ffn_gate_exps", "gate_proj")):
            wanted = decode(stored.packed(f"model.layers.1.mlp.experts.{expert}.{leaf}"))
            found = held[f"blk.1.{inside}.weight"]
            assert found[0] == "Q8_0"
            assert np.array_equal(found[1][expert], wanted.numpy())
    assert held["blk.0.ffn_gate_inp.weight"][0] == "F32"
    other = Override(layers="*.1.mlp.experts.2.up_proj", scheme=parse_scheme("int:step4/32"))
    mixed = quantized(model, tmp_path / "mixed", overrides=(other,))
    says = r"experts of blk\.1\.ffn_up_exps\.weight .*experts\.0\.up_proj Q8_0.*experts\.2\.up_proj Q4_0; quantize all experts"
    with pytest.raises(FormatError, match=says):
        export(mixed, tmp_path / "mixed-made", "gguf")
    assert not (tmp_path / "mixed-made").exists()


def test_floats_keep_their_type_and_vectors_are_f32(tmp_path: Path) -> None:
    keep = (Override(layers="*.0.mlp.*", keep=True),)
    for dtype, kind in ((torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")):
        where = tmp_path / kind
        done = quantized(tiny_llama(**SIZES).to(dtype), where, overrides=keep)
        held = stored_floats(exported(done, where / "made"))
        assert (
            held["blk.0.ffn_up.weight"][0] == held["token_embd.weight"][0] == held["output.weight"][0] == kind
        )
        assert held["blk.0.attn_norm.weight"][0] == "F32"
        weights = true_weights(open_stored(done))
        assert np.array_equal(
            held["blk.0.ffn_up.weight"][1], weights["model.layers.0.mlp.up_proj.weight"].numpy()
        )


def test_scaled_positions(tmp_path: Path) -> None:
    llama3 = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    done = quantized(
        tiny_llama(**(SIZES | {"rope_parameters": llama3, "max_position_embeddings": 131072})), tmp_path
    )
    file = exported(done, tmp_path / "made")
    assert open_float(file).source.config["rope_parameters"] == llama3
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    done = quantized(tiny_llama(**(SIZES | {"rope_parameters": yarn})), tmp_path / "yarn")
    made = fields(exported(done, tmp_path / "yarn-made"))
    assert (made["llama.rope.scaling.type"], made["llama.rope.scaling.factor"]) == ("yarn", 4.0)
    assert made["llama.rope.scaling.original_context_length"] == 16
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    done = quantized(tiny_llama(**(SIZES | {"rope_parameters": dynamic})), tmp_path / "dynamic")
    with pytest.raises(
        FormatError,
        match=r"positions are scaled by dynamic, and llama\.cpp has default, linear, yarn, llama3",
    ):
        export(done, tmp_path / "dynamic-made", "gguf")


# --- tokenizers -------------------------------------------------------------------------------------------------------


def test_merges_of_bytes_are_written_with_how_text_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(bundled_model())
    model = tiny_llama(**(SIZES | {"vocab_size": len(tokenizer) + 2}))
    done = quantized(model, tmp_path, tokenizer=bundled_model())
    with pytest.raises(
        FormatError, match=r"does not know how the tokenizer of .* cuts text \(hash [0-9a-f]{16}\)"
    ):
        export(done, tmp_path / "made", "gguf")
    assert not (tmp_path / "made").exists()
    monkeypatch.setitem(HASHES, "tiny", (sample_hash(tokenizer),))
    file = exported(done, tmp_path / "made")
    made = fields(file)
    known = {number: token for token, number in tokenizer.get_vocab().items()}
    assert (made["tokenizer.ggml.model"], made["tokenizer.ggml.pre"]) == ("gpt2", "tiny")
    assert made["tokenizer.ggml.tokens"][-2:] == [f"[PAD{len(tokenizer) + number}]" for number in (0, 1)]
    assert made["tokenizer.ggml.tokens"][:-2] == [known[number] for number in range(len(tokenizer))]
    special = set(tokenizer.all_special_ids)
    kinds = [3 if number in special else 1 for number in range(len(tokenizer))]
    assert made["tokenizer.ggml.token_type"] == [*kinds, 5, 5]
    merges = json.loads((bundled_model() / "tokenizer.json").read_text())["model"]["merges"]
    assert made["tokenizer.ggml.merges"] == [
        each if isinstance(each, str) else " ".join(each) for each in merges
    ]
    assert made["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    text = "def main(argv):\n    return 12 * len(argv)  # é"
    fracbit.quantize(file, tmp_path / "again", "int4/32", progress=None)
    assert load_tokenizer(tmp_path / "again")(text)["input_ids"] == tokenizer(text)["input_ids"]
    small = quantized(tiny_llama(**SIZES), tmp_path / "small", tokenizer=bundled_model())
    with pytest.raises(FormatError, match="its model 96 tokens; use the one it was released with"):
        export(small, tmp_path / "small-made", "gguf")


def piece(text: bytes, score: float, kind: int) -> bytes:
    """A piece as sentencepiece stores it."""
    inside = (
        b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
    )
    return b"\x0a" + bytes([len(inside)]) + inside


def sentences(folder: Path) -> Path:
    """A folder with a model of sentencepiece, and tokens that were added to it."""
    folder.mkdir()
    pieces = [
        (b"<unk>", 0.0, 2),
        (b"<s>", 0.0, 3),
        (b"</s>", 0.0, 3),
        (b"<0x0A>", 0.0, 6),
        (b"\xe2\x96\x81a", -1.5, 1),
    ]
    more = b"\x12\x04\x08\x01\x10\x02" + b"\x5d" + struct.pack("<f", 1.0)  # other fields of the file
    content = b"".join(piece(*each) for each in [*pieces, (b"<mine>", 0.0, 4)]) + more
    (folder / "tokenizer.model").write_bytes(content)
    added = {"6": {"content": "<|end|>", "special": False}, "7": {"content": "\u2581x", "special": False}}
    settings = {
        "added_tokens_decoder": added,
        "bos_token": "<s>",
        "add_bos_token": True,
        "add_prefix_space": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_pieces_of_sentencepiece(tmp_path: Path) -> None:
    done = quantized(tiny_llama(**SIZES), tmp_path, tokenizer=sentences(tmp_path / "t"))
    made = fields(exported(done, tmp_path / "made"))
    assert (made["tokenizer.ggml.model"], made["tokenizer.ggml.pre"]) == ("llama", "default")
    assert made["tokenizer.ggml.tokens"][:9] == [
        "<unk>", "<s>", "</s>", "<0x0A>", "\u2581a", "<mine>", "<|end|>", " x", "[PAD8]"
    ]  # fmt: skip
    assert made["tokenizer.ggml.token_type"][:9] == [2, 3, 3, 6, 1, 1, 3, 4, 5]
    assert made["tokenizer.ggml.scores"][:9] == [0, 0, 0, 0, -1.5, 0, -1000, -1000, -10000]
    assert len(made["tokenizer.ggml.tokens"]) == SIZES["vocab_size"]
    assert (made["tokenizer.ggml.bos_token_id"], made["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert made["tokenizer.ggml.add_bos_token"] is True
    assert made["tokenizer.ggml.add_space_prefix"] is False
    for broken in (b"", b"\x0a\xff", b"\x0b\x01", b"\x12\x00"):
        (tmp_path / "t" / "tokenizer.model").write_bytes(broken)
        with pytest.raises(
            FormatError, match=r"tokenizer\.model (is no model of|holds no pieces of) sentencepiece"
        ):
            read_pieces(tmp_path / "t" / "tokenizer.model")


def test_what_stands_around_a_text(tmp_path: Path) -> None:
    first, last = ({"SpecialToken": {"id": text, "type_id": 0}} for text in ("<s>", "</s>"))
    text = {"Sequence": {"id": "A", "type_id": 0}}
    bytes_, template = {"type": "ByteLevel"}, {"type": "TemplateProcessing"}
    cases: list[tuple[Any, dict[str, bool]]] = [
        (None, {}),
        (bytes_, {"bos": False, "eos": False}),
        (template | {"single": [first, text]}, {"bos": True}),
        (template | {"single": [last, text, last]}, {"bos": False, "eos": True}),
        (
            {"type": "Sequence", "processors": [bytes_, template | {"single": [first, text]}]},
            {"bos": True, "eos": False},
        ),
        (
            {"type": "Sequence", "processors": [template | {"single": [first, text]}, bytes_]},
            {"bos": True, "eos": False},
        ),
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    for processor, wanted in cases:
        (tmp_path / "tokenizer.json").write_text(json.dumps({"post_processor": processor}))
        assert added_tokens(tmp_path) == wanted
    nested = {
        "type": "Sequence",
        "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}, {"type": "StripAccents"}],
    }
    for normalizer, found in ((None, {}), (nested, {"lowercase": True, "strip_accents": True})):
        (tmp_path / "tokenizer.json").write_text(json.dumps({"normalizer": normalizer}))
        assert letters(tmp_path) == found


def test_a_chat_template_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into the file and out of it: conversations are judged with it."""
    tokenizer = load_tokenizer(bundled_model())
    monkeypatch.setitem(HASHES, "tiny", (sample_hash(tokenizer),))
    model = tiny_llama(**(SIZES | {"vocab_size": len(tokenizer)}))
    done = quantized(model, tmp_path, tokenizer=bundled_model())
    (done / "chat_template.jinja").write_text("{{ messages[0].content }}")
    file = exported(done, tmp_path / "made")
    assert fields(file)["tokenizer.chat_template"] == "{{ messages[0].content }}"
    assert (open_float(file).source.folder / "chat_template.jinja").read_text() == "{{ messages[0].content }}"


def test_a_checkpoint_without_a_tokenizer_gives_a_file_without_one(tmp_path: Path) -> None:
    done = quantized(tiny_llama(**SIZES), tmp_path)
    made = fields(exported(done, tmp_path / "made"))
    assert made["tokenizer.ggml.model"] == "none"
    assert "tokenizer.ggml.tokens" not in made
    assert (made["general.name"], made["general.type"]) == ("Float", "model")


# --- what is refused, and the folder ----------------------------------------------------------------------------------


def test_what_llama_cpp_does_not_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    falcon = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    refused = {
        "does not know models of type opt; it knows llama,.*Export float": config_of("opt", hidden_size=64, ffn_dim=64),
        "type falcon in another way: alibi is True, and llama.cpp has False": config_of("FalconConfig", **falcon, alibi=True),
        "not every 6. layer, and no other, sees everything": config_of(
            "Gemma3TextConfig", **SIZES, layer_types=["full_attention", "sliding_attention"], query_pre_attn_scalar=16
        ),
        "query_pre_attn_scalar is 7, and no head has that size": config_of("Gemma2Config", **SIZES, query_pre_attn_scalar=7),
        r"mlp_only_layers is \[1\]": config_of("Qwen3MoeConfig", **(SPARSE | {"mlp_only_layers": [1], "norm_topk_prob": True})),
    }  # fmt: skip
    for number, (says, config) in enumerate(refused.items()):
        done = quantized(build(config), tmp_path / str(number))
        with pytest.raises(FormatError, match=says):
            export(done, tmp_path / f"made-{number}", "gguf", requantize=True)
        assert not (tmp_path / f"made-{number}").exists()


def test_inputs_that_are_changed_at_run_time_are_refused(tmp_path: Path) -> None:
    done = quantized(tiny_llama(**SIZES), tmp_path)
    config = json.loads((done / "config.json").read_text())
    changes = {"inputs": {"dtype": "int", "bits": 8, "scope": "token"}, "rotation": "hadamard"}
    for key, says in (
        ("inputs", "inputs are rounded to int8/token"),
        ("rotation", "inputs are rotated while"),
    ):
        changed = json.loads(json.dumps(config))
        for entry in changed["quantization_config"]["layers"].values():
            entry[key] = changes[key]
        (done / "config.json").write_text(json.dumps(changed))
        with pytest.raises(FormatError, match=says):
            export(done, tmp_path / "made", "gguf", requantize=True)


def test_without_the_package_and_with_a_parameter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = quantized(tiny_llama(**SIZES), tmp_path)
    with pytest.raises(RecipeError, match="format gguf takes no parameter, got 'Q4_0'; write gguf"):
        export(done, tmp_path / "made", "gguf:Q4_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        FormatError, match="writing a GGUF file needs gguf, which is not installed: pip install"
    ):
        export(done, tmp_path / "made", "gguf")


def test_layers_in_other_forms_become_the_nearest_type(tmp_path: Path) -> None:
    overrides = tuple(
        Override(layers=f"*.0.{name}", scheme=parse_scheme(scheme))
        for name, scheme in (
            ("mlp.up_proj", "nf3/64"),
            ("mlp.down_proj", "int6z/32"),
            ("self_attn.q_proj", "int5z/64"),
        )
    )
    done = quantized(tiny_llama(**SIZES), tmp_path, "int4z/64", overrides=overrides)
    with pytest.raises(
        FormatError, match=r"data type is nf, it has 3 bits.*nearest.*int:step4/32.*--requantize"
    ):
        export(done, tmp_path / "made", "gguf")
    held = stored_floats(exported(done, tmp_path / "made", requantize=True))
    kinds = {name: held[f"blk.0.{name}.weight"][0] for name in ("ffn_up", "ffn_down", "attn_q", "attn_v")}
    assert kinds == {"ffn_up": "Q4_0", "ffn_down": "Q8_0", "attn_q": "Q5_1", "attn_v": "Q4_1"}
    narrow = quantized(tiny_llama(**(SIZES | {"intermediate_size": 80})), tmp_path / "narrow", "int:step4/32")
    made = export(narrow, tmp_path / "narrow-made", "gguf", requantize=True)
    assert made.floats == tuple(f"model.layers.{number}.mlp.down_proj" for number in (0, 1))
    assert stored_floats(tmp_path / "narrow-made" / "model.gguf")["blk.1.ffn_down.weight"][0] == "F32"


def test_a_file_is_whole_or_absent_and_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = quantized(tiny_llama(**SIZES), tmp_path)
    out, whole = tmp_path / "made", exported(done, tmp_path / "whole").read_bytes()
    names: list[str] = []

    def stop(path: Path, *rest: Any, **inside: Any) -> Any:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf_file, "write_gguf", stop)
        with pytest.raises(KeyboardInterrupt):
            export(done, out, "gguf")
    assert (out / JOURNAL).is_dir()
    assert not [path.name for path in out.glob("model*")]
    with monkeypatch.context() as patch:
        patch.setattr(
            "fracbit.checkpoint.export.exporter.copy_rest",
            lambda *_, **code: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            export(done, out, "gguf", resume=True)
    assert (out / "model.gguf").read_bytes() == whole
    with monkeypatch.context() as patch:
        patch.setattr(gguf_file, "write_gguf", lambda *_, **inside: names.append("again"))
        export(done, out, "gguf", resume=True)
    assert not names
    assert not (out / JOURNAL).exists()
    manifest = json.loads((out / "fracbit.json").read_text())
    assert manifest["files"]["model.gguf"] == hashlib.sha256(whole).hexdigest()
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    with pytest.raises(OutputError, match="not empty; use --overwrite"):
        export(done, out, "gguf")
    assert exported(done, out, overwrite=True).read_bytes() == whole


def test_files_of_a_tokenizer_that_llama_cpp_does_not_read_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text("{}")
    done = quantized(
        build(config_of("Gemma2Config", **SIZES, query_pre_attn_scalar=16)), tmp_path, tokenizer=folder
    )
    with pytest.raises(
        FormatError, match=r"no tokenizer that llama.cpp reads for gemma2; put its tokenizer\.model beside"
    ):
        export(done, tmp_path / "made", "gguf")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(FormatError, match=r"tokenizer\.json is not JSON"):
        vocabulary.read_json(folder / "tokenizer.json")


def test_biases_of_attention_are_read_back_and_never_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers reads no switch for them; what finds no place in the model is an error."""
    from fracbit.checkpoint.formats import gguf as reader

    model = tiny_llama(hidden_size=64, intermediate_size=96, attention_bias=True)
    for block in model.model.layers:
        torch.nn.init.normal_(block.self_attn.q_proj.bias)
    model.save_pretrained(tmp_path / "float")
    write_checkpoint(
        Recipe(model=str(tmp_path / "float"), scheme=parse_scheme("int:step8/32")), tmp_path / "q"
    )
    export(tmp_path / "q", tmp_path / "made", "gguf")
    opened = open_float(tmp_path / "made" / "model.gguf")
    name = "model.layers.0.self_attn.q_proj.bias"
    place = opened.origins.tensors[name]
    assert torch.equal(
        place.read([read_tensor(opened.source, each) for each in place.names]).float(),
        model.get_parameter(name).detach().float(),
    )
    (tmp_path / "made" / "model.gguf").rename(tmp_path / "other.gguf")
    monkeypatch.setattr(reader, "BIASES", {})
    with pytest.raises(
        SourceError, match=r"12 tensors that its model has no place for, such as blk\.0\.attn_k\.bias"
    ):
        open_float(tmp_path / "other.gguf")
