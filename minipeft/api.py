"""Everything that ``import minipeft`` offers, in one place. `minipeft.__getattr__` imports it at the first use."""

from __future__ import annotations

from torch import nn

from minipeft.combining.report import CombineReport
from minipeft.config import AdapterConfig, config_of_peft
from minipeft.diagnosis.diagnose import diagnose
from minipeft.diagnosis.finding import Finding
from minipeft.errors import (
    CheckpointError,
    ConfigError,
    ContractError,
    DataError,
    LeanError,
    MergeError,
    MinipeftError,
    RegistryError,
    RequestError,
    StateError,
    TargetError,
)
from minipeft.files.hotswap import hotswap_adapter
from minipeft.injection.row_losses import per_adapter_loss
from minipeft.layers.base import LayerOps
from minipeft.memory.lean import lean, unlean
from minipeft.merging.from_disk.merge import merge_from_disk
from minipeft.merging.report import MergeReport
from minipeft.methods.adalora_config import AdaLoraConfig
from minipeft.methods.base import Adapter
from minipeft.methods.ia3 import IA3Config
from minipeft.methods.loha import LoHaConfig
from minipeft.methods.lokr import LoKrConfig
from minipeft.methods.lora_config import LoraConfig
from minipeft.methods.oft import OFTConfig
from minipeft.methods.trainable_tokens import TrainableTokensConfig
from minipeft.methods.vera import VeraConfig
from minipeft.model import AdaptedModel, get_adapter_model, load_adapter
from minipeft.quantization.dequantize import dequantize
from minipeft.quantization.quantize import quantize
from minipeft.registry import register_adapter, register_layer, register_method, register_targets
from minipeft.step_hooks import after_step, extra_loss


def get_lora_model(
    model: nn.Module,
    config: object = None,
    adapter_name: str = "default",
    *,
    autocast_adapter_dtype: bool = True,
) -> AdaptedModel:
    """Adapt a model in place with LoRA and freeze its base; see `get_adapter_model`. PEFT's configuration is taken, too.

    Without one it is ``LoraConfig()``.

    Raises:
        MinipeftError: a value, pattern or layer cannot be used; the model is unchanged, bit for bit.
    """
    config = LoraConfig() if config is None else config_of_peft(config)
    if not isinstance(config, LoraConfig):
        raise ConfigError(
            f"get_lora_model takes a LoraConfig, not {type(config).__name__}; get_adapter_model takes the configuration of any method."
        )
    return get_adapter_model(model, config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)


__all__ = [
    "AdaLoraConfig",
    "AdaptedModel",
    "Adapter",
    "AdapterConfig",
    "CheckpointError",
    "CombineReport",
    "ConfigError",
    "ContractError",
    "DataError",
    "Finding",
    "IA3Config",
    "LayerOps",
    "LeanError",
    "LoHaConfig",
    "LoKrConfig",
    "LoraConfig",
    "MergeError",
    "MergeReport",
    "MinipeftError",
    "OFTConfig",
    "RegistryError",
    "RequestError",
    "StateError",
    "TargetError",
    "TrainableTokensConfig",
    "VeraConfig",
    "after_step",
    "dequantize",
    "diagnose",
    "extra_loss",
    "get_adapter_model",
    "get_lora_model",
    "hotswap_adapter",
    "lean",
    "load_adapter",
    "merge_from_disk",
    "per_adapter_loss",
    "quantize",
    "register_adapter",
    "register_layer",
    "register_method",
    "register_targets",
    "unlean",
]
