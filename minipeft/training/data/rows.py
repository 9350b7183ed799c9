"""Rows of a data set: which columns make which kind of example, and what their values must be."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from minipeft.errors import DataError, shown

COLUMNS = {"text": ("text",), "prompt": ("prompt", "completion"), "chat": ("messages",)}
ALLOWED = "'text', or 'prompt' and 'completion', or 'messages'"


def kind_of(columns: Iterable[str], where: str) -> str:
    """The kind of example that these columns make, a key of `COLUMNS`.

    Args:
        columns: names of the columns, or the keys of a row.
        where: names the data in a message.

    Raises:
        DataError: they make none, or more than one; the message lists them.
    """
    names = list(columns)
    kinds = [kind for kind, needed in COLUMNS.items() if set(needed) <= set(names)]
    if len(kinds) == 1:
        return kinds[0]
    problem = f"make more than one kind of example ({', '.join(kinds)})" if kinds else "make no example"
    raise DataError(
        f"{where}: the columns {shown(names, 20)} {problem}; allowed are {ALLOWED}, next to any other columns."
    )


def check_row(kind: str, row: object, where: str) -> dict[str, str]:
    """The values of the used columns, as strings. Messages become JSON, because Arrow would add keys to them.

    Raises:
        DataError: a value is missing or has the wrong type; the message names the row.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is a {type(row).__name__}; it must be an object with {ALLOWED}.")
    if missing := [name for name in COLUMNS[kind] if name not in row]:
        raise DataError(
            f"{where} has no {missing[0]!r}, as the first row has, but {shown(row, 20)}; all rows need the same columns."
        )
    if len([1 for needed in COLUMNS.values() if set(needed) <= set(row)]) > 1:
        kind_of(row, where)
    if kind == "chat":
        return {"messages": json.dumps(_messages(row["messages"], where), ensure_ascii=False)}
    for name in COLUMNS[kind]:
        if not isinstance(row[name], str):
            raise DataError(f"{where}: {name!r} is {_told(row[name])}; it must be a string.")
    return {name: row[name] for name in COLUMNS[kind]}


def _messages(value: object, where: str) -> list[dict[str, Any]]:
    value = _parsed(value, where) if isinstance(value, str) else value
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: 'messages' is {_told(value)}; it must be a list of at least one message.")
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: message {number} is {_told(message)}; it must be an object with a 'role'.")
        # In a column of structs, every row has the keys of all rows; a template would take their nulls for values.
        messages.append({key: item for key, item in message.items() if item is not None})
    return messages


def _parsed(value: str, where: str) -> object:
    try:
        parsed: object = json.loads(value)
    except ValueError:
        raise DataError(f"{where}: 'messages' is a string that is not JSON; it must be a list of messages.") from None
    return parsed


def _told(value: object) -> str:
    return "null" if value is None else f"{value!r:.40} ({type(value).__name__})"
