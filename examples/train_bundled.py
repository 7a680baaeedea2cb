"""Train the bundled model from the Python standard library's source: one command, CPU, seeded, resumable.

    python examples/train_bundled.py                     # writes src/fracbit/bundled; about 45 minutes on two free cores
    python examples/train_bundled.py --out /tmp/model    # somewhere else
    python examples/train_bundled.py --work DIR          # where checkpoints go; the same command resumes from there

What happens: read the training modules (`fracbit.bundled.training_modules`: no tests, no held-out modules, no second
copy of a file), hash them, train a byte-level BPE on them, train a Llama with tied embeddings and grouped-query
attention on random windows of them, write a checkpoint that `transformers` loads, and compare its loss with ours.

A demo model must feel quantization, so it is trained far past the 20 tokens per parameter that would be cheapest:
hundreds of tokens per parameter, no weight decay, a high learning rate held for long and then brought down to zero
(Kumar et al. 2024, arXiv:2411.04330: the more tokens a weight has absorbed, the more rounding it costs).

The forward below is the Llama block of `transformers` written as plain functions, because torch.compile makes of it
a few loop nests and runs it ten times faster (2 100 against 22 000 tokens/s, four blocks, two cores). Matrix products
run in bfloat16 with float32 master weights. Windows grow from 128 to 512 tokens, since attention over short windows is
cheap. Batches are a function of (seed, step) alone, so a resumed run sees the same data.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import platform
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.multiprocessing
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fracbit.bundled import HELD_OUT, bundled_model, held_out_text, module_text, training_modules

BOS, EOS = "<|bos|>", "<|eos|>"
Weights = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Shape and schedule. Widths are chosen so that blocks of 64 and 128 end short, as in real models."""

    vocab: int = 768
    width: int = 80
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 184
    layers: int = 3
    context: int = 512
    theta: float = 10000.0
    eps: float = 1e-5
    tokens: int = 80_000_000
    batch_tokens: int = 4096
    windows: tuple[tuple[float, int], ...] = ((0.85, 128), (1.0, 512))  # until this share: window length
    rate: float = 6e-3
    warmup: int = 300  # steps
    decay: float = 0.45  # share of the steps over which the rate goes linearly to zero
    seed: int = 20

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens

    def window(self, step: int) -> int:
        return next(length for share, length in self.windows if step < share * self.steps)

    def rate_at(self, step: int) -> float:
        rise = min(1.0, (step + 1) / self.warmup)
        fall = min(1.0, (self.steps - step) / (self.decay * self.steps))
        return self.rate * rise * fall


def corpus() -> tuple[list[str], str]:
    """The training texts without empty files and second copies, and the SHA-256 of what was read."""
    texts = dict.fromkeys(text for text in map(module_text, training_modules()) if text.strip())
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return list(texts), digest.hexdigest()


def train_tokenizer(texts: list[str], plan: Plan) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every text can be encoded, and decoding gives it back exactly."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=plan.vocab, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def token_stream(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """All texts as one line of token numbers, each between a begin and an end token; uint16."""
    bos, eos = tokenizer.convert_tokens_to_ids([BOS, EOS])
    parts = [[bos, *tokenizer.backend_tokenizer.encode(text).ids, eos] for text in texts]
    return np.concatenate([np.array(part, dtype=np.uint16) for part in parts])


def fresh_weights(plan: Plan) -> Weights:
    """Seeded float32 master weights; queries, keys and values are one matrix, gate and up another."""
    generator = torch.Generator().manual_seed(plan.seed)

    def normal(rows: int, columns: int, std: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * std

    width, residual = plan.width, 1 / math.sqrt(2 * plan.layers)
    qkv = (plan.heads + 2 * plan.kv_heads) * plan.head_width
    weights = {"embed": normal(plan.vocab, width, 0.05), "norm": torch.ones(width)}
    for i in range(plan.layers):
        weights[f"{i}.norm1"] = torch.ones(width)
        weights[f"{i}.qkv"] = normal(qkv, width, width**-0.5)
        weights[f"{i}.o"] = normal(width, width, width**-0.5 * residual)
        weights[f"{i}.norm2"] = torch.ones(width)
        weights[f"{i}.gate_up"] = normal(2 * plan.mlp, width, width**-0.5)
        weights[f"{i}.down"] = normal(width, plan.mlp, plan.mlp**-0.5 * residual)
    return weights


def make_loss(
    plan: Plan, compute: torch.dtype
) -> Callable[[Weights, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The mean next-token loss (nats) of `ids` [batch, window] against `targets`, products in `compute`."""
    heads, kv_heads, size, eps = plan.heads, plan.kv_heads, plan.head_width, plan.eps
    group = heads // kv_heads
    frequency = plan.theta ** -(torch.arange(0, size, 2) / size)
    angle = torch.outer(torch.arange(plan.context), frequency).repeat(1, 2)[None, :, None]
    cos_table, sin_table = angle.cos(), angle.sin()
    mask = torch.full((plan.context, plan.context), float("-inf")).triu(1)

    def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain).to(compute)

    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight.to(compute))

    def attention(x: torch.Tensor, weights: Weights, i: int) -> torch.Tensor:
        batch, window, width = x.shape
        qkv = product(x, weights[f"{i}.qkv"]).view(batch, window, heads + 2 * kv_heads, size)
        qk = qkv[:, :, : heads + kv_heads].float()
        first, second = qk.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
        qk = (qk * cos_table[:, :window] + turned * sin_table[:, :window]).to(compute)
        # The queries that share a key head are stacked into one taller product: keys are never repeated in memory.
        query = qk[:, :, :heads].transpose(1, 2).reshape(batch, kv_heads, group * window, size)
        key = qk[:, :, heads:].transpose(1, 2)
        value = qkv[:, :, heads + kv_heads :].transpose(1, 2)
        score = (query @ key.transpose(-1, -2)).float().view(batch, kv_heads, group, window, window)
        chance = (score / math.sqrt(size) + mask[:window, :window]).softmax(-1).to(compute)
        mixed = chance.view(batch, kv_heads, group * window, window) @ value
        mixed = mixed.view(batch, heads, window, size).transpose(1, 2).reshape(batch, window, width)
        return product(mixed, weights[f"{i}.o"]).float()

    def mlp(x: torch.Tensor, weights: Weights, i: int) -> torch.Tensor:
        gate, up = product(x, weights[f"{i}.gate_up"]).float().chunk(2, -1)
        return product((F.silu(gate) * up).to(compute), weights[f"{i}.down"]).float()

    def loss(weights: Weights, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = F.embedding(ids, weights["embed"])
        for i in range(plan.layers):
            x = x + attention(norm(x, weights[f"{i}.norm1"]), weights, i)
            x = x + mlp(norm(x, weights[f"{i}.norm2"]), weights, i)
        logits = product(norm(x, weights["norm"]), weights["embed"]).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return loss


def batch_at(
    stream: np.ndarray, plan: Plan, step: int, rank: int, workers: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One worker's share of the random windows of a step: inputs and the tokens that follow them."""
    window = plan.window(step)
    generator = np.random.default_rng([plan.seed, step])
    starts = generator.integers(0, len(stream) - window, plan.batch_tokens // window)[rank::workers]
    rows = torch.from_numpy(stream[starts[:, None] + np.arange(window + 1)].astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def held_out_loss(weights: Weights, stream: np.ndarray, plan: Plan, rows: int) -> float:
    """The float32 loss (nats per token) over the first `rows` full windows of the held-out stream."""
    count = min(rows, (len(stream) - 1) // plan.context)
    windows = np.stack([stream[i * plan.context : (i + 1) * plan.context + 1] for i in range(count)])
    ids = torch.from_numpy(windows.astype(np.int64))
    loss = make_loss(plan, torch.float32)
    with torch.no_grad():
        parts = [loss(weights, part[:, :-1], part[:, 1:]).item() * len(part) for part in ids.split(8)]
    return sum(parts) / count


def train(rank: int, workers: int, plan: Plan, stream: np.ndarray, held_out: np.ndarray, work: Path) -> None:
    """One worker of data-parallel training; worker 0 prints and saves. Starts from `latest.pt` when there is one.

    One single-threaded process per core, gradients averaged once a step: on a busy machine that loses far less than
    two threads that wait for each other in every operation.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{work}/meeting", rank=rank, world_size=workers
    )
    weights = fresh_weights(plan)
    parameters = [weight.requires_grad_() for weight in weights.values()]
    optimizer = torch.optim.AdamW(
        parameters, lr=plan.rate, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.0, fused=True
    )
    first, spent, saved = 0, 0.0, work / "latest.pt"
    if saved.exists():
        first, spent = load_state(saved, weights, optimizer)
    loss = torch.compile(make_loss(plan, torch.bfloat16), dynamic=False)
    start, running = time.time() - spent, math.log(plan.vocab)
    for step in range(first, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate_at(step)
        value = loss(weights, *batch_at(stream, plan, step, rank, workers))
        value.backward()
        average_gradients(parameters, workers)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running += 0.01 * (value.item() - running)
        done = step + 1
        if rank > 0:
            continue
        if done % 100 == 0:
            print(
                f"step {done}/{plan.steps} window {plan.window(step)} loss {running:.4f} "
                f"rate {plan.rate_at(step):.2e} seconds {time.time() - start:.0f}",
                flush=True,
            )
        if done % 500 == 0 or done == plan.steps:
            save_state(saved, weights, optimizer, done, time.time() - start)
        if done % 2000 == 0:
            print(f"step {done} held-out loss {held_out_loss(weights, held_out, plan, 40):.4f}", flush=True)
            save_state(work / f"step{done}.pt", weights, optimizer, done, time.time() - start)
    torch.distributed.destroy_process_group()


def average_gradients(parameters: list[torch.Tensor], workers: int) -> None:
    """Replace each worker's gradients by their mean over the workers, in one exchange."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= workers
    for gradient, part in zip(
        gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True
    ):
        gradient.copy_(part.view_as(gradient))


def load_state(path: Path, weights: Weights, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Fill weights and optimizer from a checkpoint; the steps done and the seconds they took."""
    state = torch.load(path, weights_only=True)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(state["weights"][name])
    optimizer.load_state_dict(state["optimizer"])
    print(f"resuming at step {state['step']}", flush=True)
    return state["step"], state["seconds"]


def save_state(
    path: Path, weights: Weights, optimizer: torch.optim.Optimizer, step: int, seconds: float
) -> None:
    """Write a checkpoint under a temporary name, then rename: a kill leaves the previous one whole."""
    state = {
        "weights": {name: weight.detach() for name, weight in weights.items()},
        "optimizer": optimizer.state_dict(),
        "step": step,
        "seconds": seconds,
    }
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def to_transformers(weights: Weights, plan: Plan, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The same function as a `LlamaForCausalLM`, weights rounded to bfloat16."""
    bos, eos = tokenizer.convert_tokens_to_ids([BOS, EOS])
    config = LlamaConfig(
        vocab_size=plan.vocab,
        hidden_size=plan.width,
        intermediate_size=plan.mlp,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        num_key_value_heads=plan.kv_heads,
        max_position_embeddings=plan.context,
        rope_theta=plan.theta,
        rms_norm_eps=plan.eps,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    kv = plan.kv_heads * plan.head_width
    state = {"model.embed_tokens.weight": weights["embed"], "model.norm.weight": weights["norm"]}
    for i in range(plan.layers):
        at = f"model.layers.{i}"
        query, key, value = weights[f"{i}.qkv"].split([plan.width, kv, kv])
        gate, up = weights[f"{i}.gate_up"].chunk(2)
        state |= {
            f"{at}.input_layernorm.weight": weights[f"{i}.norm1"],
            f"{at}.self_attn.q_proj.weight": query,
            f"{at}.self_attn.k_proj.weight": key,
            f"{at}.self_attn.v_proj.weight": value,
            f"{at}.self_attn.o_proj.weight": weights[f"{i}.o"],
            f"{at}.post_attention_layernorm.weight": weights[f"{i}.norm2"],
            f"{at}.mlp.gate_proj.weight": gate,
            f"{at}.mlp.up_proj.weight": up,
            f"{at}.mlp.down_proj.weight": weights[f"{i}.down"],
        }
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    # Not .to(bfloat16), which would round the rotary frequencies as well.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict({name: weight.detach().to(torch.bfloat16) for name, weight in state.items()})
    model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=eos, pad_token_id=eos)
    return model


def transformers_loss(model: LlamaForCausalLM, stream: np.ndarray, plan: Plan) -> float:
    """The loss `transformers` itself computes, in float32, over the full windows of the held-out stream."""
    count = (len(stream) - 1) // plan.context
    rows = np.stack([stream[i * plan.context : (i + 1) * plan.context + 1] for i in range(count)])
    total = 0.0
    with torch.no_grad():
        for part in torch.from_numpy(rows.astype(np.int64)).split(8):
            logits = model(part[:, :-1]).logits
            total += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()).item() * len(part)
    return total / count


def round_to_nearest(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Min-max affine codes with an integer zero point in blocks of 64 inputs: the plainest method there is.

    Written out here, not taken from fracbit, so that the model's acceptance does not move with the library.
    """
    levels = 2**bits - 1
    parts = []
    for part in weight.split(64, dim=1):
        low, high = part.amin(1, keepdim=True).clamp(max=0), part.amax(1, keepdim=True).clamp(min=0)
        scale = (high - low) / levels
        zero = (-low / scale).round()
        parts.append((((part / scale).round() + zero).clamp(0, levels) - zero) * scale)
    return torch.cat(parts, dim=1)


def rounded_losses(folder: Path, stream: np.ndarray, plan: Plan) -> dict[int, float]:
    """Held-out loss (nats per token) with all linears in the blocks rounded to 4, 3 and 2 bits."""
    losses = {}
    for bits in (4, 3, 2):
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            for module in model.model.layers.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.copy_(round_to_nearest(module.weight, bits))
        losses[bits] = transformers_loss(model, stream, plan)
    return losses


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """The tokenizer's files, with the class name that transformers 4 and 5 both know and no trace of where it lay."""
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    kept = {
        key: value
        for key, value in config.items()
        if key not in ("backend", "is_local", "local_files_only", "model_max_length")
    }
    path.write_text(json.dumps(kept, indent=2) + "\n")


def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, plan: Plan) -> str:
    """What the model writes after a prompt, sampled at temperature 0.6 with a fixed seed."""
    torch.manual_seed(plan.seed)
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=160, do_sample=True, temperature=0.6, top_k=0)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def model_card(report: dict[str, Any], plan: Plan, written: str) -> str:
    """The README of the folder: every figure in it comes from the run that wrote the weights."""
    facts = {
        "shape": f"{plan.layers} blocks, width {plan.width}, {plan.heads} heads ({plan.kv_heads} for keys and values), "
        f"MLP {plan.mlp}, context {plan.context}, tied embeddings",
        "tokenizer": f"byte-level BPE, {plan.vocab} tokens, every text comes back exactly",
        "trained on": f"{report['modules']} modules of the standard library of Python {report['python']}: "
        f"{report['corpus_characters']:,} characters, {report['corpus_tokens']:,} tokens",
        "sha256 of what was read": f"`{report['corpus_sha256']}`",
        "training": f"{report['training_tokens']:,} tokens, {report['tokens_per_parameter']} per parameter, "
        f"{report['training_seconds']:,} s of wall clock on {report['workers']} CPU cores",
        "held out": f"{len(HELD_OUT)} modules, {report['held_out_tokens']:,} tokens, listed in "
        "`fracbit.bundled.HELD_OUT`",
        "held-out perplexity": f"{report['held_out_perplexity']:.3f} per token (windows of {plan.context}), "
        f"{report['held_out_bits_per_byte']:.3f} bits per byte",
    }
    about = "\n".join(f"| {name} | {fact} |" for name, fact in facts.items())
    rounding = "\n".join(
        f"| {bits} bits | {row['perplexity']:.2f} | {row['rise_percent']:+.1f} % |"
        for bits, row in report["rounded"].items()
    )
    return f"""---
license: apache-2.0
language: code
library_name: transformers
pipeline_tag: text-generation
---

# The bundled model

A Llama of {report["parameters"]:,} parameters that predicts Python source. fracbit ships it so that every command has a
model to work on without a download; it is a demo and a test piece, not a coding assistant.

| | |
|---|---|
{about}

All linear layers in the blocks rounded to nearest (affine, integer zero point, blocks of 64 inputs), same text:

| | perplexity | rise |
|---|---|---|
| float | {report["held_out_perplexity"]:.2f} | |
{rounding}

Another Python version has slightly different modules, so figures measured there differ, by some 5 % either way.

After `def main(`, at temperature 0.6:

```python
{written.rstrip()}
```

## Where it comes from

`python examples/train_bundled.py` writes this folder again: it reads the standard library of the interpreter that runs
it, trains the tokenizer and the model from a fixed seed, and checks the result against `transformers`' own loss. Exact
weights depend on the versions of torch, of the compiler and of the standard library. The training text is the source of
the Python standard library, (c) Python Software Foundation, PSF License.
"""


def main() -> int:
    arguments = parse_arguments()
    # A killed run must not leave its workers training: as daemons they end with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    plan = dataclasses.replace(Plan(), tokens=arguments.tokens)
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)

    texts, digest = corpus()
    if (work / "tokenizer").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    else:
        tokenizer = train_tokenizer(texts, plan)
        tokenizer.save_pretrained(work / "tokenizer")
    stream = token_stream(texts, tokenizer)
    held_out = token_stream([held_out_text()], tokenizer)
    parameters = sum(weight.numel() for weight in fresh_weights(plan).values())
    report: dict[str, Any] = {
        "parameters": parameters,
        "modules": len(texts),
        "corpus_sha256": digest,
        "corpus_characters": sum(map(len, texts)),
        "corpus_tokens": len(stream),
        "training_tokens": plan.steps * plan.batch_tokens,
        "tokens_per_parameter": round(plan.steps * plan.batch_tokens / parameters, 1),
        "held_out_tokens": len(held_out),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "workers": arguments.workers,
        "plan": dataclasses.asdict(plan),
    }
    print(json.dumps(report, indent=2), flush=True)

    (work / "meeting").unlink(missing_ok=True)
    job = (arguments.workers, plan, stream, held_out, work)
    torch.multiprocessing.spawn(train, job, nprocs=arguments.workers, daemon=True)
    state = torch.load(work / "latest.pt", weights_only=True)
    return finish(report, state, plan, tokenizer, held_out, arguments.out)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=bundled_model(), help="folder of the finished checkpoint")
    parser.add_argument(
        "--work", type=Path, default=Path("/tmp/fracbit-bundled"), help="folder of the checkpoints"
    )
    parser.add_argument("--tokens", type=int, default=Plan.tokens, help="training tokens")
    parser.add_argument("--workers", type=int, default=2, help="training processes, one core each")
    return parser.parse_args()


def finish(
    report: dict[str, Any],
    state: dict[str, Any],
    plan: Plan,
    tokenizer: PreTrainedTokenizerFast,
    held_out: np.ndarray,
    out: Path,
) -> int:
    """Save as `transformers` files, measure through `transformers`, write the figures; 1 if the model does not serve."""
    rounded = {name: weight.to(torch.bfloat16).float() for name, weight in state["weights"].items()}
    ours = held_out_loss(rounded, held_out, plan, len(held_out))
    out.mkdir(parents=True, exist_ok=True)
    to_transformers(rounded, plan, tokenizer).save_pretrained(out)
    save_tokenizer(tokenizer, out)
    model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    loss = transformers_loss(model, held_out, plan)
    if abs(ours - loss) > 1e-4:
        print(
            f"transformers computes loss {loss:.6f}, training code {ours:.6f}: not the same model",
            file=sys.stderr,
        )
        return 1
    losses = rounded_losses(out, held_out, plan)
    report |= {
        "training_seconds": round(state["seconds"]),
        "held_out_loss": round(loss, 5),
        "held_out_perplexity": round(math.exp(loss), 4),
        "held_out_bits_per_byte": round(
            loss / math.log(2) * len(held_out) / len(held_out_text().encode()), 4
        ),
        "rounded": {
            bits: {
                "perplexity": round(math.exp(value), 4),
                "rise_percent": round(100 * math.expm1(value - loss), 2),
            }
            for bits, value in losses.items()
        },
    }
    written = sample(model, tokenizer, "def main(", plan)
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / "README.md").write_text(model_card(report, plan, written))
    print(json.dumps(report, indent=2), written, sep="\n", flush=True)
    if losses[3] < loss + math.log(1.10) or losses[2] < loss + math.log(2):
        print(
            "this model hardly feels rounding (3 bits: +10 %, 2 bits: x2 wanted); train it longer",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
