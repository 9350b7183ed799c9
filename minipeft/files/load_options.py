"""The options that PEFT's ``load_adapter`` takes besides ours: what they may ask for here, and what is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from minipeft.errors import all_or_nothing
from minipeft.files.foreign_options import Harmless, check_options, only

OWN = ("allow_base_mismatch", "key_mapping", "revision", "token", "subfolder", "local_files_only")
HARMLESS: Harmless = {
    "torch_device": (
        lambda value: value is None or isinstance(value, str | torch.device),
        "an adapter is on the device of its layers",
    ),
    "low_cpu_mem_usage": (only(True, False), "every adapter is loaded so"),
    "autocast_adapter_dtype": (only(True), "call model.half() or model.to(dtype) afterwards"),
    "ephemeral_gpu_offload": (only(False, None), "layers are not moved for it"),
    "ignore_mismatched_sizes": (only(False), "a tensor of another shape is not this adapter's"),
}


@all_or_nothing
def own_load_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Our own among the options that were given to ``load_adapter``.

    Raises:
        ConfigError: an option is unknown, or asks for what is not done.
    """
    check_options("load_adapter", {name: value for name, value in given.items() if name not in OWN}, HARMLESS, OWN)
    return {name: value for name, value in given.items() if name in OWN}
