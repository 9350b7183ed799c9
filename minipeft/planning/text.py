"""How many tokens a text has for a model."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from minipeft.errors import ConfigError, DataError, told_error
from minipeft.files.reading import read_text


def count_tokens(place: Any, path: Path) -> int:
    """The number of tokens that the model's tokenizer makes of a text file.

    Args:
        place: the model's directory, or its name on the Hub.
        path: a file in UTF-8.

    Raises:
        MinipeftError: the file cannot be read, or the model has no tokenizer.
    """
    if not isinstance(place, str | os.PathLike):
        raise ConfigError(
            "a text is counted by a model's tokenizer; give the model's directory or name, or count yourself."
        )
    text = read_text(path)
    try:
        tokenizer: Any = importlib.import_module("transformers").AutoTokenizer.from_pretrained(place)
    except Exception as error:  # of as many kinds as there are tokenizers
        raise DataError(
            f"{place} has no tokenizer that loads ({told_error(error)}); count yourself and give the number of tokens."
        ) from None
    count = len(tokenizer(text, verbose=False)["input_ids"])
    if not count:
        why = f"{place} has no tokenizer for it" if text.strip() else "it is empty"
        raise DataError(f"there are no tokens in {path}: {why}.")
    return count
