"""The requests of many clients as one batch: a thread in which sequences join and leave between two tokens.

    wait for work -> read prompts that came, up to `PORTION` tokens -> a token for every row -> tell -> drop what has ended

The queue is bounded, and so are the length and the time of a request. A client that went away frees its row at the next token.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fracbit.errors import DataError, FracbitError
from fracbit.pipeline.serve.answering import Answering, answering_of
from fracbit.pipeline.serve.unfolding import Unfolding
from fracbit.records.generating import LONG, Limits, Sampling

PORTION = 512
"""Tokens of prompts that are read between two tokens of those that wait for their next one."""

Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class Told:
    """What a client is told: new text and new tokens; at the end why, or what went wrong.

    `late`: the request ran out of time.
    """

    text: str = ""
    tokens: int = 0
    reason: Reason | None = None
    error: str | None = None
    late: bool = False

    @property
    def last(self) -> bool:
        """Whether nothing follows."""
        return self.reason is not None or self.error is not None


@dataclass(eq=False)
class Job:
    """A prompt that waits for its continuation. `tell` gets the pieces, in the scheduler's thread.

    `cancelled` may be set from any thread.
    """

    ids: Sequence[int]
    sampling: Sampling
    tell: Callable[[Told], None]
    cancelled: threading.Event = field(default_factory=threading.Event)
    since: float = field(default_factory=time.monotonic)


class BusyError(FracbitError):
    """The queue is full; come again later."""


class StoppedError(FracbitError):
    """The server takes no more requests."""


@dataclass(eq=False)
class _Row:
    """A job at work: the text so far, its generator, and the token that comes next."""

    job: Job
    text: Unfolding
    generator: torch.Generator
    token: int = -1
    made: int = 0
    ended: bool = False


class Scheduler:
    """Begins its thread at once; `close` ends it. State: the jobs that wait, and the rows at work."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limits: Limits, kv_bits: int = 16
    ) -> None:
        self.tokenizer, self.limits = (
            copy.deepcopy(tokenizer),
            limits,
        )  # another thread reads prompts with the first
        self.length = length_of(model, limits)
        self.vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
        self.ends = _ends(model, tokenizer)
        self.together: Answering = answering_of(model, kv_bits)
        self.waiting: deque[Job] = deque()
        self.rows: list[_Row] = []
        self.changed = threading.Condition()
        self.closing = False
        self.thread = threading.Thread(target=self._run, name="fracbit-serve", daemon=True)
        self.thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self.thread.is_alive() and not self.closing

    def submit(self, *jobs: Job) -> None:
        """Queue jobs, all or none. Raises `BusyError`, `StoppedError`, `DataError` for a prompt that is none or too long."""
        for job in jobs:
            self.check(job)
        with self.changed:
            if not self.alive:
                raise StoppedError("the server is stopping")
            running = sum(not row.ended for row in self.rows)
            if running + len(self.waiting) + len(jobs) > self.limits.batch + self.limits.queue:
                raise BusyError(
                    f"{running} requests are at work and {len(self.waiting)} wait; try again later"
                )
            self.waiting.extend(jobs)
            self.changed.notify()

    def check(self, job: Job) -> None:
        """Raises `DataError` for a prompt without tokens, with others than the model's, or without room after it."""
        if not job.ids or not all(0 <= token < self.vocabulary for token in job.ids):
            raise DataError(f"a prompt needs at least one token, with ids of 0..{self.vocabulary - 1}")
        if len(job.ids) + job.sampling.new_tokens > self.length:
            raise DataError(
                f"{len(job.ids)} tokens of prompt and {job.sampling.new_tokens} new ones are more than the {self.length} "
                "that this server takes; shorten the prompt or ask for fewer"
            )

    def close(self) -> None:
        """End the thread; jobs that are not done are told so."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join()

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait():
                    self._turn()
        finally:  # also after a bug of ours, whose traceback the thread prints: nobody waits for ever
            with self.changed:
                self.closing = True
                left = [*(row.job for row in self.rows), *self.waiting]
                self.waiting.clear()
                self.rows = []
            for job in left:
                job.tell(Told(error="the server stopped"))

    def _wait(self) -> bool:
        """Wait for work; False when the thread is to end."""
        with self.changed:
            while not self.closing and not self.rows and not self.waiting:
                self.changed.wait()
            return not self.closing

    def _turn(self) -> None:
        """One token for every row, after prompts that came were read."""
        for row in self.rows:
            self._check_time(row)
        come, states = self._read_some()
        stay = [number for number, row in enumerate(self.rows) if not row.ended]
        if come or len(stay) < len(self.rows):
            self.together.arrange(stay, states)
            with self.changed:
                self.rows = [*(self.rows[number] for number in stay), *come]
        if self.rows:
            logits = self.together.advance([row.token for row in self.rows])  # [rows, vocabulary]
            for row, each in zip(self.rows, logits, strict=True):
                self._choose(row, each)

    def _read_some(self) -> tuple[list[_Row], list[Any]]:
        """Read prompts from the queue while there is room; the rows that go on after their first token."""
        come: list[_Row] = []
        states: list[Any] = []
        going, read = sum(not row.ended for row in self.rows), 0
        while read < PORTION and going + len(come) < self.limits.batch:
            with self.changed:
                if not self.waiting:
                    break
                job = self.waiting.popleft()
            row = self._begun(job)
            self._check_time(row)
            if row.ended:
                continue
            state, logits = self.together.read(job.ids)
            read += len(job.ids)
            self._choose(row, logits)
            if not row.ended:
                come.append(row)
                states.append(state)
        return come, states

    def _begun(self, job: Job) -> _Row:
        generator = torch.Generator()
        if job.sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(job.sampling.seed)
        return _Row(job, Unfolding(self.tokenizer, job.sampling.stop), generator)

    def _check_time(self, row: _Row) -> None:
        """End a row whose client has gone, or whose time is over."""
        if row.ended:
            return
        if row.job.cancelled.is_set():
            row.ended = True
        elif time.monotonic() - row.job.since > self.limits.seconds:
            row.ended = True
            said = f"the request took longer than {self.limits.seconds:g} s"
            row.job.tell(Told(error=said, late=True))

    def _choose(self, row: _Row, logits: Tensor) -> None:
        """Choose the next token of a row by its `logits` [vocabulary] and tell what is new."""
        job = row.job
        if bool(logits.isnan().any()):
            row.ended = True
            job.tell(Told(error="the model gives NaN after this text"))
            return
        row.token = pick(logits, job.sampling, row.generator)
        row.made += 1
        ends = row.token in self.ends
        text = "" if ends else row.text.add(row.token)
        if ends or row.text.stopped or row.made == job.sampling.new_tokens:
            row.ended = True
            text += row.text.rest()
            reason: Reason = "stop" if ends or row.text.stopped else "length"
            job.tell(Told(text, 1, reason))
        else:
            job.tell(Told(text, 1))


def pick(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token by its `logits` [vocabulary]: the most likely one, or one drawn (nucleus sampling, arXiv:1904.09751)."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    chances = (logits.double() / sampling.temperature).softmax(-1)  # [vocabulary]
    if sampling.top_p < 1:
        ordered, tokens = chances.sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p  # [vocabulary]
        chances = torch.zeros_like(chances).scatter(0, tokens, ordered.masked_fill(beyond, 0.0))
    return int(torch.multinomial(chances, 1, generator=generator))


def length_of(model: PreTrainedModel, limits: Limits) -> int:
    """Tokens of a prompt and its continuation. Raises `DataError` for more than the model has positions."""
    config = model.config.get_text_config(decoder=True)
    positions = getattr(config, "max_position_embeddings", None)
    if limits.length and positions and limits.length > positions:
        raise DataError(f"--max-length {limits.length} is more than the model's {positions} positions")
    return limits.length or min(positions or LONG, LONG)


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a text, by the model's generation config and its tokenizer."""
    named = getattr(model.generation_config, "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return frozenset(int(each) for each in (*listed, tokenizer.eos_token_id) if each is not None)
