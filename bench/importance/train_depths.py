"""Models of one width and several depths, for claim 3 of docs/importance.md, whose figures measure.py and report.py make:
that deeper models suit layer-wise quantization better.

    python bench/importance/train_depths.py FOLDER --blocks 3,6,12 [--minutes 4]

Llamas of width 48 on the bundled model's text and tokenizer, by the training code of examples/train_bundled.py. All see the
same number of tokens per parameter, since how far a model is trained decides what it can spare. Resumable: a run stops after
`--minutes`, the same command goes on. Each finished model is a folder FOLDER/depth-N that transformers loads.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import train_bundled as example
from frame import UNFINISHED, arguments

from fracbit.bundled import bundled_model, held_out_text


def shaped(blocks: int, each: float) -> example.Plan:
    """The plan for a depth, of `each` tokens per parameter."""
    plan = replace(
        example.Plan(), width=48, heads=4, kv_heads=2, mlp=112, layers=blocks, context=128, batch_tokens=2048,
        windows=((1.0, 128),), warmup=100,
    )  # fmt: skip
    parameters = sum(weight.numel() for weight in example.fresh_weights(plan).values())
    return replace(plan, tokens=int(each * parameters))


def train(plan: example.Plan, stream: np.ndarray, saved: Path, until: float) -> example.Weights | None:
    """Go on from `saved` until the plan is done (the weights) or the time is up (None)."""
    weights = example.fresh_weights(plan)
    parameters = [weight.requires_grad_() for weight in weights.values()]
    optimizer = torch.optim.AdamW(parameters, lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    first, spent = example.load_state(saved, weights, optimizer) if saved.exists() else (0, 0.0)
    loss = torch.compile(example.make_loss(plan, torch.bfloat16), dynamic=False)
    started, step, running = time.monotonic(), first, 0.0
    for step in range(first, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate_at(step)
        value = loss(weights, *example.batch_at(stream, plan, step, 0, 1))
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running = value.item() if step == first else running + 0.02 * (value.item() - running)
        if step % 50 == 0:
            print(f"{plan.layers} blocks, step {step}/{plan.steps}, loss {running:.3f}", flush=True)
        if time.monotonic() > until:
            break
    example.save_state(saved, weights, optimizer, step + 1, spent + time.monotonic() - started)
    return weights if step + 1 >= plan.steps else None


def main() -> None:
    parser = arguments(__doc__, minutes=600.0)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", default="3,6,12")
    parser.add_argument("--each", type=float, default=20.0, help="training tokens per parameter")
    given = parser.parse_args()
    until = time.monotonic() + 60 * given.minutes
    torch.set_num_threads(1)
    given.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bundled_model())
    ids = given.folder / "training.npy"
    if not ids.exists():
        np.save(ids, example.token_stream(example.corpus()[0], tokenizer))
    stream = np.load(ids)
    for blocks in map(int, given.blocks.split(",")):
        out = given.folder / f"depth-{blocks}"
        if (out / "config.json").exists():
            continue
        plan = shaped(blocks, given.each)
        weights = train(plan, stream, given.folder / f"depth-{blocks}.pt", until)
        if weights is None:
            raise SystemExit(UNFINISHED)
        example.to_transformers(weights, plan, tokenizer).save_pretrained(out)
        example.save_tokenizer(tokenizer, out)
        held_out = example.token_stream([held_out_text()], tokenizer)
        loss = example.held_out_loss({n: w.detach() for n, w in weights.items()}, held_out, plan, 400)
        print(f"{blocks} blocks: {plan.steps * plan.batch_tokens} tokens, held-out loss {loss:.4f}")


if __name__ == "__main__":
    main()
