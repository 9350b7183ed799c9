"""Name patterns, possibly from untrusted files: regular expressions with a length cap and a time limit."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

import regex

from minipeft.errors import ConfigError, TargetError

MAX_PATTERN_LENGTH = 2000
SECONDS_PER_PATTERN = 2.0


def compiled(pattern: str, where: str) -> regex.Pattern[str]:
    """Compile a regular expression.

    Raises:
        ConfigError: it is too long or not a valid expression; `where` names its option.
    """
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise ConfigError(f"{where}: a pattern of {len(pattern):,} characters; {MAX_PATTERN_LENGTH:,} are allowed.")
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ConfigError(f"{where}: {pattern!r} is not a valid regular expression ({error}).") from None


def full_matches(pattern: str, names: Iterable[str], where: str) -> list[str]:
    """The names that the whole expression matches, in their order.

    Raises:
        TargetError: matching takes longer than two seconds in total, as with a hostile expression.
    """
    expression = compiled(pattern, where)
    deadline = time.monotonic() + SECONDS_PER_PATTERN
    try:
        return [name for name in names if expression.fullmatch(name, timeout=max(deadline - time.monotonic(), 0.001))]
    except TimeoutError:
        raise TargetError(
            f"{where}: {pattern!r} takes more than {SECONDS_PER_PATTERN:g} s on this model's module names; "
            "use a list of suffixes such as ['c_attn'] instead."
        ) from None


def is_suffix(entry: str, name: str) -> bool:
    """Whether `entry` is `name` or ends it at a dot: 'c_attn' fits 'h.0.attn.c_attn', 'attn' does not fit 'c_attn'."""
    return name == entry or name.endswith("." + entry)


def endings(name: str) -> Iterator[str]:
    """The name itself and what follows each of its dots: everything that `is_suffix` accepts."""
    yield name
    for position, character in enumerate(name):
        if character == ".":
            yield name[position + 1 :]


def first_keys(patterns: Iterable[str], names: Sequence[str], where: str) -> dict[str, str]:
    """For each name the first pattern that matches all of it or its end after a dot, as PEFT's ``rank_pattern``.

    Names that no pattern matches are left out. A pattern of letters, digits, '_', '-' and dots is taken literally and
    found by hashing, so a table with one key per module takes linear time.
    """
    order = {key: position for position, key in enumerate(patterns)}
    plain = {key for key in order if regex.fullmatch(r"[\w.-]+", key)}
    found = {}
    for name in names:
        hits = plain.intersection(endings(name))
        if hits:
            found[name] = min(hits, key=order.__getitem__)
    for key in order:
        for name in full_matches(rf"(?:.*\.)?(?:{key})", names, where) if key not in plain else ():
            if name not in found or order[key] < order[found[name]]:
                found[name] = key
    return found
