"""`fracbit generate`: continue prompts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from fracbit.cli.show import bytes_text, print_json
from fracbit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fracbit.pipeline.serve.generation import Generation

MaxNew = Annotated[int, typer.Option(help="Tokens to write at most.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token, 1 samples as the model says.")]
KvBits = Annotated[int, typer.Option(help="Bits of the KV cache: 16 (the model's own type), 8 or 4.")]
Activate = Annotated[
    str, typer.Option("--activations", help="float (exact) or int8 (rounded, faster on CPUs).")
]
Dtype = Annotated[str, typer.Option(help="Type of what is not quantized: auto, float32, bfloat16, float16.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the sampling.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")]


def generate(
    model: Annotated[str, typer.Argument(help="Folder or hub id, fracbit or float.")],
    text: Annotated[str | None, typer.Argument(metavar="PROMPT", help="Text to continue.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Another prompt of the batch; repeatable.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File of prompts, one a line.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File that is one long prompt.")] = None,
    max_new_tokens: MaxNew = 64,
    temperature: Temperature = 0.0,
    kv_bits: KvBits = 16,
    activations: Activate = "float",
    prefill_chunk: Annotated[int, typer.Option(help="Tokens of a prompt that are read at once.")] = 512,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    trust_remote_code: Trust = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Stream a continuation of PROMPT, then tokens per second and peak memory on stderr."""
    from fracbit.pipeline.serve import generation as serve

    batch = read_prompts(text, prompt, prompts, prompt_file)
    settings = serve.Settings(max_new_tokens, temperature, kv_bits, prefill_chunk)
    loaded, tokenizer = ready(model, dtype, device, trust_remote_code, activations, seed)
    streams = not json and len(batch) == 1
    found = serve.generate(loaded, tokenizer, batch, settings, write if streams else None)
    if json:
        print_json(_object(model, found))
        return
    if streams:
        write("\n")
    for whole in () if streams else found.whole:
        write(f"{whole}\n---\n")
    print_speed(found)


def ready(
    model: str, dtype: str, device: str, trust: bool, activations: str, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer, ready to generate."""
    import torch

    from fracbit.checkpoint.load import load, load_tokenizer
    from fracbit.kernels import Activations
    from fracbit.pipeline.serve.generation import choose_activations

    if activations not in get_args(Activations):
        raise DataError(f"--activations is float or int8, got {activations!r}")
    loaded = load(model, dtype, device, trust)
    choose_activations(loaded, activations)  # type: ignore[arg-type]
    torch.manual_seed(seed)
    return loaded, load_tokenizer(model, trust)


def read_prompts(
    text: str | None, more: list[str] | None, lines: Path | None, whole: Path | None
) -> list[str]:
    """All prompts of the command line, in the order argument, --prompt, --prompts, --prompt-file."""
    found = [*([text] if text is not None else []), *(more or [])]
    try:
        found += (
            [line for line in lines.read_text(encoding="utf-8").splitlines() if line.strip()] if lines else []
        )
        found += [whole.read_text(encoding="utf-8")] if whole else []
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompts cannot be read: {error}") from error
    if not found:
        raise DataError("no prompt; give one as an argument, or with --prompt, --prompts or --prompt-file")
    return found


def write(text: str) -> None:
    """Text on stdout as it comes."""
    sys.stdout.write(text)
    sys.stdout.flush()


def print_speed(found: Generation) -> None:
    """Speeds, how tokens were made, and peak memory, on stderr."""
    from fracbit.pipeline.quantize.stream import peak_rss

    typer.echo(
        f"\n{found.new_tokens} tokens; prefill {found.prefill:.1f}, decode {found.decode:.1f} tokens/s; "
        f"{found.step}; KV cache {bytes_text(found.cache_bytes)}, peak {bytes_text(peak_rss())}",
        err=True,
    )


def _object(model: str, found: Generation) -> dict[str, Any]:
    from fracbit.pipeline.quantize.stream import peak_rss

    texts = list(found.whole)
    return {
        "model": model,
        "text": texts[0],
        "texts": texts,
        "prompt_tokens": found.prompt_tokens,
        "new_tokens": found.new_tokens,
        "seconds": found.seconds,
        "tokens_per_second": found.new_tokens / found.seconds,
        "prefill_tokens_per_second": found.prefill,
        "decode_tokens_per_second": found.decode,
        "step": found.step,
        "cache_bytes": found.cache_bytes,
        "peak_rss_bytes": peak_rss(),
    }
