"""minipeft: LoRA and its relatives for any torch model, in files that PEFT, transformers and vLLM read."""

from __future__ import annotations

from torch import nn

from minipeft import families, layers, methods
from minipeft.config import AdapterConfig
from minipeft.errors import (
    CheckpointError,
    ConfigError,
    ContractError,
    DataError,
    LeanError,
    MergeError,
    MinipeftError,
    RegistryError,
    StateError,
    TargetError,
)
from minipeft.layers.base import LayerOps
from minipeft.lean_model import lean, unlean
from minipeft.merge import MergeReport
from minipeft.methods.base import Adapter
from minipeft.methods.lora import LoraConfig
from minipeft.model import AdaptedModel, get_adapter_model, load_adapter
from minipeft.registry import register_adapter, register_layer, register_method, register_targets

__version__ = "0.1.0"


def get_lora_model(
    model: nn.Module,
    config: LoraConfig | None = None,
    adapter_name: str = "default",
    *,
    autocast_adapter_dtype: bool = True,
) -> AdaptedModel:
    """Adapt a model in place with LoRA and freeze its base; see `get_adapter_model`. No config: ``LoraConfig()``.

    Raises:
        MinipeftError: a value, pattern or layer is not usable; the model is bit for bit what it was.
    """
    config = LoraConfig() if config is None else config
    if not isinstance(config, LoraConfig):
        raise ConfigError(
            f"get_lora_model takes a LoraConfig, not {type(config).__name__}; get_adapter_model takes any method's."
        )
    return get_adapter_model(model, config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)


__all__ = [
    "AdaptedModel",
    "Adapter",
    "AdapterConfig",
    "CheckpointError",
    "ConfigError",
    "ContractError",
    "DataError",
    "LayerOps",
    "LeanError",
    "LoraConfig",
    "MergeError",
    "MergeReport",
    "MinipeftError",
    "RegistryError",
    "StateError",
    "TargetError",
    "families",
    "get_adapter_model",
    "get_lora_model",
    "layers",
    "lean",
    "load_adapter",
    "methods",
    "register_adapter",
    "register_layer",
    "register_method",
    "register_targets",
    "unlean",
]
