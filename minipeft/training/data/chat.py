"""Conversations: a tokenizer's chat template makes the text and shows which parts the assistant wrote."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from minipeft.errors import DataError

Messages: TypeAlias = "Sequence[dict[str, Any]]"
Tools: TypeAlias = "list[dict[str, Any]] | None"
Render: TypeAlias = "Callable[..., tuple[str, list[Span]]]"
Span: TypeAlias = "tuple[int, int]"  # of characters
MARKS_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
ASSISTANT = "assistant"
THOUGHTS = "<think"  # how they begin if the opening begins them
MARK = "\ue000\ue001"  # of the private use area, so no message begins or ends with it


class ChatTemplate:
    """A tokenizer's chat template.

    Only what the assistant wrote is predicted. A template with ``{% generation %}`` blocks marks it. For any other
    template, it is what an assistant message adds to the conversation so far, after the generation prompt. If the
    template renders a message in another way once more follow, as Qwen3's leaves out earlier thoughts, it is searched
    for in the whole text: from the generation prompt to the token that ends the turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template, which 'messages' need; use the tokenizer of the model's chat version, "
                "set tokenizer.chat_template, or give 'prompt' and 'completion'."
            )
        if not tokenizer.is_fast:
            raise DataError(f"'messages' need a fast tokenizer, which {type(tokenizer).__name__} is not.")
        self.tokenizer = tokenizer
        self.template: str = tokenizer.get_chat_template()
        self.added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)  # those that end a turn are among them
        self.marks_generation = MARKS_GENERATION.search(self.template) is not None

    def encode(self, messages: Messages, where: str, tools: Tools = None) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and for each whether the assistant wrote it.

        Raises:
            DataError: the template rejects the messages, or what the assistant wrote cannot be found in their text.
        """
        render = functools.partial(self._render, where=where, tools=tools)
        if self.marks_generation:
            # apply_chat_template finds the tokens of a span by character. If the tokenizer trims white space off its
            # offsets, no token may start at the span's end, and its mask then covers the rest of the conversation.
            text, spans = render(messages, return_assistant_tokens_mask=True)
        else:
            text = render(messages)[0]
            spans = _compared(messages, text, render) or self._searched(messages, text, render, where)
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
        )
        return encoded["input_ids"], _within(encoded["offset_mapping"], spans)

    def _searched(self, messages: Messages, whole: str, render: Render, where: str) -> list[Span]:
        spans, reached = [], 0
        for number, message in enumerate(messages):
            first, last = _content(messages, number, whole, render)
            if message["role"] == ASSISTANT:
                start = _start(_opening(messages[:number], render), whole[reached:first])
                end = self._end(messages[: number + 1], whole, last, render)
                if start < 0 or end < last:
                    raise DataError(
                        f"{where}: what the assistant wrote in message {number} cannot be told from what the chat "
                        "template makes of it; use a template with {% generation %} blocks, or 'prompt' and 'completion'."
                    )
                spans.append((reached + start, end))
            if first < len(whole):  # the message is in the text
                reached = max(reached, last)
        return spans

    def _end(self, messages: Messages, whole: str, last: int, render: Render) -> int:
        """Where the turn ends in which the last message's content ends at `last`; -1 if that is unclear."""
        alone = render(messages)[0]
        ending = alone[_content(messages, len(messages) - 1, alone, render)[1] :]
        if whole.startswith(ending, last):
            return last + len(ending)
        token = next((token for token in self.added if whole.startswith(token, last)), None)
        if token is None or messages[-1].get("tool_calls"):
            return -1
        blank = ending[len(token) :][: len(ending) - len(token) - len(ending[len(token) :].lstrip())]
        same = ending.startswith(token) and whole.startswith(blank, last + len(token))
        return last + len(token) + (len(blank) if same else 0)

    def _render(self, messages: Messages, *, where: str, tools: Tools, **options: Any) -> tuple[str, list[Span]]:
        values = {**self.tokenizer.special_tokens_map, "tools": tools, **options}
        try:
            rendered: Any = render_jinja_template([list(messages)], chat_template=self.template, **values)
        except Exception as error:  # jinja's, or whatever the template raises
            raise DataError(f"{where}: the chat template rejects these messages ({error}).") from None
        return rendered[0][0], (rendered[1] or [[]])[0]


def _compared(messages: Messages, whole: str, render: Render) -> list[Span] | None:
    """What each assistant message adds; None if more messages change how the first ones are rendered."""
    spans = []
    for number, message in enumerate(messages):
        if message["role"] == ASSISTANT:
            before, after = messages[:number], render(messages[: number + 1])[0]
            prompt = render(before, add_generation_prompt=True)[0]
            if not after.startswith(prompt):
                prompt = render(before)[0]
            if not whole.startswith(after) or not after.startswith(prompt):
                return None
            spans.append((len(prompt), len(after)))
    return spans


def _content(messages: Messages, number: int, text: str, render: Render) -> Span:
    """Where the text depends on the content of a message."""
    message = messages[number]
    content = [{"type": "text", "text": MARK}] if isinstance(message.get("content"), list) else MARK
    other = render([*messages[:number], {**message, "content": content}, *messages[number + 1 :]])[0]
    first = _shared(text, other)
    return first, len(text) - _shared(text[first:][::-1], other[first:][::-1])


def _opening(before: Messages, render: Render) -> str:
    """What the template writes before an answer."""
    prompt = render(before, add_generation_prompt=True)[0]
    return prompt[_shared(prompt, render(before)[0]) :]


def _start(opening: str, text: str) -> int:
    """Where an answer starts in a text: after the opening, of which earlier turns may lack the thoughts; -1 if unclear."""
    shortest = opening.find(THOUGHTS)
    for length in range(len(opening), (len(opening) if shortest < 0 else shortest) - 1, -1):
        at = text.find(opening[:length])
        if at >= 0:
            return at + length
    return -1


def _shared(one: str, other: str) -> int:
    """How many characters two texts have in common at their start."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one.startswith(other[:middle]) else (low, middle - 1)
    return low


def _within(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """For each token, whether any of its text lies within a span.

    So if the first word of an answer shares a token with the blank before it, that token is predicted. A tokenizer may
    trim white space off the offsets, so each token is taken to begin where the one before it ended.
    """
    inside, reached, number = [], 0, 0
    for start, end in offsets:
        first = min(start, reached)
        while number < len(spans) and spans[number][1] <= first:
            number += 1
        inside.append(number < len(spans) and spans[number][0] < end)
        reached = end
    return inside
