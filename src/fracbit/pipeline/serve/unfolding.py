"""Text that unfolds token by token: whole characters only, with the spaces of the whole text, up to a stop text."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for a part of a character."""


class Unfolding:
    """Give it tokens, get the text that is certain. State: tokens so far, and text held back.

    Held back is what may become another character, or the beginning of a stop text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.ids: list[int] = []
        self.begin = self.told = (
            0  # decoded from `begin` on, so that spaces are right; `told` tokens are text already
        )
        self.held, self.stopped = "", False

    def add(self, token: int) -> str:
        """The text that is new and certain. `stopped` afterwards: a stop text came; nothing from it on is told."""
        self.ids.append(token)
        return self._tell(self._new(False), False)

    def rest(self) -> str:
        """What was held back, at the end."""
        return self._tell(self._new(True), True)

    def _new(self, last: bool) -> str:
        before = self._text(self.ids[self.begin : self.told])
        text = self._text(self.ids[self.begin :])
        if len(text) <= len(before) or (text.endswith(BROKEN) and not last):
            return ""
        self.begin, self.told = self.told, len(self.ids)
        return text[len(before) :]

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _tell(self, new: str, last: bool) -> str:
        if self.stopped:
            return ""
        self.held += new
        found = [place for stop in self.stop if (place := self.held.find(stop)) >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(self.held) if last else len(self.held) - self._may_stop()
        told, self.held = self.held[:end], self.held[end:]
        return told

    def _may_stop(self) -> int:
        """Characters at the end of what is held that a stop text may begin with."""
        return max(
            (
                size
                for stop in self.stop
                for size in range(1, min(len(stop), len(self.held) + 1))
                if self.held.endswith(stop[:size])
            ),
            default=0,
        )
