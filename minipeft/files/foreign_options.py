"""Options that PEFT's and transformers' methods of the same names have: taken where they ask for nothing else than is done."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from minipeft.errors import ConfigError, all_or_nothing, hint, told

# Option -> (which values ask for nothing else than we do; why that is so, or what to do instead).
Harmless = Mapping[str, tuple[Callable[[Any], bool], str]]
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def _only(*allowed: object) -> Callable[[object], bool]:
    """Whether a value is one of these objects."""
    return lambda value: any(value is choice for choice in allowed)


LOADING: Harmless = {
    "torch_device": (
        lambda value: value is None or isinstance(value, str | torch.device),
        "an adapter is on the device of its layers",
    ),
    "low_cpu_mem_usage": (_only(True, False), "every adapter is loaded so"),
    "autocast_adapter_dtype": (_only(True), "call model.half() or model.to(dtype) afterwards"),
    "ephemeral_gpu_offload": (_only(False, None), "layers are not moved for it"),
    "ignore_mismatched_sizes": (_only(False), "a tensor of another shape is not this adapter's"),
}
SAVING: Harmless = {
    "save_function": (callable, "it is never called: the files are written whole or not at all"),
    "token": (lambda value: value is None or isinstance(value, str | bool), "it is only for push_to_hub"),
    "push_to_hub": (_only(False, None), "call model.push_to_hub(repo_id) instead"),
    "variant": (_only(None), "readers of adapters know no variants"),
    "save_peft_format": (_only(True), "PEFT's keys are what readers of adapters expect"),
    "save_original_format": (_only(True, False), "keys are those of the live model"),
    "distributed_checkpoint": (_only(False), "an adapter is one file"),
    "max_shard_size": (lambda value: _bytes(value) is not None, "give bytes, or a text such as '5GB'"),
}
OWN_OF_LOADING = ("allow_base_mismatch", "key_mapping", "revision", "token", "subfolder", "local_files_only")


@all_or_nothing
def own_load_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Our own among the options that were given to ``load_adapter``.

    Raises:
        ConfigError: an option is unknown, or asks for what is not done.
    """
    own = {name: value for name, value in given.items() if name in OWN_OF_LOADING}
    _check("load_adapter", {name: given[name] for name in given if name not in own}, LOADING, OWN_OF_LOADING)
    return own


def check_save_options(given: Mapping[str, Any], unnamed: tuple[object, ...], known: Iterable[str]) -> None:
    """Check what was given to ``save_pretrained`` besides its own options, which are `known`.

    Raises:
        ConfigError: an option is unknown, or asks for what is not done.
    """
    if unnamed:
        raise ConfigError(
            "save_pretrained: give all but the directory and adapter_name by name; transformers and PEFT have other "
            "options in those places."
        )
    _check("save_pretrained", given, SAVING, known)


def _check(verb: str, given: Mapping[str, Any], harmless: Harmless, own: Iterable[str]) -> None:
    for name, value in given.items():
        if name not in harmless:
            raise ConfigError(f"{verb} has no option {told(name)}{hint(name, [*own, *harmless])}.")
        is_harmless, instead = harmless[name]
        if not is_harmless(value):
            raise ConfigError(f"{verb}: {name}={told(value)} is not possible; {instead}.")


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
