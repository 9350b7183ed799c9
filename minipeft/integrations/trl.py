"""Adapted models in TRL's trainers, which know adapters only as PEFT's."""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

from torch import nn

from minipeft.config.adapter_config import AdapterConfig
from minipeft.errors import ConfigError, StateError, shown
from minipeft.files.save_pretrained import SavableModel

WITHOUT_REFERENCE = frozenset({"SFTTrainer", "RewardTrainer"})  # these train an adapted model as it is


def arguments_for_trl(trainer: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a trainer of TRL's, by name, with an adapted model as TRL wants it: inside a `peft.PeftModel`.

    So DPO, KTO, GRPO and RLOO take the adapter as it is now for their reference, where they would load the base again.

    Raises:
        ConfigError: ``peft_config`` is one of ours, which TRL does not take.
        StateError: a reference model is passed along; the adapters do not have the names that TRL gives them; or PEFT is
            not installed and the trainer needs a reference.
    """
    given = inspect.signature(trainer).bind_partial(*args, **kwargs).arguments
    given = {**given, **given.pop("kwargs", {})}
    config = given.get("peft_config")
    if isinstance(config, AdapterConfig):
        raise ConfigError(
            f"peft_config: TRL takes PEFT's configurations, not minipeft's {type(config).__name__}. Adapt the model first and leave "
            "peft_config out; for LoRA, minipeft.integrations.peft.config(...) makes one of PEFT's."
        )
    model = given.get("model")
    if not isinstance(model, nn.Module) or not isinstance(model, SavableModel):
        return given
    if given.get("ref_model") is not None:
        raise StateError("ref_model is not needed: the reference is the adapter as it is now. Leave ref_model out.")
    names = list(model.peft_config)  # type: ignore[arg-type]
    if "default" not in names or "ref" in names:
        raise StateError(
            f"TRL trains the adapter 'default' and makes a reference of it, 'ref'; this model has {shown(names)}. Load or "
            "make the adapter to train under the name 'default'."
        )
    if importlib.util.find_spec("peft") is None:
        if any(base.__name__ in WITHOUT_REFERENCE for base in trainer.__mro__):
            return given
        raise StateError(
            f"{trainer.__name__} compares with a reference, which TRL takes from PEFT's models: pip install peft."
        )
    from minipeft.integrations.peft import as_peft_model

    return {**given, "model": as_peft_model(model)}
