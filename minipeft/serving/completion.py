"""A completion request: OpenAI's fields, checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minipeft.errors import RequestError, hint, shown, told

# Fields of OpenAI's that are taken only with a value that asks for nothing.
WITHOUT_EFFECT = {"n": 1, "best_of": 1, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "suffix": ""}
LARGEST = 2**63  # a seed is below it
MAX_STOPS, MAX_STOP = 4, 200  # strings, and characters of one


@dataclass(frozen=True)
class Completion:
    """What a client asks for. Defaults and ranges are OpenAI's.

    Args:
        model: an adapter's directory, or the base's name.
        prompts: texts, or lists of token ids.
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
    prompts: tuple[str | tuple[int, ...], ...]
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
        raise RequestError("The body must be a JSON object.")
    given = {name: value for name, value in body.items() if value is not None}
    options = _stream_options(given.pop("stream_options", {}), given.get("stream"))
    for name, value in WITHOUT_EFFECT.items():
        if (found := given.pop(name, value)) != value:
            raise RequestError(f"{name} must be {value!r} or left out, not {told(found)}; nothing else is built here.")
    if "logprobs" in given:
        raise RequestError("logprobs is not built here; leave it out.")
    given.pop("user", None)
    if missing := [name for name in ("model", "prompt") if name not in given]:
        raise RequestError(f"{missing[0]} is missing.")
    prompts = _prompts(given.pop("prompt"))
    if unknown := [name for name in given if name not in CHECKS]:
        raise RequestError(
            f"unknown field {told(unknown[0])}{hint(unknown[0], CHECKS)}; there are: {shown(CHECKS, 20)}."
        )
    checked = {name: CHECKS[name](name, value) for name, value in given.items()}
    return Completion(prompts=prompts, include_usage=options, **checked)


def _stream_options(options: Any, stream: Any) -> bool:
    usage = options.get("include_usage", False) if isinstance(options, dict) else None
    if not isinstance(usage, bool) or options.keys() - {"include_usage"} or (options and not stream):
        raise RequestError("stream_options is {'include_usage': true or false}, with stream: true.")
    return usage


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if all(type(item) is int for item in value):
            return (tuple(value),)
        if all(isinstance(item, list) and item and all(type(token) is int for token in item) for item in value):
            return tuple(map(tuple, value))
    raise RequestError("prompt must be a string, a list of token ids, or a list of several of one kind.")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{name} must be a string, not {told(value)}.")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false, not {told(value)}.")
    return value


def _whole(name: str, value: Any) -> int:
    least = 1 if name == "max_tokens" else -LARGEST
    if type(value) is not int or not least <= value < LARGEST:
        raise RequestError(f"{name} must be a whole number from {least} on, not {told(value)}.")
    return value


def _number(name: str, value: Any) -> float:
    most = 2 if name == "temperature" else 1
    if type(value) not in (int, float) or not (0 <= value <= most) or (name == "top_p" and value == 0):
        raise RequestError(f"{name} must be a number from 0 to {most}, not {told(value)}.")
    return float(value)


def _stops(name: str, value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP for s in stops):
        raise RequestError(f"{name} must be a string of 1 to {MAX_STOP} characters, or a list of them.")
    if len(stops) > MAX_STOPS:
        raise RequestError(f"{name} has {len(stops)} strings; {MAX_STOPS} are allowed.")
    return tuple(stops)


CHECKS: Mapping[str, Any] = {
    "model": _text,
    "max_tokens": _whole,
    "temperature": _number,
    "top_p": _number,
    "stop": _stops,
    "seed": _whole,
    "stream": _flag,
    "echo": _flag,
}
