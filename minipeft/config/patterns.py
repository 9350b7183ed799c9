"""Name patterns, possibly from untrusted files: regular expressions with a length cap and a time limit."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import regex

from minipeft.errors import ConfigError, TargetError, told, told_error

Value = TypeVar("Value")
# No model's own names need more than these. Compiling has no time limit, so what makes it long is counted before.
MAX_PATTERN_LENGTH = 2000
MAX_REPEATS = 100_000  # the product of all counts in braces: the engine writes them out
MAX_EXPRESSIONS = 500  # in one table
SECONDS_PER_OPTION = 2.0
_RECURSION = regex.compile(r"(?<!\\)\(\?(?:R|[+-]?\d|&|P>)")
_COUNTS = regex.compile(r"\{(\d*),?(\d*)\}")
# One name or ending of names, perhaps anchored: '^model\\.layers\\.0\\.q_proj$', '.*\\.q_proj', 'q_proj'. In 'fc.' the dot is any letter.
_LITERAL = regex.compile(r"(\^|\.\*\\\.|)((?:[\w-]|\\-)+(?:\\?\.(?:[\w-]|\\-)+)*)(?:\$|\\Z|)")


def compiled(pattern: str, where: str) -> regex.Pattern[str]:
    """Compile a regular expression.

    Raises:
        ConfigError: it is too long or too large, recursive, or not a valid expression; `where` names its option.
    """
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise ConfigError(f"{where}: a pattern of {len(pattern):,} characters; {MAX_PATTERN_LENGTH:,} are allowed.")
    if _RECURSION.search(pattern):
        raise ConfigError(f"{where}: {told(pattern, 100)} calls itself; expressions for names must not be recursive.")
    if math.prod(max(1, *(int(n or 1) for n in counts)) for counts in _COUNTS.findall(pattern)) > MAX_REPEATS:
        raise ConfigError(f"{where}: {told(pattern, 100)} repeats too often; {MAX_REPEATS:,} times are allowed in all.")
    try:
        return regex.compile(pattern)
    except Exception as error:  # the engine's own, and ValueError, RecursionError, MemoryError, ...
        why = told_error(error)
        raise ConfigError(f"{where}: {told(pattern, 100)} is not a valid regular expression ({why}).") from None


def full_matches(pattern: str, names: Iterable[str], where: str, deadline: float | None = None) -> list[str]:
    """The names that the whole expression matches, in their order.

    Args:
        pattern: a regular expression.
        names: to try.
        where: the option's name, for messages.
        deadline: of ``time.thread_time()``, which stands still while the program waits for the machine; None: in two seconds.

    Raises:
        TargetError: matching takes longer, as with a hostile expression, or fails.
    """
    expression = compiled(pattern, where)
    end = time.thread_time() + SECONDS_PER_OPTION if deadline is None else deadline
    try:
        return [name for name in names if expression.fullmatch(name, timeout=max(end - time.thread_time(), 0.001))]
    except TimeoutError:
        raise TargetError(
            f"{where}: {told(pattern, 100)} takes more than {SECONDS_PER_OPTION:g} s on this model's module names; "
            "use a list of suffixes such as ['c_attn'] instead, or whole names in a table."
        ) from None
    except Exception as error:
        raise TargetError(
            f"{where}: {told(pattern, 100)} cannot be matched with this model's names ({told_error(error)})."
        ) from None


def is_suffix(entry: str, name: str) -> bool:
    """Whether `entry` is `name` or ends it at a dot: 'c_attn' fits 'h.0.attn.c_attn', 'attn' does not fit 'c_attn'."""
    return name == entry or name.endswith("." + entry)


def endings(name: str) -> Iterator[str]:
    """The name itself and what follows each of its dots: everything that `is_suffix` accepts."""
    dot = "."
    while dot:
        yield name
        _, dot, name = name.partition(".")


def matching(entries: Iterable[str], names: Iterable[str]) -> list[str]:
    """The names that equal one of the entries or end in it at a dot, in their order; in linear time."""
    wanted = set(entries)
    return [name for name in names if not wanted.isdisjoint(endings(name))]


def selected(patterns: Sequence[str] | str, names: Sequence[str], option: str) -> list[str]:
    """The names that an option selects: by one regular expression for whole names, or by a list of suffixes."""
    if not patterns:
        return []
    return full_matches(patterns, names, option) if isinstance(patterns, str) else matching(patterns, names)


def by_shorter_key(values: Mapping[str, Value], short: Mapping[str, str]) -> dict[str, Value]:
    """A table under the short key of each name if all names with this key have the same value, else under the name."""
    found: dict[str, set[Value]] = {}
    for name, value in values.items():
        found.setdefault(short[name], set()).add(value)
    return {short[name] if len(found[short[name]]) == 1 else name: value for name, value in values.items()}


def check_table(patterns: Iterable[str], where: str) -> None:
    """Check the keys of a table from name patterns to values.

    Raises:
        ConfigError: one is not a valid expression, or there are too many that are more than a name.
    """
    expressions = [key for key in patterns if _LITERAL.fullmatch(key) is None]
    if len(expressions) > MAX_EXPRESSIONS:
        raise ConfigError(
            f"{where} has {len(expressions):,} regular expressions; {MAX_EXPRESSIONS} are allowed. Names are not counted."
        )
    for key in expressions:
        compiled(key, where)


def first_keys(patterns: Iterable[str], names: Sequence[str], where: str) -> dict[str, str]:
    """For each name, the first pattern that matches all of it, or its end after a dot, as in PEFT's ``rank_pattern``.

    Names that no pattern matches are left out. A pattern that is a name, perhaps anchored, is found by hashing, so a table
    with one key per module takes linear time. The other patterns have two seconds together.
    """
    order = {key: position for position, key in enumerate(patterns)}
    literal, expressions = _split(order)
    found: dict[str, str] = {}
    for name in names if literal else ():
        hits = [key for ending in endings(name) for key in literal.get((ending == name, ending), ())]
        if hits:
            found[name] = min(hits, key=order.__getitem__)
    deadline = time.thread_time() + SECONDS_PER_OPTION
    for key in expressions:
        for name in full_matches(rf"(?:.*\.)?(?:{key})", names, where, deadline):
            if name not in found or order[key] < order[found[name]]:
                found[name] = key
    return found


def _split(keys: Iterable[str]) -> tuple[dict[tuple[bool, str], list[str]], list[str]]:
    """(keys by what they match: whether as the whole name, and the text), and the keys that are more than a name."""
    literal: dict[tuple[bool, str], list[str]] = {}
    expressions = []
    for key in keys:
        match = _LITERAL.fullmatch(key)
        if match is None:
            expressions.append(key)
            continue
        start, text = match[1], match[2].replace("\\", "")
        for whole in {"^": (True,), "": (True, False)}.get(start, (False,)):
            literal.setdefault((whole, text), []).append(key)
    return literal, expressions
