"""Name patterns, some from files that nobody vouches for: regular expressions with a length cap and a time limit."""

from __future__ import annotations

import time
from collections.abc import Iterable

import regex

from minipeft.errors import ConfigError, TargetError

MAX_PATTERN_LENGTH = 2000
SECONDS_PER_PATTERN = 2.0


def compiled(pattern: str, where: str) -> regex.Pattern[str]:
    """Compile a regular expression.

    Raises:
        ConfigError: it is too long or no valid expression; `where` names the option it stands in.
    """
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise ConfigError(f"{where}: a pattern of {len(pattern):,} characters; {MAX_PATTERN_LENGTH:,} are allowed.")
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ConfigError(f"{where}: {pattern!r} is no valid regular expression ({error}).") from None


def full_matches(pattern: str, names: Iterable[str], where: str) -> list[str]:
    """The names that the expression matches from end to end, in their order.

    Raises:
        TargetError: matching takes longer than two seconds altogether, as a hostile expression would.
    """
    expression = compiled(pattern, where)
    deadline = time.monotonic() + SECONDS_PER_PATTERN
    try:
        return [name for name in names if expression.fullmatch(name, timeout=max(deadline - time.monotonic(), 0.001))]
    except TimeoutError:
        raise TargetError(
            f"{where}: {pattern!r} takes more than {SECONDS_PER_PATTERN:g} s on this model's module names; "
            "a list of suffixes such as ['c_attn'] says the same without a search."
        ) from None


def is_suffix(entry: str, name: str) -> bool:
    """Whether `entry` is `name` or ends it at a dot: 'c_attn' fits 'h.0.attn.c_attn', 'attn' does not fit 'c_attn'."""
    return name == entry or name.endswith("." + entry)


def first_key(patterns: Iterable[str], name: str, where: str) -> str | None:
    """The first pattern that matches the whole name or a dotted suffix of it, as PEFT's ``rank_pattern`` does."""
    return next((key for key in patterns if full_matches(rf"(?:.*\.)?(?:{key})", [name], where)), None)
