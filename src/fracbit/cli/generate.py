"""`fracbit generate`: continue prompts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fracbit.cli import options
from fracbit.cli.names import check_models, check_types
from fracbit.cli.show import bytes_text, print_json
from fracbit.errors import DataError
from fracbit.records.generating import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fracbit.pipeline.serve.generation import Generation


def generate(
    model: options.AnyModel,
    text: Annotated[str | None, typer.Argument(metavar="PROMPT", help="Text to continue.")] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Another prompt of the batch; repeatable.", rich_help_panel=options.WRITE),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File of prompts, one per line.", rich_help_panel=options.WRITE)
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File that is one long prompt.", rich_help_panel=options.WRITE)
    ] = None,
    max_new_tokens: options.MaxNew = 64,
    temperature: options.Temperature = 0.0,
    seed: options.SamplingSeed = 0,
    kv_bits: options.KvBits = 16,
    activations: options.Activations = "float",
    prefill_chunk: Annotated[
        int, typer.Option(help="Tokens of a prompt that are read at once.", rich_help_panel=options.RUN)
    ] = 512,
    dtype: options.Dtype = "auto",
    device: options.Device = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Stream a continuation of PROMPT, then tokens per second and peak memory on stderr."""
    batch = read_prompts(text, prompt, prompts, prompt_file)
    check_types(dtype, activations)
    settings = Settings(max_new_tokens, temperature, kv_bits, prefill_chunk)
    check_models(model)
    from fracbit.pipeline.serve import generation as serve

    loaded, tokenizer = ready(
        model, dtype, device=device, trust=trust_remote_code, activations=activations, seed=seed
    )
    streams = not json and len(batch) == 1
    found = serve.generate(loaded, tokenizer, batch, settings, show=write if streams else None)
    if json:
        print_json(_object(model, found))
        return
    if streams:
        write("\n")
    for whole in () if streams else found.whole:
        write(f"{whole}\n---\n")
    if not quiet:
        print_speed(found)


def ready(
    model: str, dtype: str, device: str, trust: bool, activations: str, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer, ready to generate."""
    import torch

    from fracbit.checkpoint.load import load, load_tokenizer
    from fracbit.pipeline.serve.generation import choose_activations

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
    from fracbit.records.resources import peak_rss

    typer.echo(
        f"\n{found.new_tokens} tokens; prefill {found.prefill:.1f}, decode {found.decode:.1f} tokens/s; "
        f"{found.step}; KV cache {bytes_text(found.cache_bytes)}, peak {bytes_text(peak_rss())}",
        err=True,
    )


def _object(model: str, found: Generation) -> dict[str, Any]:
    from fracbit.records.resources import peak_rss

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
