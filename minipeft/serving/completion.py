"""A completion request: OpenAI's fields, checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minipeft.errors import RequestError, hint, shown, told

LARGEST = 2**63  # a seed is below it
MAX_STOPS, MAX_STOP = 4, 200  # strings, and characters of one


@dataclass(frozen=True)
class Completion:
    """What a client asks for. Defaults and ranges are OpenAI's.

    Args:
        model: an adapter's directory, or the base's name.
        prompt: texts, or lists of token ids.
        max_tokens: the longest answer to each prompt.
        temperature: 0 takes the most likely token each time.
        top_p: sample among the most likely tokens that together are at least as likely as this.
        stop: an answer ends before the first of these.
        seed: of the random numbers of each prompt, which then gives the same text again; None: another one each time.
        stream: send each piece of text as it comes.
        echo: begin each answer with its prompt.
        include_usage: end a stream with the counts of tokens.
    """

    model: str
    prompt: tuple[str | tuple[int, ...], ...]
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    stream: bool = False
    echo: bool = False
    include_usage: bool = False


def parse(payload: bytes) -> Completion:
    """The completion that a body of JSON asks for.

    Unknown fields are refused, as OpenAI's server does; null stands for the default.

    Raises:
        RequestError: with status 400.
    """
    try:
        body = json.loads(payload)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object.")
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name not in FIELDS:
            raise RequestError(f"unknown field {told(name)}{hint(name, FIELDS)}; there are: {shown(FIELDS, 20)}.")
        if not FIELDS[name][0](value):
            raise RequestError(f"{name} must be {FIELDS[name][1]}, not {told(value)}.")
    if missing := [name for name in ("model", "prompt") if name not in given]:
        raise RequestError(f"{missing[0]} is missing.")
    if "stream_options" in given and not given.get("stream"):
        raise RequestError("stream_options is for stream: true alone.")
    given["prompt"] = _several(given["prompt"])
    given["stop"] = (given["stop"],) if isinstance(given.get("stop"), str) else tuple(given.get("stop", ()))
    given["include_usage"] = given.get("stream_options", {}).get("include_usage", False)
    return Completion(**{name: value for name, value in given.items() if name in Completion.__dataclass_fields__})


def _several(prompt: Any) -> tuple[Any, ...]:
    if isinstance(prompt, str) or type(prompt[0]) is int:
        prompt = [prompt]
    return tuple(each if isinstance(each, str) else tuple(each) for each in prompt)


def _is_text(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a character
        return False
    return True


def _is_prompt(value: Any) -> bool:
    return _is_text(value) or _is_list(value, str, _is_text) or _is_ids(value) or _is_list(value, list, _is_ids)


def _is_ids(value: Any) -> bool:
    return _is_list(value, int, lambda token: type(token) is int)


def _is_list(value: Any, kind: type, check: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, kind) and check(item) for item in value)


def _is_stop(value: Any) -> bool:
    stops = [value] if isinstance(value, str) else value
    return stops == [] or (
        _is_list(stops, str, lambda s: _is_text(s) and 0 < len(s) <= MAX_STOP) and len(stops) <= MAX_STOPS
    )


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any, most: float) -> bool:
    return type(value) in (int, float) and 0 <= value <= most


def _asks_nothing(nothing: Any, *kinds: type) -> tuple[Callable[[Any], bool], str]:
    return (
        lambda value: type(value) in kinds and bool(value == nothing),
        f"{nothing!r} or left out, since nothing else is built here",
    )


# Every field of OpenAI's: (whether a value is allowed, what is).
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (_is_text, "a string"),
    "prompt": (_is_prompt, "a string, a list of token ids, or a list of several of one kind"),
    "max_tokens": (lambda value: type(value) is int and 1 <= value < LARGEST, "a whole number from 1 on"),
    "temperature": (lambda value: _is_number(value, 2), "a number from 0 to 2"),
    "top_p": (lambda value: _is_number(value, 1) and value > 0, "a number above 0 and up to 1"),
    "stop": (_is_stop, f"a string of 1 to {MAX_STOP} characters, or a list of up to {MAX_STOPS}"),
    "seed": (lambda value: type(value) is int and -LARGEST <= value < LARGEST, "a whole number of 64 bits"),
    "stream": (_is_flag, "true or false"),
    "echo": (_is_flag, "true or false"),
    "stream_options": (
        lambda value: (
            isinstance(value, dict) and value.keys() <= {"include_usage"} and all(map(_is_flag, value.values()))
        ),
        "{'include_usage': true or false}",
    ),
    "user": (lambda value: isinstance(value, str), "a string"),
    "logprobs": (lambda value: False, "left out, since it is not built here"),
    "suffix": _asks_nothing("", str),
    "logit_bias": _asks_nothing({}, dict),
    **{name: _asks_nothing(1, int) for name in ("n", "best_of")},
    **{name: _asks_nothing(0, int, float) for name in ("presence_penalty", "frequency_penalty")},
}
