"""Decode steps of other libraries. Run by decode.py inside the environment of one peer; prints JSON.

python decode_peers.py NAME SHAPE TOKENS THREADS
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shapes import PROMPT, SHAPES, VOCABULARY

BITS_PER_WEIGHT = {"Q4_K_M": 15, "Q4_0": 2}  # llama.cpp's numbers of file types


def float_model(shape: str, dtype: Any = None) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=2048, tie_word_embeddings=False, **sizes
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype or torch.bfloat16)
    model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are computed, not loaded
    for part in model.parameters():
        part.data.fill_(0.01)
    return model.eval()


def timed(model: Any, tokens: int) -> float:
    """Tokens per second of the median step, greedy, in transformers' own cache."""
    import torch

    with torch.inference_mode():
        state = model(torch.arange(PROMPT)[None] % VOCABULARY, use_cache=True)
        seconds = []
        for _ in range(tokens):
            following = state.logits[:, -1:].argmax(-1)
            started = time.perf_counter()
            state = model(following, past_key_values=state.past_key_values, use_cache=True)
            seconds.append(time.perf_counter() - started)
    return 1 / statistics.median(seconds[1:])


def torch_bf16(shape: str, tokens: int) -> dict[str, float]:
    return {"transformers bf16": timed(float_model(shape), tokens)}


def torchao(shape: str, tokens: int) -> dict[str, float]:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = float_model(shape)
    quantize_(model.model, Int8WeightOnlyConfig())
    return {"torchao int8 weight-only": timed(model, tokens)}


def bitsandbytes(shape: str, tokens: int) -> dict[str, float]:
    import bitsandbytes as bnb
    import torch

    model = float_model(shape)
    for block in model.model.layers:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, torch.nn.Linear):
                packed = bnb.nn.Linear4bit(
                    layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4",
                    compress_statistics=False,
                )  # fmt: skip
                packed.load_state_dict({"weight": layer.weight.data})
                block.set_submodule(name, packed.to("cpu").eval())
    return {"bitsandbytes nf4/64": timed(model, tokens)}


def quanto(shape: str, tokens: int) -> dict[str, float]:
    from optimum.quanto import freeze, qint4, qint8, quantize

    results = {}
    for name, weights in (("int8", qint8), ("int4", qint4)):
        model = float_model(shape)
        quantize(model.model, weights=weights)
        freeze(model.model)
        results[f"optimum-quanto {name}"] = timed(model, tokens)
    return results


def gptqmodel(shape: str, tokens: int) -> dict[str, float]:
    """A checkpoint of random codes, loaded by GPTQModel itself, which chooses its fastest kernel for this machine."""
    import torch
    from gptqmodel import GPTQModel
    from safetensors.torch import save_file

    model = float_model(shape, torch.float16)
    with tempfile.TemporaryDirectory() as folder:
        tensors: dict[str, Any] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear) and name != "lm_head":
                rows, columns, groups = layer.out_features, layer.in_features, layer.in_features // 128
                tensors[f"{name}.qweight"] = torch.randint(-(2**31), 2**31 - 1, (columns // 8, rows)).int()
                tensors[f"{name}.qzeros"] = torch.full((groups, rows // 8), 0x77777777).int()
                tensors[f"{name}.scales"] = torch.full((groups, rows), 0.001, dtype=torch.float16)
                tensors[f"{name}.g_idx"] = (torch.arange(columns) // 128).int()
            elif list(layer.parameters(recurse=False)):
                tensors[f"{name}.weight"] = layer.weight.data.clone()
        save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})
        how = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True, "lm_head": False, "quant_method": "gptq",
               "checkpoint_format": "gptq", "pack_dtype": "int32"}  # fmt: skip
        config = model.config.to_dict()
        config |= {
            "quantization_config": how,
            "torch_dtype": "float16",
            "architectures": ["LlamaForCausalLM"],
        }
        (Path(folder) / "config.json").write_text(json.dumps(config, default=str))
        (Path(folder) / "quantize_config.json").write_text(json.dumps(how))
        loaded = GPTQModel.load(folder, device="cpu")
        kernel = type(loaded.model.model.layers[0].mlp.up_proj).__name__
        return {f"GPTQModel int4/128 ({kernel})": timed(loaded.model, tokens)}


def write_gguf(path: Path, shape: str) -> None:
    """A random F16 model as llama.cpp reads it."""
    import gguf
    import numpy

    s = SHAPES[shape]
    hidden, inner, heads = s["hidden_size"], s["intermediate_size"], s["num_attention_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden)
    writer.add_block_count(s["num_hidden_layers"])
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(s["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(1)
    noise = (numpy.random.default_rng(0).standard_normal(1 << 22) * 0.02).astype(numpy.float16)

    def matrix(name: str, rows: int, columns: int) -> None:
        writer.add_tensor(name, numpy.resize(noise, (rows, columns)))

    matrix("token_embd.weight", VOCABULARY, hidden)
    matrix("output.weight", VOCABULARY, hidden)
    writer.add_tensor("output_norm.weight", numpy.ones(hidden, numpy.float32))
    for i in range(s["num_hidden_layers"]):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", numpy.ones(hidden, numpy.float32))
        for name, rows, columns in (
            ("attn_q", hidden, hidden), ("attn_k", hidden, hidden), ("attn_v", hidden, hidden),
            ("attn_output", hidden, hidden), ("ffn_gate", inner, hidden), ("ffn_up", inner, hidden),
            ("ffn_down", hidden, inner),
        ):  # fmt: skip
            matrix(f"blk.{i}.{name}.weight", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(shape: str, tokens: int) -> dict[str, float]:
    import llama_cpp

    threads, results = int(sys.argv[4]), {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "f16.gguf"
        write_gguf(source, shape)
        for name, number in BITS_PER_WEIGHT.items():
            how = llama_cpp.llama_model_quantize_default_params()
            how.ftype, how.nthread = number, threads
            target = Path(folder) / f"{name}.gguf"
            if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), how):
                raise RuntimeError(f"llama.cpp does not quantize to {name}")
            results[f"llama.cpp {name}"] = llama_speed(target, tokens, threads)
            target.unlink()
    return results


def llama_speed(path: Path, tokens: int, threads: int) -> float:
    import llama_cpp

    model = llama_cpp.Llama(str(path), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    model.eval([token % VOCABULARY for token in range(PROMPT)])
    seconds = []
    for number in range(tokens):
        started = time.perf_counter()
        model.eval([number])
        seconds.append(time.perf_counter() - started)
    return 1 / statistics.median(seconds[1:])


PEERS: dict[str, Callable[[str, int], dict[str, float]]] = {
    "transformers": torch_bf16, "torchao": torchao, "bitsandbytes": bitsandbytes, "optimum-quanto": quanto,
    "gptqmodel": gptqmodel, "llama-cpp-python": llama_cpp,
}  # fmt: skip


def main() -> None:
    name, shape, tokens, threads = sys.argv[1:]
    if name != "llama-cpp-python":
        import torch

        torch.set_num_threads(int(threads))
        torch.manual_seed(0)
    print(json.dumps(PEERS[name](shape, int(tokens))))


if __name__ == "__main__":
    main()
