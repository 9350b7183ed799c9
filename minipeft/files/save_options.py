"""The options that others hand to ``save_pretrained``: what an adapter's file can honour, and what is refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from minipeft.errors import ConfigError, told
from minipeft.files.foreign_options import Harmless, check_options, only

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
HARMLESS: Harmless = {
    "save_function": (callable, "it is never called: the files are written whole or not at all"),
    "token": (lambda value: value is None or isinstance(value, str | bool), "it is only for push_to_hub"),
    "push_to_hub": (only(False, None), "call model.push_to_hub(repo_id) instead"),
    "variant": (only(None), "readers of adapters know no variants"),
    "save_peft_format": (only(True), "PEFT's keys are what readers of adapters expect"),
    "save_original_format": (only(True, False), "keys are those of the live model"),
    "distributed_checkpoint": (only(False), "an adapter is one file"),
    "max_shard_size": (lambda value: _bytes(value) is not None, "give bytes, or a text such as '5GB'"),
}


def check_save_options(given: Mapping[str, Any], unnamed: Iterable[object], known: Iterable[str]) -> None:
    """Check what was given to ``save_pretrained`` besides its own options.

    Raises:
        ConfigError: an option is unknown, or asks for what is not done.
    """
    if any(True for _ in unnamed):
        raise ConfigError(
            "save_pretrained: give all but the directory and adapter_name by name; transformers and PEFT have other "
            "options in those places."
        )
    check_options("save_pretrained", given, HARMLESS, known)


def check_format(safe_serialization: object) -> None:
    """Raise ConfigError unless safetensors are asked for."""
    if safe_serialization is not True:
        raise ConfigError(
            "safe_serialization must be True: adapters are saved as safetensors, never as a pickle, which can run code."
        )


def check_size(given: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise ConfigError if the tensors are larger than ``max_shard_size``, since an adapter is one file."""
    needed, limit = sum(tensor.nbytes for tensor in tensors.values()), _bytes(given.get("max_shard_size", "1TB"))
    if limit is not None and needed > limit:
        raise ConfigError(
            f"save_pretrained: max_shard_size={told(given['max_shard_size'])}, and this adapter, which is always one file, "
            f"has {needed:,} bytes."
        )


def _bytes(size: object) -> int | None:
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    match = re.fullmatch(r"(\d{1,15})\s*([KMGT]?I?)B?", size.strip().upper()) if isinstance(size, str) else None
    return int(match[1]) * UNITS[match[2]] if match and match[2] in UNITS else None
