"""Packed experts of a mixture together, one call of the kernel for each of their matrices, beside one expert after the other
(bench/results/experts.json, docs/serving.md).

    python bench/kernels/experts.py [--threads 1] [--json bench/results/experts.json]

Both take turns within one run; a time is a median of milliseconds. Experts are chosen at random; results are compared.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from frame import arguments, in_turns, say_machine, write_json

from fracbit.models import experts
from fracbit.models.quant_linear import QuantLinear
from fracbit.numerics import quantize_tensor
from fracbit.records.scheme import parse_scheme

SCHEME = parse_scheme("int4/64")
SIZES = {"tiny": (64, 32, 8, 2), "of Qwen3-30B, 32 of its 128": (2048, 768, 32, 8)}
"""Width, inner width, experts, experts of a token."""


def packed(width: int, inner: int, count: int, top: int) -> nn.Module:
    """A mixture with random packed weights."""
    config = Qwen3MoeConfig(
        hidden_size=width, moe_intermediate_size=inner, num_experts=count, num_experts_per_tok=top
    )
    config._experts_implementation = "eager"
    model = nn.Module()
    model.experts = Qwen3MoeExperts(config)
    for parameter in model.experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    experts.split_experts(model)
    for path, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear):
            made = QuantLinear(SCHEME, (linear.out_features, linear.in_features))
            made.fill(quantize_tensor(linear.weight.detach(), SCHEME))
            experts.put(model, path, made)
    return model.experts


@torch.inference_mode()
def measure(mixture: nn.Module, tokens: int, width: int, top: int, rounds: int) -> dict[str, float]:
    """Milliseconds of both ways, their ratio, and the largest difference of results."""
    x = torch.randn(tokens, width)
    shares, chosen = torch.randn(tokens, len(mixture)).softmax(-1).topk(top)  # type: ignore[arg-type]

    def run(together: int) -> torch.Tensor:
        usual, experts.TOGETHER = experts.TOGETHER, together
        try:
            return mixture(x, chosen, shares)
        finally:
            experts.TOGETHER = usual

    ways = {"one by one": 0, "together": experts.TOGETHER}
    results = [run(together) for together in ways.values()]
    calls = {name: [lambda together=together: run(together)] for name, together in ways.items()}
    seconds = in_turns(calls, rounds)
    found = {name: 1e3 * statistics.median(each) for name, each in seconds.items()}
    apart = float((results[0] - results[1]).abs().max())
    return {**found, "ratio": found["together"] / found["one by one"], "apart": apart}


def main() -> None:
    parser = arguments(__doc__, rounds=15, threads=1, json=None)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    say_machine()
    rows = []
    for name, (width, inner, count, top) in SIZES.items():
        mixture = packed(width, inner, count, top)
        for tokens in given.tokens:
            found = measure(mixture, tokens, width, top, given.rounds)
            rows.append({"experts": name, "tokens": tokens, **found})
            print(
                f"{name}, {tokens} tokens: " + ", ".join(f"{key} {value:.3g}" for key, value in found.items())
            )
    write_json(given.json, {"scheme": str(SCHEME), "rows": rows})


if __name__ == "__main__":
    main()
