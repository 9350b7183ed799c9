"""Options of PEFT's and transformers' methods of the same names, accepted where they ask for what is done anyway."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minipeft.errors import ConfigError, hint, told

# Option -> (which values ask for nothing else than we do; why that is so, or what to do instead).
Harmless = Mapping[str, tuple[Callable[[Any], bool], str]]
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def _only(*allowed: object) -> Callable[[object], bool]:
    """Whether a value is one of these objects, or a text equal to one."""
    return lambda value: any(value is choice for choice in allowed) or (isinstance(value, str) and value in allowed)


PLACED = "an adapter is on the device of its layers"
DTYPE = "load the base in that dtype; the adapter's own parameters are float32"
LOADING: Harmless = {
    "torch_device": (lambda value: value is None or isinstance(value, str | torch.device), PLACED),
    "device_map": (_only(None, "auto"), PLACED),
    "low_cpu_mem_usage": (_only(True, False), "every adapter is loaded so"),
    "autocast_adapter_dtype": (_only(True), "call model.half() or model.to(dtype) afterwards"),
    "dtype": (_only(None), DTYPE),
    "torch_dtype": (_only(None), DTYPE),
    "use_safetensors": (_only(True, None), "a pickle is never read; `minipeft convert DIR` makes safetensors of it"),
    "use_auth_token": (_only(True, None), "pass token"),
    "config": (_only(None), "the configuration is read from the directory"),
    "ephemeral_gpu_offload": (_only(False, None), "layers are not moved for it"),
    "ignore_mismatched_sizes": (_only(False), "a tensor of another shape is not this adapter's"),
    "hotswap": (_only(False, "auto"), "hotswap_adapter() does that"),
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
    "path_initial_model_for_weight_conversion": (
        _only(None),
        "the adapter knows what it started from: pass convert_to_lora=True",
    ),
}
PUSHING: Harmless = {
    "use_auth_token": (_only(True, None), "pass token"),
    "use_temp_dir": (_only(True, None), "the files are always written to one"),
    "safe_serialization": (_only(True), "adapters are saved as safetensors, never as a pickle"),
    "max_shard_size": (lambda value: value is None or _bytes(value) is not None, "give bytes, or a text such as '5GB'"),
    "tags": (_only(None), "add them to the model card on the hub"),
}
OWN_OF_LOADING = ("allow_base_mismatch", "key_mapping", "revision", "token", "subfolder", "local_files_only")
OWN_OF_SAVING = (
    *("adapter_name", "selected_adapters", "state_dict", "is_main_process", "safe_serialization"),
    *("convert_to_lora", "save_embedding_layers"),
)
OWN_OF_PUSHING = ("adapter_name", "commit_message", "commit_description", "private", "token", "revision", "create_pr")
# A verb -> the options of others that it takes, and its own.
VERBS: Mapping[str, tuple[Harmless, Sequence[str]]] = {
    "load_adapter": (LOADING, OWN_OF_LOADING),
    "hotswap_adapter": (LOADING, OWN_OF_LOADING),
    "save_pretrained": (SAVING, OWN_OF_SAVING),
    "push_to_hub": (PUSHING, OWN_OF_PUSHING),
}


def check_options(verb: str, given: Mapping[str, Any], unnamed: tuple[object, ...] = ()) -> None:
    """Check what was given to a verb besides its own options.

    Raises:
        ConfigError: an option is unknown, has no name, or asks for something else than is done.
    """
    if unnamed:
        raise ConfigError(
            f"{verb}: give all but the directory and adapter_name by name; transformers and PEFT have other options in "
            "those places."
        )
    harmless, own = VERBS[verb]
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
            f"max_shard_size={told(given['max_shard_size'])}, and this adapter, which is always one file, has {needed:,} bytes."
        )


def _bytes(size: object) -> int | None:
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    match = re.fullmatch(r"(\d{1,15})\s*([KMGT]?I?)B?", size.strip().upper()) if isinstance(size, str) else None
    return int(match[1]) * UNITS[match[2]] if match and match[2] in UNITS else None
