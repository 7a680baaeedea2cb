"""Whether the export `gguf` writes what llama.cpp's converter writes: every key; name, shape, type, values of every tensor
(a paragraph of docs/engines.md).

    python bench/engines/gguf_keys.py --work FOLDER --models MODEL [--environments FOLDER]

MODEL is a folder with a float model and its tokenizer. It is converted itself, and so is a tiny random model of every family
that the export knows: with MODEL's tokenizer where the family merges bytes, else with one of sentencepiece, trained here.
The converter runs in the environment of the peer `llamacpp`. What differs is printed; the exit status is 1 if anything does.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from frame import ENVIRONMENTS, arguments, surroundings, table
from peers.environments import EXTRA, environment

COUNTS = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count")
TRAIN = """
import sys
from sentencepiece import SentencePieceTrainer as Trainer
Trainer.train(input=sys.argv[1], model_prefix=sys.argv[2], vocab_size=400, model_type="bpe", byte_fallback=True,
              user_defined_symbols=["<start_of_turn>", "<extra>"], minloglevel=2)
"""
CONVERT = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
import conversion.base
if sys.argv[2] == "tiny":
    conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "default"
read = conversion.base.ModelBase.load_hparams
def with_old_name(*given, **named):
    found = read(*given, **named)
    if found.get("model_type") == "gpt_neox":
        found["rotary_pct"] = found["rope_parameters"]["partial_rotary_factor"]
    return found
conversion.base.ModelBase.load_hparams = staticmethod(with_old_name)
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[3:]]
runpy.run_path(f"{sys.path[0]}/convert_hf_to_gguf.py", run_name="__main__")
"""
"""A tiny model's tokenizer is that of another family, so its way to cut text is no known one; both sides call it default. The
converter reads a setting of GPT-NeoX by a name that transformers 5 no longer gives."""
LLAMA = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 256,
}  # fmt: skip
SPARSE = LLAMA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "long_factor": [2.0] * 8, "short_factor": [1.0] * 8,
    "original_max_position_embeddings": 64,
}  # fmt: skip
FALCON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
BYTES, PIECES, JSON = "bytes", "pieces", "json"
MODELS: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", LLAMA | {"attention_bias": True}, BYTES),
    "llama-pieces": ("LlamaConfig", LLAMA, PIECES),
    "llama-json": ("LlamaConfig", LLAMA, JSON),
    "llama3": ("LlamaConfig", LLAMA | {"rope_parameters": LLAMA3, "tie_word_embeddings": True}, BYTES),
    "mistral": ("MistralConfig", LLAMA, PIECES),
    "mixtral": ("MixtralConfig", LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}, PIECES),
    "qwen2": ("Qwen2Config", LLAMA | {"rope_parameters": YARN}, BYTES),
    "qwen3": ("Qwen3Config", LLAMA, BYTES),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        SPARSE | {"shared_expert_intermediate_size": 32, "norm_topk_prob": False},
        BYTES,
    ),
    "qwen3_moe": ("Qwen3MoeConfig", SPARSE | {"norm_topk_prob": True}, BYTES),
    "smollm3": ("SmolLM3Config", LLAMA | {"num_hidden_layers": 4}, BYTES),
    "granite": (
        "GraniteConfig",
        {name: value for name, value in LLAMA.items() if name != "head_dim"}
        | {
            "attention_multiplier": 0.25,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
        BYTES,
    ),
    "seed_oss": ("SeedOssConfig", LLAMA, BYTES),
    "gpt_neox": (
        "GPTNeoXConfig",
        {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
        BYTES,
    ),
    "gemma": ("GemmaConfig", LLAMA, PIECES),
    "gemma2": ("Gemma2Config", LLAMA | {"sliding_window": 32, "query_pre_attn_scalar": 16}, PIECES),
    "gemma3": (
        "Gemma3TextConfig",
        LLAMA | {"sliding_window": 32, "num_hidden_layers": 6, "query_pre_attn_scalar": 16},
        PIECES,
    ),
    "phi3": ("Phi3Config", LLAMA | {"rope_parameters": LONG, "original_max_position_embeddings": 64}, PIECES),
    "falcon-7b": (
        "FalconConfig",
        FALCON | {"multi_query": True, "num_kv_heads": 1},
        BYTES,
    ),
    "falcon-40b": ("FalconConfig", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}, BYTES),
    "bloom": ("BloomConfig", {"hidden_size": 64, "n_layer": 2, "n_head": 4}, BYTES),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_ctx": 64}, BYTES),
    "starcoder2": ("Starcoder2Config", LLAMA, BYTES),
    "stablelm": ("StableLmConfig", LLAMA | {"use_qkv_bias": True}, BYTES),
    "nemotron": ("NemotronConfig", LLAMA, PIECES),
}


def make(name: str, folder: Path, tokenizer: Path) -> Path:
    """A tiny random model of a family in bf16, with a tokenizer; random norms and biases too."""
    import torch
    import transformers

    kind, sizes, _ = MODELS[name]
    settings = tokenizer / "config.json"
    vocabulary = json.loads(settings.read_text())["vocab_size"] if settings.is_file() else 400
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**(sizes | {"vocab_size": vocabulary}))
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape).mul_(0.1).bfloat16()
    model.save_pretrained(folder)
    for file in tokenizer.iterdir():
        if file.name.startswith(("token", "chat", "generation", "added", "special", "vocab", "merges")):
            shutil.copy(file, folder / file.name)
    return folder


def train_pieces(python: Path, text: Path, folder: Path) -> Path:
    """A folder with a tokenizer of sentencepiece and two tokens that were added to it."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([python, "-c", TRAIN, text, folder / "tokenizer"], check=True, env=surroundings() | EXTRA)
    added = {"7": ("<|end|>", False), "9": ("<mine>", False), "11": ("<|special|>", True)}
    decoder = {number: {"content": text, "special": special} for number, (text, special) in added.items()}
    settings = {
        "added_tokens_decoder": decoder, "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True,
        "tokenizer_class": "LlamaTokenizer",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_pieces(folder: Path) -> Path:
    """A folder with a tokenizer of pieces in tokenizer.json alone: bytes, letters and one merge."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz", "\u2581a"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    special = [
        {"id": number, "content": tokens[number], "special": True, "normalized": False} for number in range(3)
    ]
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    whole = {
        "version": "1.0", "truncation": None, "padding": None, "pre_tokenizer": None, "post_processor": None,
        "added_tokens": [token | flags for token in special],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "merges": [["\u2581", "a"]],
            "vocab": {token: number for number, token in enumerate(tokens)},
        },
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(tokens)}))
    return folder


def convert(python: Path, environments: Path, folder: Path, file: Path) -> None:
    """llama.cpp's converter, as it picks the type itself. Raises `SystemExit` with what it printed."""
    source, kind = environments / "llamacpp" / "llama.cpp", "tiny" if folder.name in MODELS else "whole"
    words = [python, "-c", CONVERT, source, kind, folder, "--outfile", file]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=surroundings(1) | EXTRA)
    if done.returncode:
        raise SystemExit(f"the converter did not take {folder.name}:\n{done.stderr[-2000:]}")


def write(folder: Path, kept: Path, file: Path) -> None:
    """The same model as the export writes it, from a checkpoint at `kept` in which every layer stays float."""
    from fracbit.checkpoint.export.exporter import StoredModel
    from fracbit.checkpoint.export.gguf import vocabulary
    from fracbit.checkpoint.export.gguf.gguf_file import planned, write_gguf
    from fracbit.checkpoint.opened import model_config, open_checkpoint
    from fracbit.models.skeleton import skeleton
    from fracbit.pipeline.quantize.run import write_checkpoint
    from fracbit.records.recipe import Override, Recipe

    write_checkpoint(
        Recipe(model=str(folder), overrides=(Override(layers="*", keep=True),)), kept, overwrite=True
    )
    source = open_checkpoint(kept)
    config = model_config(source)
    config.__dict__.pop("quantization_config", None)  # a mixture's says that its experts stand apart
    stored = StoredModel(source, skeleton(config), {}, {})
    if folder.name in MODELS:
        vocabulary.pretokenizer = lambda *_: "default"
    write_gguf(file, stored, planned(stored), lambda *_: None)


def contents(file: Path) -> tuple[dict[str, tuple[str, Any]], dict[str, tuple[str, tuple[int, ...], Any]]]:
    """Keys with type and value; tensors with type, shape and floats."""
    import gguf

    reader = gguf.GGUFReader(file)
    keys = {
        name: (" ".join(kind.name for kind in field.types), field.contents())
        for name, field in reader.fields.items()
        if name not in COUNTS
    }
    tensors = {
        tensor.name: (
            tensor.tensor_type.name,
            tuple(tensor.shape.tolist()),
            gguf.dequantize(tensor.data, tensor.tensor_type),
        )
        for tensor in reader.tensors
    }
    return keys, tensors


def differences(ours: Path, theirs: Path) -> Iterator[str]:
    """What differs between two files."""
    import numpy as np

    (keys, tensors), (wanted_keys, wanted_tensors) = contents(ours), contents(theirs)
    for name in sorted(keys.keys() | wanted_keys.keys()):
        if keys.get(name) != wanted_keys.get(name):
            yield f"key {name}: {str(keys.get(name))[:200]}, the converter {str(wanted_keys.get(name))[:200]}"
    for name in sorted(tensors.keys() | wanted_tensors.keys()):
        if name not in tensors or name not in wanted_tensors:
            yield f"tensor {name} is only in {'ours' if name in tensors else 'the converter'}"
            continue
        (kind, shape, values), (wanted_kind, wanted_shape, wanted) = tensors[name], wanted_tensors[name]
        if (kind, shape) != (wanted_kind, wanted_shape):
            yield f"tensor {name}: {kind} {shape}, the converter {wanted_kind} {wanted_shape}"
        elif not np.allclose(values, wanted, rtol=1e-6, atol=0):
            yield f"tensor {name} has other values"


def main() -> None:
    parser = arguments(__doc__, work=None, models=None, environments=ENVIRONMENTS)
    parser.add_argument(
        "--families", nargs="*", choices=list(MODELS), default=list(MODELS), help="of the tiny models"
    )
    options = parser.parse_args()
    python = environment("llamacpp", options.environments)
    (model,) = (Path(each).resolve() for each in options.models)
    options.work.mkdir(parents=True, exist_ok=True)
    text = options.work / "text.txt"
    text.write_text(Path(__file__).read_text() * 20)
    pieces = train_pieces(python, text, options.work / "pieces")
    whole = write_pieces(options.work / "json")
    rows = []
    for name in (model.name, *options.families):
        folder = model
        if name != model.name:
            spelling = MODELS[name][2]
            folder = make(name, options.work / name, {BYTES: model, PIECES: pieces, JSON: whole}[spelling])
        ours, theirs = (options.work / f"{name}-{which}.gguf" for which in ("ours", "converter"))
        convert(python, options.environments, folder, theirs)
        write(folder, options.work / f"{name}-kept", ours)
        keys, tensors = contents(theirs)
        found = list(differences(ours, theirs))
        rows.append((name, len(keys), len(tensors), len(found)))
        print(*found, sep="\n", end="\n" if found else "", flush=True)
    table("model | keys | tensors | differences", rows)
    sys.exit(any(row[-1] for row in rows))


if __name__ == "__main__":
    main()
