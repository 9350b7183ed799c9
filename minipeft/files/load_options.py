"""The options that PEFT's ``load_adapter`` takes besides ours: what they may ask for here, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from minipeft.errors import ConfigError, all_or_nothing, hint, told

OWN = ("allow_base_mismatch", "key_mapping", "revision", "token", "subfolder", "local_files_only")


def _only(*allowed: object) -> Callable[[object], bool]:
    return lambda value: any(value is choice for choice in allowed)


# Option -> (the values that ask for nothing else than we do, why or what to do instead).
HARMLESS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "torch_device": (
        lambda value: value is None or isinstance(value, str | torch.device),
        "an adapter is on the device of its layers",
    ),
    "low_cpu_mem_usage": (_only(True, False), "every adapter is loaded so"),
    "autocast_adapter_dtype": (_only(True), "call model.half() or model.to(dtype) afterwards"),
    "ephemeral_gpu_offload": (_only(False, None), "layers are not moved for it"),
    "ignore_mismatched_sizes": (_only(False), "a tensor of another shape is not this adapter's"),
}


@all_or_nothing
def own_load_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Our own among the options that were given to ``load_adapter``.

    Raises:
        ConfigError: an option is unknown, or asks for what is not done.
    """
    for name, value in given.items():
        if name in OWN:
            continue
        if name not in HARMLESS:
            raise ConfigError(f"load_adapter has no option {told(name)}{hint(name, [*OWN, *HARMLESS])}.")
        harmless, instead = HARMLESS[name]
        if not harmless(value):
            raise ConfigError(f"load_adapter: {name}={told(value)} is not possible; {instead}.")
    return {name: value for name, value in given.items() if name in OWN}
