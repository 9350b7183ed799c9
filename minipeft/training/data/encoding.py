"""Rows to token ids and labels: what is predicted, where a document ends, and what happens to long rows."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from minipeft.config.options import one_of
from minipeft.errors import ConfigError, DataError
from minipeft.training.data.chat import ChatTemplate
from minipeft.training.data.rows import check_row

VERSION = 2  # of the encoding; cached rows of another version are not used
IGNORED = -100  # torch.nn.functional.cross_entropy skips these labels
LINES_PER_RUN = 1000
PROBE = "a"


@dataclass(frozen=True)
class Encoding:
    """How rows become examples."""

    max_length: int  # the most tokens an example may have
    # Fill rows of `max_length` with short examples, each computed as if it were alone; a continuous text is cut into
    # blocks. None: do so for text, and pad prompts and chats. See `minipeft.training.data.packing`.
    packing: bool | None = None
    # What to do with a prompt and completion or a chat of more tokens: ``"error"``, ``"truncate"`` its end or
    # ``"drop"`` it. Text is always cut into blocks.
    overlong: str = "error"
    empty: str = "error"  # what to do with a row that has nothing to predict: ``"error"`` or ``"drop"``
    # Join documents and cut them into blocks in which they attend to each other. Text only.
    attend_across: bool = False

    def __post_init__(self) -> None:
        if type(self.max_length) is not int or self.max_length < 2:
            raise ConfigError(
                f"max_length must be an integer from 2, not {self.max_length!r}: one token predicts nothing."
            )
        for name, allowed in (("overlong", ("error", "truncate", "drop")), ("empty", ("error", "drop"))):
            one_of(name, getattr(self, name), allowed)
        if self.attend_across and self.packing is False:
            raise ConfigError("attend_across=True joins documents, and packing=False does not; leave one of them out.")


class Fate(IntEnum):
    """What became of a row."""

    KEPT = 0
    TRUNCATED = 1
    OVERLONG = 2  # and dropped
    EMPTY = 3  # and dropped


class Encoded(NamedTuple):
    """A row in tokens. `labels` is None if every token is predicted; both are empty if the row is dropped."""

    input_ids: list[int]
    labels: list[int] | None
    fate: Fate


class Encoder:
    """Encodes rows of one kind with one tokenizer.

    Text: its tokens; a document (kind ``"text"``) also gets the tokenizer's prefix, such as bos, and eos.
    Prompt and completion: tokenised separately and joined, so that training sees the same boundary as generation from
    the prompt; then eos. Chat: see `ChatTemplate`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kind: str, encoding: Encoding):
        self.tokenizer, self.kind, self.encoding = tokenizer, kind, encoding
        self.is_text = kind in ("run", "line", "text")
        packing = self.is_text if encoding.packing is None else encoding.packing
        if encoding.attend_across and not self.is_text:
            raise ConfigError(f"attend_across=True is for text, not for examples of kind {kind!r}; leave it out.")
        one_text = kind in ("run", "line") or encoding.attend_across
        self.in_blocks = packing and one_text  # all rows are one text, cut every `max_length` tokens
        self.in_rows = packing and not one_text  # examples share rows and are kept apart
        self.template = ChatTemplate(tokenizer) if kind == "chat" else None
        self.before = _prefix(tokenizer) if kind in ("text", "prompt") else []
        if kind in ("text", "prompt") and tokenizer.eos_token_id is None:
            raise ConfigError(
                f"the tokenizer has no eos token, which ends an example of kind {kind!r}; set tokenizer.eos_token."
            )
        self.rows_at_once = LINES_PER_RUN if kind == "line" else 1

    def encode(self, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Encoded]:
        """Encode rows. Lines are joined to one run; any other row is encoded on its own.

        Raises:
            DataError: a row has the wrong type, or is too long or empty and `Encoding` says to stop; the message names it.
        """
        text = "text" if self.is_text else self.kind
        checked = [check_row(text, row, name) for row, name in zip(rows, names, strict=True)]
        if self.kind == "line":
            lines = [row["text"] if row["text"].endswith("\n") else row["text"] + "\n" for row in checked]
            return self._texts(["".join(lines)])
        if self.is_text:
            return self._texts([row["text"] for row in checked])
        if self.kind == "prompt":
            return self._prompts(checked, names)
        return [self._chat(json.loads(row["messages"]), name) for row, name in zip(checked, names, strict=True)]

    def fingerprint(self) -> str:
        """Digest of everything that decides what a row becomes; the same on every machine and path."""
        parts = [VERSION, self.kind, asdict(self.encoding), tokenizer_digest(self.tokenizer)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # verbose would warn of texts longer than the model's context, which are cut or refused next.
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return encoded["input_ids"]

    def _texts(self, texts: list[str]) -> list[Encoded]:
        runs = self._ids(texts)
        if self.kind == "text":
            runs = [self._ended(self.before + ids) if ids else [] for ids in runs]
        return [Encoded(ids, None, Fate.KEPT if ids else Fate.EMPTY) for ids in runs]

    def _prompts(self, rows: list[dict[str, str]], names: Sequence[str]) -> list[Encoded]:
        prompts = self._ids([row["prompt"] for row in rows])
        completions = self._ids([row["completion"] for row in rows])
        examples = []
        for prompt, completion, name in zip(prompts, completions, names, strict=True):
            start = len(self.before) + len(prompt)
            ids = self.before + prompt + (self._ended(completion) if completion else [])
            examples.append(self._fitted(ids, [number >= start for number in range(len(ids))], name))
        return examples

    def _chat(self, chat: Any, name: str) -> Encoded:
        assert self.template is not None
        tools = None
        if isinstance(chat, dict):
            chat, tools = chat["messages"], chat["tools"]
        return self._fitted(*self.template.encode(chat, name, tools), name)

    def _ended(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return ids if ids[-1:] == [eos] else [*ids, eos]

    def _fitted(self, ids: list[int], predicted: list[bool], name: str) -> Encoded:
        length, allowed = len(ids), self.encoding.max_length
        if not any(predicted[1:]):  # nothing comes before the first token, so it cannot be predicted
            if self.encoding.empty == "error":
                raise DataError(
                    f"{name} has no token to predict: its completion or the assistant's part is empty; "
                    "fill it in, or leave such rows out, as Encoding(empty='drop') does."
                )
            return Encoded([], [], Fate.EMPTY)
        fate = Fate.KEPT
        if length > allowed:
            if self.encoding.overlong == "error":
                raise DataError(
                    f"{name} has {length} tokens and max_length is {allowed}; raise it, shorten the row, "
                    'or choose overlong="truncate" or "drop".'
                )
            if self.encoding.overlong == "drop" or not any(predicted[1:allowed]):
                return Encoded([], [], Fate.OVERLONG)
            ids, predicted, fate = ids[:allowed], predicted[:allowed], Fate.TRUNCATED
        labels = [token if own else IGNORED for token, own in zip(ids, predicted, strict=True)]
        return Encoded(ids, labels, fate)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token id to pad with. Any will do, even eos: padding is masked, and labels are masked by position."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in known if token is not None))


def check_fit(max_length: int, largest_id: int, config: Any) -> None:
    """Raise ConfigError if a model has fewer positions, or a smaller vocabulary, than examples take."""
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    if max_length > positions:
        raise ConfigError(f"max_length {max_length}: the model has {positions} positions; give at most that many.")
    if largest_id >= config.vocab_size:
        raise ConfigError(
            f"token id {largest_id} is outside the model's vocabulary of {config.vocab_size}; "
            "use the tokenizer that belongs to the model."
        )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of what a tokenizer does to a text. Its pickle would not do: it contains the path it was loaded from."""
    content: Any = sorted(tokenizer.get_vocab().items())
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content.update(truncation=None, padding=None)
    special = [tokenizer.eos_token_id, tokenizer.bos_token_id, _prefix(tokenizer), str(tokenizer.chat_template)]
    parts = [type(tokenizer).__name__, content, special, {k: str(v) for k, v in tokenizer.special_tokens_map.items()}]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer puts before a text, such as bos."""
    plain = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    whole = tokenizer(PROBE, add_special_tokens=True)["input_ids"]
    start = next((n for n in range(len(whole)) if whole[n : n + len(plain)] == plain), 0)
    return list(whole[:start])
