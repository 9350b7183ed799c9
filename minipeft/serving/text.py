"""Text from tokens, as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what a tokenizer writes for the first bytes of a character


class Text:
    """The text of one answer, piece by piece. The pieces are those of the whole, and none holds a part of a stop string.

    Args:
        tokenizer: of transformers.
        stops: the text ends before the first of them.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.tokens: list[int] = []
        self.stopped = False
        # Tokens before `_read` are text; decoding from `_start` gives the space before a word.
        self._start = self._read = 0
        self._held = ""  # may be the start of a stop string

    def add(self, token: int) -> str:
        """The text that is certain with this token; "" if it ends inside of a character, or perhaps of a stop string."""
        self.tokens.append(token)
        before, after = self._decoded(self._read), self._decoded(len(self.tokens))
        if len(after) <= len(before) or after.endswith(UNFINISHED):
            return ""
        self._start, self._read = self._read, len(self.tokens)
        return self._certain(after[len(before) :])

    def rest(self) -> str:
        """What was held back, now that nothing follows."""
        if self.stopped:
            return ""
        piece = self._certain(self._decoded(len(self.tokens))[len(self._decoded(self._read)) :])
        held, self._held = self._held, ""
        return piece if self.stopped else piece + held

    def _decoded(self, end: int) -> str:
        return str(self.tokenizer.decode(self.tokens[self._start : end], skip_special_tokens=True))

    def _certain(self, piece: str) -> str:
        text = self._held + piece
        found = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text begin a stop string."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
