"""The forms that rows come in: lists of messages, ShareGPT's conversations, Alpaca's instructions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from minipeft.errors import DataError, shown

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"}
SPEAKERS |= {"system": "system", "tool": "tool", "observation": "tool"}
# Taori et al., 2023, github.com/tatsu-lab/stanford_alpaca: the words that its models were trained with.
ALPACA = (
    "Below is an instruction that describes a task{more}. Write a response that appropriately completes the request."
)
ALPACA += "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
WITH_INPUT = ", paired with an input that provides further context"


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
        raise DataError(f"{where}: {name!r} is {told(value)}; it must be a list of at least one message.")
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"{where}: 'tools' is {told(tools)}; it must be a list of JSON schemas of functions.")
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
        raise DataError(f"{where} is {told(message)}; it must be an object with a 'role'.")
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


def told(value: object) -> str:
    """A value and its type, for a message."""
    return "null" if value is None else f"{value!r:.40} ({type(value).__name__})"
