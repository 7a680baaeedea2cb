"""Models that are used for long and by many at once: threads that share a model, and prompts without end."""

from __future__ import annotations

import random
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import torch

import fracbit
from chaos.mutations import Grounds
from chaos.trials import Broken, Change

THREADS = 8
PROMPTS = 40  # of one trial
GROWTH = 64 << 20  # bytes that a process may grow by between its first prompts and its last


def eight_threads(grounds: Grounds) -> Change:
    """Eight threads ask one model at once: each gets what it gets alone."""
    model = fracbit.load(grounds.packed)

    def change(chance: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
        texts = [[chance.randrange(3, 250) for _ in range(chance.randrange(1, 40))] for _ in range(THREADS)]

        def answer(ids: list[int]) -> torch.Tensor:
            with torch.inference_mode():
                return model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=0)

        def judge() -> str:
            alone, together = [answer(ids) for ids in texts], [torch.empty(0)] * THREADS

            def ask(number: int) -> None:
                together[number] = answer(texts[number])

            threads = [threading.Thread(target=ask, args=(number,)) for number in range(THREADS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if not all(torch.equal(a, b) for a, b in zip(alone, together, strict=True)):
                raise Broken("a thread got another answer than alone")
            return "unharmed: "

        return f"{THREADS} threads", judge

    return change


def many_prompts(grounds: Grounds) -> Change:
    """Prompts of every kind, one after another, through `generate`: none hangs, and memory does not grow."""
    from fracbit.checkpoint.load import load_tokenizer
    from fracbit.pipeline.serve.generation import Settings, generate

    model, tokenizer = fracbit.load(grounds.packed), load_tokenizer(grounds.packed)

    def change(chance: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
        prompts = ["".join(chr(chance.choice((32, 65, 97, 233, 0x4E2D, 0x1F600, 10))) for _ in range(chance.randrange(1, 60)))
                   for _ in range(PROMPTS)]  # fmt: skip
        settings = Settings(max_new_tokens=8, temperature=chance.choice((0.0, 0.7)))

        def judge() -> str:
            before = 0
            for number, prompt in enumerate(prompts):
                generate(model, tokenizer, [prompt], settings)
                if number == PROMPTS // 4:
                    before = _resident()
            grown = _resident() - before
            if grown > GROWTH:
                raise Broken(f"the process grew by {grown} bytes")
            return f"unharmed: {PROMPTS} prompts"

        return f"{PROMPTS} prompts at temperature {settings.temperature}", judge

    return change


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


USES: dict[str, Callable[[Grounds], Change]] = {"threads": eight_threads, "prompts": many_prompts}
