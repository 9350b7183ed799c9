"""Conversations: a tokenizer's chat template makes the text and shows which parts the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from minipeft.errors import DataError

Messages: TypeAlias = "Sequence[dict[str, Any]]"
Span: TypeAlias = "tuple[int, int]"  # of characters
MARKS_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
ASSISTANT = "assistant"


class ChatTemplate:
    """A tokenizer's chat template.

    Only what the assistant wrote is predicted. A template with ``{% generation %}`` blocks marks it. For any other
    template, it is what an assistant message adds to the conversation so far, after the generation prompt.
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
        self.marks_generation = MARKS_GENERATION.search(self.template) is not None

    def encode(self, messages: Messages, where: str) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and for each whether the assistant wrote it.

        Raises:
            DataError: the template rejects the messages, or renders the first few of them differently if more follow.
        """
        text, spans = self._marked(messages, where) if self.marks_generation else self._compared(messages, where)
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
        )
        return encoded["input_ids"], _within(encoded["offset_mapping"], spans)

    def _marked(self, messages: Messages, where: str) -> tuple[str, list[Span]]:
        # apply_chat_template finds the tokens of a span by character. If the tokenizer trims white space off its
        # offsets, no token may start at the span's end, and its mask then covers the rest of the conversation.
        texts, spans = self._render(messages, where, return_assistant_tokens_mask=True)
        return texts[0], spans[0]

    def _compared(self, messages: Messages, where: str) -> tuple[str, list[Span]]:
        whole, spans = self._text(messages, where), []
        for number, message in enumerate(messages):
            if message["role"] == ASSISTANT:
                before, after = messages[:number], self._text(messages[: number + 1], where)
                prompt = self._text(before, where, add_generation_prompt=True)
                if not after.startswith(prompt):
                    prompt = self._text(before, where)
                if not whole.startswith(after) or not after.startswith(prompt):
                    raise DataError(
                        f"{where}: the chat template renders message {number} in another way if more messages follow "
                        "or if an answer is asked for, so what the assistant wrote is unclear; use a template "
                        "with {% generation %} blocks, or 'prompt' and 'completion'."
                    )
                spans.append((len(prompt), len(after)))
        return whole, spans

    def _text(self, messages: Messages, where: str, **options: Any) -> str:
        return self._render(messages, where, **options)[0][0]

    def _render(self, messages: Messages, where: str, **options: Any) -> tuple[Any, Any]:
        values = {**self.tokenizer.special_tokens_map, **options}
        try:
            rendered: Any = render_jinja_template([list(messages)], chat_template=self.template, **values)
        except Exception as error:  # jinja's, or whatever the template raises
            raise DataError(f"{where}: the chat template rejects these messages ({error}).") from None
        return rendered[0], rendered[1]


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
