"""Decode steps of llama.cpp. Run by kernels/decode.py in the environment of llama-cpp-python; prints rows as JSON.

python time_llama_cpp.py NAME SHAPE TOKENS THREADS
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

from frame import versions
from peers.shapes import PROMPT, SHAPES, VOCABULARY

FILE_TYPES = {"Q4_K_M": 15, "Q4_0": 2}  # llama.cpp's numbers of file types


def write_gguf(path: Path, shape: str) -> None:
    """A random F16 model as llama.cpp reads it."""
    import gguf
    import numpy

    sizes = SHAPES[shape]
    hidden, inner, heads = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_attention_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    facts = {
        "context_length": 2048, "embedding_length": hidden, "block_count": sizes["num_hidden_layers"],
        "feed_forward_length": inner, "head_count": heads, "head_count_kv": sizes["num_key_value_heads"],
        "layer_norm_rms_eps": 1e-6, "rope_dimension_count": hidden // heads, "vocab_size": VOCABULARY,
        "tokenizer_model": "no_vocab", "file_type": 1,
    }  # fmt: skip
    for name, value in facts.items():
        getattr(writer, f"add_{name}")(value)
    noise = (numpy.random.default_rng(0).standard_normal(1 << 22) * 0.02).astype(numpy.float16)
    square, wide, narrow, table = (hidden, hidden), (inner, hidden), (hidden, inner), (VOCABULARY, hidden)
    kinds = {"attn_q": square, "attn_k": square, "attn_v": square, "attn_output": square, "ffn_gate": wide, "ffn_up": wide,
             "ffn_down": narrow, "attn_norm": (hidden,), "ffn_norm": (hidden,)}  # fmt: skip
    tensors = {"token_embd": table, "output": table, "output_norm": (hidden,)}
    for block in range(sizes["num_hidden_layers"]):
        tensors |= {f"blk.{block}.{kind}": size for kind, size in kinds.items()}
    for name, size in tensors.items():
        norm = len(size) == 1
        values = numpy.ones(size, numpy.float32) if norm else numpy.resize(noise, size)
        writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantized_gguf(shape: str, name: str, threads: int) -> Path:
    """A model rounded by llama.cpp itself; kept in the environment, since making it takes minutes."""
    import llama_cpp

    folder = Path(sys.prefix) / "models"
    target, source = folder / f"{shape}-{name}.gguf", folder / f"{shape}-f16.gguf"
    if target.exists():
        return target
    folder.mkdir(exist_ok=True)
    if not source.exists():
        write_gguf(source, shape)
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype, how.nthread = FILE_TYPES[name], threads
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), how):
        raise RuntimeError(f"llama.cpp does not quantize to {name}")
    return target


def speed(path: Path, tokens: int, threads: int) -> float:
    """Tokens per second of the median step."""
    import llama_cpp

    model = llama_cpp.Llama(str(path), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    model.eval([token % VOCABULARY for token in range(PROMPT)])
    seconds = []
    for number in range(tokens):
        started = time.perf_counter()
        model.eval([number])
        seconds.append(time.perf_counter() - started)
    return 1 / statistics.median(seconds[1:])


def main() -> None:
    peer, shape, tokens, threads = sys.argv[1:]
    paths = {name: quantized_gguf(shape, name, int(threads)) for name in FILE_TYPES}
    found = versions(peer)
    rows = [{"name": f"llama.cpp {name}", "tokens_per_second": speed(path, int(tokens), int(threads)), "versions": found}
            for name, path in paths.items()]  # fmt: skip
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
