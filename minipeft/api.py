"""Everything that ``import minipeft`` offers, in one place. `minipeft.__getattr__` imports it at the first use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from minipeft.config.adapter_config import AdapterConfig, checked_config, config_of_peft
from minipeft.diagnosis.check import Finding
from minipeft.diagnosis.diagnose import diagnose
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
from minipeft.files.load import load_config
from minipeft.injection.many_adapters import per_adapter_loss
from minipeft.injection.step_hooks import after_step, extra_loss
from minipeft.layers.base import LayerOps
from minipeft.memory.dequantize import dequantize
from minipeft.memory.lean import lean, unlean
from minipeft.memory.quantize import quantize
from minipeft.merging.combining.report import CombineReport
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
from minipeft.planning.estimate import Estimate, Planner, Setup
from minipeft.planning.suggest import Suggestion
from minipeft.planning.suggest import suggest as suggested
from minipeft.registry.registry import register_adapter, register_layer, register_method, register_targets


def get_lora_model(
    model: nn.Module, config: object = None, adapter_name: str = "default", *, autocast_adapter_dtype: bool = True
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


def estimate(
    model: Any,
    config: object = None,
    *,
    training: str = "lean",
    checkpointing: str | int | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    batch: int = 1,
    length: int = 512,
    device: str = "cpu",
) -> Estimate:
    """How much memory a training step will take, itemised; no weight is loaded and nothing is computed.

    Args:
        model: a directory or name on the Hub with a ``config.json``, a transformers configuration, or a plain transformers
            model, which is only read.
        config: of the adapter, PEFT's or ours. None: ``LoraConfig(r=8, target_modules="all-linear")``.
        training, checkpointing, dtype, quantize, batch, length, device: see `minipeft.planning.estimate.Setup`.

    Raises:
        MinipeftError: there is no such model, or it cannot be trained so.
    """
    own = checked_config(LoraConfig(r=8, target_modules="all-linear") if config is None else config)
    setup = Setup(training, checkpointing, dtype, quantize, batch, length, device)
    return Planner(model, own, setup, get_adapter_model).estimate()


def suggest(model: Any, *, tokens: int | None = None, text: str | Path | None = None, length: int = 512) -> Suggestion:
    """Settings to begin with, each with its reason: targets, rank, alpha, learning rate, batch and schedule.

    Args:
        model: as `estimate` takes it.
        tokens: to train on, each counted once.
        text: a file whose tokens are counted instead, by the tokenizer of `model`, a directory or name.
        length: tokens in a sequence.

    Returns:
        The choices; ``found["learning_rate"]`` is one's value, and ``found.config`` a `LoraConfig`. The rules are those of
        "LoRA Without Regret" (Schulman et al., 2025), see `minipeft.planning.suggest`.

    Raises:
        MinipeftError: there is no such model, it cannot be adapted, or a value is not allowed.
    """
    return suggested(model, get_adapter_model, tokens, length, text)


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
    "Estimate",
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
    "Suggestion",
    "TargetError",
    "TrainableTokensConfig",
    "VeraConfig",
    "after_step",
    "dequantize",
    "diagnose",
    "estimate",
    "extra_loss",
    "get_adapter_model",
    "get_lora_model",
    "hotswap_adapter",
    "lean",
    "load_adapter",
    "load_config",
    "merge_from_disk",
    "per_adapter_loss",
    "quantize",
    "register_adapter",
    "register_layer",
    "register_method",
    "register_targets",
    "suggest",
    "unlean",
]
