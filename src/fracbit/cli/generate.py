"""`fracbit generate`: continue a prompt."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from fracbit.cli.show import bytes_text, print_json
from fracbit.errors import DataError


def generate(
    model: Annotated[str, typer.Argument(help="Folder or hub id, fracbit or float.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 64,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token, 1 samples as the model says.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Type of what is not quantized: auto, float32, bfloat16, float16.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model's own code.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Stream a continuation of PROMPT, then tokens per second and peak memory on stderr."""
    if max_new_tokens < 1 or temperature < 0:
        raise DataError(
            f"--max-new-tokens must be at least 1 and --temperature at least 0, got {max_new_tokens}, {temperature}"
        )
    import torch
    from transformers import TextStreamer

    from fracbit.checkpoint.load import load, load_tokenizer
    from fracbit.pipeline.run import peak_rss

    loaded = load(model, dtype, device, trust_remote_code)
    tokenizer = load_tokenizer(model, trust_remote_code)
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    if inputs["input_ids"].shape[1] == 0:
        raise DataError("the prompt has no tokens; give at least one character")
    positions = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    if positions and inputs["input_ids"].shape[1] + max_new_tokens > positions:
        raise DataError(
            f"{inputs['input_ids'].shape[1]} tokens of prompt and {max_new_tokens} new ones pass the model's {positions} "
            "positions; ask for fewer"
        )
    torch.manual_seed(seed)
    how = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    started = time.perf_counter()
    ids = loaded.generate(  # type: ignore[operator]
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        streamer=None if json else TextStreamer(tokenizer, skip_special_tokens=True),
        pad_token_id=tokenizer.pad_token_id
        if tokenizer.pad_token_id is not None
        else loaded.config.eos_token_id,
        **how,
    )
    seconds = time.perf_counter() - started
    new = ids.shape[1] - inputs["input_ids"].shape[1]
    if json:
        text = tokenizer.decode(ids[0], skip_special_tokens=True)
        print_json(
            {"model": model, "text": text, "new_tokens": new, "seconds": seconds,
             "tokens_per_second": new / seconds, "peak_rss_bytes": peak_rss()}
        )  # fmt: skip
        return
    typer.echo(f"{new} tokens, {new / seconds:.1f} tokens/s, peak {bytes_text(peak_rss())}", err=True)
