"""Decode steps of other libraries inside transformers. Run by kernels/decode.py in a peer's environment; prints rows as JSON.

python time_decode.py NAME SHAPE TOKENS THREADS
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from frame import versions
from peers.packs import PACKS
from peers.shapes import PROMPT, SHAPES, VOCABULARY
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM


def float_model(shape: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A Llama of one of `SHAPES`: every weight 0.01, since what a step costs does not depend on them."""
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 2048, **SHAPES[shape]}
    config = LlamaConfig(tie_word_embeddings=False, **sizes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are computed, not loaded
    for part in model.parameters():
        part.data.fill_(0.01)
    return model.eval()


def timed(model: Any, tokens: int) -> float:
    """Tokens per second of the median step, greedy, in transformers' own cache."""
    with torch.inference_mode():
        state = model(torch.arange(PROMPT)[None] % VOCABULARY, use_cache=True)
        seconds = []
        for _ in range(tokens):
            following = state.logits[:, -1:].argmax(-1)
            started = time.perf_counter()
            state = model(following, past_key_values=state.past_key_values, use_cache=True)
            seconds.append(time.perf_counter() - started)
    return 1 / statistics.median(seconds[1:])


def models(peer: str, shape: str) -> Iterator[tuple[str, Any]]:
    """What there is to time of a peer; its output head stays float."""
    if peer == "transformers":
        yield "transformers bf16", float_model(shape)
    elif peer == "gptqmodel":
        yield from gptqmodel(shape)
    for name, (pack, _) in PACKS.get(peer, {}).items():
        model = float_model(shape)
        pack(model.model)
        yield name, model


def gptqmodel(shape: str) -> Iterator[tuple[str, Any]]:
    """A checkpoint of random codes, loaded by GPTQModel itself, which chooses its fastest kernel for this machine."""
    from gptqmodel import GPTQModel
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    model = float_model(shape, torch.float16)
    how = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True, "lm_head": False, "quant_method": "gptq",
           "checkpoint_format": "gptq", "pack_dtype": "int32"}  # fmt: skip
    own = {"quantization_config": how, "torch_dtype": "float16", "architectures": ["LlamaForCausalLM"]}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_file(random_codes(model), folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(model.config.to_dict() | own, default=str))
        (folder / "quantize_config.json").write_text(json.dumps(how))
        Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(f"{folder}/tokenizer.json")
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        loaded = GPTQModel.load(temporary, device="cpu")
        kernel = type(loaded.model.model.layers[0].mlp.up_proj).__name__
        yield f"GPTQModel int4/128 ({kernel})", loaded.model


def random_codes(model: Any) -> dict[str, torch.Tensor]:
    """The tensors of a GPTQ checkpoint: 4 bits in groups of 128; all but the blocks' linears as they are."""
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            rows, columns, groups = layer.out_features, layer.in_features, layer.in_features // 128
            tensors[f"{name}.qweight"] = torch.randint(-(2**31), 2**31 - 1, (columns // 8, rows)).int()
            tensors[f"{name}.qzeros"] = torch.full((groups, rows // 8), 0x77777777).int()
            tensors[f"{name}.scales"] = torch.full((groups, rows), 0.001, dtype=torch.float16)
            tensors[f"{name}.g_idx"] = (torch.arange(columns) // 128).int()
        elif list(layer.parameters(recurse=False)):
            tensors[f"{name}.weight"] = layer.weight.data.clone()
    return tensors


def main() -> None:
    peer, shape, tokens, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    found = versions("torch", peer)
    rows = [{"name": name, "tokens_per_second": timed(model, int(tokens)), "versions": found}
            for name, model in models(peer, shape)]  # fmt: skip
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
