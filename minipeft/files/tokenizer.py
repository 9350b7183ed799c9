"""A model's tokenizer, which is never an empty one."""

from __future__ import annotations

import importlib
from os import PathLike
from typing import Any

from minipeft.errors import DataError, told_error


def load_tokenizer(place: str | PathLike[str]) -> Any:
    """The tokenizer in a model's directory, or of a name on the Hub.

    Raises:
        DataError: none is there that loads. For some families transformers then makes one of special tokens alone.
    """
    transformers = importlib.import_module("transformers")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    except Exception as error:  # of as many kinds as there are tokenizers
        raise DataError(f"{place} has no tokenizer that loads ({told_error(error)}).") from None
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise DataError(
            f"{place} has no tokenizer of its own, and the one that transformers makes for it knows no words. Save the right one "
            "there: tokenizer.save_pretrained(...)."
        )
    return tokenizer
