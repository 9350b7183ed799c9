"""Rows of a data set: which columns make which kind of example, and their values, checked and in one form.

Rows come as text, prompts with completions, lists of messages, ShareGPT's conversations or Alpaca's instructions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from minipeft.errors import DataError, shown

COLUMNS = {"text": ("text",), "prompt": ("prompt", "completion"), "chat": ("messages",)}
OTHER_COLUMNS = {"chat": ("conversations",), "prompt": ("instruction", "output")}  # ShareGPT's and Alpaca's
OPTIONAL = {"messages": ("tools",), "conversations": ("tools", "system"), "instruction": ("input",)}
ALLOWED = "'text', or 'prompt' and 'completion', or 'messages', or 'conversations', or 'instruction' and 'output'"
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"}
SPEAKERS |= {"system": "system", "tool": "tool", "observation": "tool"}
# Taori et al., 2023, github.com/tatsu-lab/stanford_alpaca: the words that its models were trained with.
ALPACA = (
    "Below is an instruction that describes a task{more}. Write a response that appropriately completes the request."
)
ALPACA += "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
WITH_INPUT = ", paired with an input that provides further context"


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
            raise DataError(f"{where}: {name!r} is {_typed(value)}; it must be a string.")
    return alpaca_prompt(**values) if needed[0] == "instruction" else values


def alpaca_prompt(instruction: str, output: str, input: str = "") -> dict[str, str]:
    """An instruction, perhaps with an input, and its answer as prompt and completion in Alpaca's words."""
    more, section = (WITH_INPUT, f"### Input:\n{input}\n\n") if input else ("", "")
    return {"prompt": ALPACA.format(more=more, instruction=instruction, input=section), "completion": output}


def conversation(row: Mapping[str, Any], name: str, where: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The messages of a row, with a role each, and its tools; raises DataError if they are something else."""
    value, tools = _parsed(row[name], name, where), _parsed(row.get("tools") or [], "tools", where)
    if isinstance(value, dict) and value.keys() == {"messages", "tools"}:  # as `check_row` writes it
        value, tools = value["messages"], value["tools"]
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {name!r} is {_typed(value)}; it must be a list of at least one message.")
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"{where}: 'tools' is {_typed(tools)}; it must be a list of JSON schemas of functions.")
    messages = [_message(message, f"{where}: message {number}") for number, message in enumerate(value)]
    if name == "conversations" and row.get("system"):
        messages.insert(0, {"role": "system", "content": row["system"]})
    return messages, [_without_nulls(tool) for tool in tools]


def _message(message: object, where: str) -> dict[str, Any]:
    if isinstance(message, Mapping) and isinstance(message.get("from"), str) and "role" not in message:
        if message["from"] not in SPEAKERS:
            raise DataError(f"{where} is from {message['from']!r}; allowed are {shown(SPEAKERS)}.")
        message = {"role": SPEAKERS[message["from"]], "content": message.get("value")}
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise DataError(f"{where} is {_typed(message)}; it must be an object with a 'role'.")
    # In a column of structs, every row has the keys of all rows; a template would take their nulls for values.
    return {key: item for key, item in message.items() if item is not None}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _parsed(value: object, name: str, where: str) -> object:
    if not isinstance(value, str):
        return value
    try:
        parsed: object = json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(f"{where}: {name!r} is a string that is not JSON; it must be a list.") from None
    return parsed


def _typed(value: object) -> str:
    """A value and its type, for a message."""
    return "null" if value is None else f"{value!r:.40} ({type(value).__name__})"
