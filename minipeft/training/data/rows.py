"""Rows of a data set: which columns make which kind of example, and what their values must be."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from minipeft.errors import DataError, shown
from minipeft.training.data.forms import alpaca_prompt, conversation, told

COLUMNS = {"text": ("text",), "prompt": ("prompt", "completion"), "chat": ("messages",)}
OTHER_COLUMNS = {"chat": ("conversations",), "prompt": ("instruction", "output")}  # ShareGPT's and Alpaca's
OPTIONAL = {"messages": ("tools",), "conversations": ("tools", "system"), "instruction": ("input",)}
ALLOWED = "'text', or 'prompt' and 'completion', or 'messages', or 'conversations', or 'instruction' and 'output'"


def kind_of(columns: Iterable[str], where: str) -> str:
    """The kind of example that these columns make, a key of `COLUMNS`; raises DataError if they make none, or several."""
    names = list(columns)
    kinds = [kind for kind, needed in COLUMNS.items() if set(needed) <= set(names)]
    kinds = kinds or [kind for kind, needed in OTHER_COLUMNS.items() if set(needed) <= set(names)]
    if len(kinds) == 1:
        return kinds[0]
    problem = f"make more than one kind of example ({', '.join(kinds)})" if kinds else "make no example"
    raise DataError(
        f"{where}: the columns {shown(names, 20)} {problem}; allowed are {ALLOWED}, next to any other columns."
    )


def used_columns(kind: str, columns: Iterable[str]) -> tuple[str, ...]:
    """The columns that make examples of a kind: those it needs, and those it takes if they are there."""
    names = list(columns)
    needed = COLUMNS[kind]
    other = OTHER_COLUMNS.get(kind)
    if other and set(other) <= set(names) and not set(needed) <= set(names):
        needed = other
    return needed + tuple(name for name in OPTIONAL.get(needed[0], ()) if name in names)


def check_row(kind: str, row: object, where: str) -> dict[str, str]:
    """The values of `COLUMNS`, as strings. Messages become JSON, because Arrow would add keys to them.

    ShareGPT's conversations become messages, and Alpaca's instructions prompts in Alpaca's words. Tools go with the
    messages: their JSON is then an object of both.

    Raises:
        DataError: a value is missing or has the wrong type; the message names the row.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is a {type(row).__name__}; it must be an object with {ALLOWED}.")
    needed = used_columns(kind, row)
    if missing := [name for name in needed if name not in row]:
        raise DataError(
            f"{where} has no {missing[0]!r}, as the first row has, but {shown(row, 20)}; all rows need the same columns."
        )
    if len([1 for needed in COLUMNS.values() if set(needed) <= set(row)]) > 1:
        kind_of(row, where)
    if kind == "chat":
        messages, tools = conversation(row, needed[0], where)
        value = {"messages": messages, "tools": tools} if tools else messages
        return {"messages": json.dumps(value, ensure_ascii=False)}
    values = {name: row[name] for name in needed}
    if values.get("input", "") is None:  # Alpaca's rows need none
        values["input"] = ""
    for name, value in values.items():
        if not isinstance(value, str):
            raise DataError(f"{where}: {name!r} is {told(value)}; it must be a string.")
    return alpaca_prompt(**values) if needed[0] == "instruction" else values
