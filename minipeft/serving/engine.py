"""The thread that owns the model: between two tokens, rows join its batch and rows leave it."""

from __future__ import annotations

import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minipeft.config.options import integer
from minipeft.errors import MinipeftError, RequestError
from minipeft.injection.rows import BASE
from minipeft.serving.adapters import Adapters
from minipeft.serving.batch import Batch
from minipeft.serving.choice import choose

logger = logging.getLogger("minipeft")
Event = int | str | RequestError  # a token, why it was the last one ("stop" or "length"), or what went wrong


@dataclass(eq=False)
class Answer:
    """One prompt, and its answer as it grows.

    Args:
        model: directory of an adapter; None: the base alone.
        prompt: token ids.
        max_tokens: the longest answer.
        deliver: called with each event, in the engine's thread.
        temperature, top_p, seed: see `minipeft.serving.completion.Completion`.
    """

    model: str | None
    prompt: Sequence[int]
    max_tokens: int
    deliver: Callable[[Event], None]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    tokens: list[int] = field(default_factory=list)
    adapter: str = BASE  # its name in the model
    over: bool = False  # complete, failed, or nobody waits for it any more

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(secrets.randbits(63) if self.seed is None else self.seed)


class Engine:
    """Answers prompts in one batch, which never waits to be full.

    Args:
        batch: of the model.
        adapters: of the same model.
        ends: tokens that end an answer.
        max_rows: of the batch.
        max_waiting: prompts that may wait to join it.

    Raises:
        ConfigError: one of the two is below 1, so that nothing would ever be answered.
        StateError: the model cannot be served, see `minipeft.serving.batch.Batch.check`.
    """

    def __init__(
        self, batch: Batch, adapters: Adapters, ends: Iterable[int], *, max_rows: int = 16, max_waiting: int = 64
    ) -> None:
        integer("max_rows", max_rows, at_least=1)
        integer("max_waiting", max_waiting, at_least=1)
        batch.check()
        self.batch, self.adapters, self.ends = batch, adapters, frozenset(ends)
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self.waiting: deque[Answer] = deque()
        self.closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="minipeft engine", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def is_alive(self) -> bool:
        """Whether it answers."""
        return self._thread.is_alive()

    def submit(self, answers: Sequence[Answer]) -> None:
        """Let answers wait for their turn: all of them, or none.

        Raises:
            RequestError: with status 429 if too many wait, 400 if there are more than ever may, 503 if the server is about to end.
        """
        with self._changed:
            if self.closing or not self.is_alive():
                raise RequestError("the server is shutting down.", 503)
            self.check_number(len(answers))
            count = sum(not answer.over for answer in self.waiting)
            if count + len(answers) > self.max_waiting:
                raise RequestError(f"{count} prompts wait, and {self.max_waiting} may; try again later.", 429)
            self.waiting += answers
            self._changed.notify()

    def check_number(self, prompts: int) -> None:
        """Raise RequestError with status 400 if more prompts are sent at once than may ever wait."""
        if prompts > self.max_waiting:
            raise RequestError(f"{prompts} prompts at once, and {self.max_waiting} may wait; send fewer.")

    def stop(self) -> None:
        """Take no more, finish what was taken, and end the thread."""
        with self._changed:
            self.closing = True
            self._changed.notify()
        if self.is_alive():
            self._thread.join()

    def _work(self) -> None:
        while self._has_work():
            self.batch.keep([row for row in self.batch.rows if not row.over])
            if joining := self._admitted():
                self._advance(joining, lambda rows: self.batch.join(rows))
            if rows := self.batch.rows:
                self._advance(rows, lambda _: self.batch.step())

    def _has_work(self) -> bool:
        """Wait for an answer to be asked for; False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self.waiting or self.batch.rows or self.closing)
            return bool(self.waiting or self.batch.rows)

    def _admitted(self) -> list[Answer]:
        """Those that wait, as many as there is room for, with their adapters in the model.

        None overtakes another, or one whose adapter finds no room might wait for ever.
        """
        joining: list[Answer] = []
        while self.waiting and len(self.batch.rows) + len(joining) < self.max_rows:
            answer = self.waiting[0]
            if not answer.over and not self._found_adapter(answer, [*self.batch.rows, *joining]):
                break
            with self._changed:
                self.waiting.popleft()
            if not answer.over:
                joining.append(answer)
        return joining

    def _found_adapter(self, answer: Answer, others: Sequence[Answer]) -> bool:
        """Whether its adapter is in the model now, or cannot be, which ends it; False: it has to wait."""
        if answer.model is None:
            return True
        self.batch.reroute()
        try:
            name = self.adapters.acquire(answer.model, {other.adapter for other in others})
        except Exception as error:
            _fail(answer, error)
            return True
        answer.adapter = name or BASE
        return name is not None

    def _advance(self, rows: Sequence[Answer], run: Callable[[Sequence[Answer]], Tensor]) -> None:
        """Give each of these rows its next token. What goes wrong ends their answers, and not the thread."""
        try:
            logits = run(rows)
            finite = logits.amax(-1).isfinite().tolist()
            how = [row.temperature for row in rows], [row.top_p for row in rows], [row.random for row in rows]
            tokens = choose(logits.nan_to_num(), *how)
        except Exception as error:
            for row in rows:
                _fail(row, error)
        else:
            for row, token, sound in zip(rows, tokens, finite, strict=True):
                if sound:
                    self._give(row, token)
                else:
                    _fail(row, RequestError(f"{row.model or 'the base'!r} gives values that are not finite."))
        self.batch.keep([row for row in self.batch.rows if not row.over])

    def _give(self, row: Answer, token: int) -> None:
        row.tokens.append(token)
        row.deliver(token)
        if token in self.ends or len(row.tokens) == row.max_tokens:
            row.over = True
            row.deliver("stop" if token in self.ends else "length")


def _fail(answer: Answer, error: Exception) -> None:
    answer.over = True
    if not isinstance(error, MinipeftError):
        logger.error("an answer failed", exc_info=error)
        error = RequestError(f"the model failed ({type(error).__name__}); the server's log says more.", 500)
    answer.deliver(error if isinstance(error, RequestError) else RequestError(str(error)))
