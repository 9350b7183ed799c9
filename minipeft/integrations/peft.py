"""Adapted models for tools that know PEFT's alone, and minipeft's fused layer for models that PEFT adapts.

TRL, accelerate and transformers ask ``isinstance(model, peft.PeftModel)``. `as_peft_model` puts an adapted model into one.
Whoever stays with PEFT (``peft_config=`` of TRL's trainers) gets the fused layer by `config`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from types import FunctionType
from typing import Any

import peft
from peft.tuners.lora.layer import Linear, dispatch_default
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from minipeft.config.adapter_config import AdapterConfig
from minipeft.ecosystem.wrapper_names import PREFIX
from minipeft.errors import ConfigError, StateError, shown
from minipeft.files.restore import restore_adapter
from minipeft.files.save import file_config
from minipeft.files.save_pretrained import DEFAULT, SavableModel
from minipeft.injection.module_tree import wrappers_of
from minipeft.integrations.peft_tensors import Holder, trained_in_full
from minipeft.kernels.frozen_linear import can_fuse
from minipeft.kernels.lora_linear import lora_linear


class AdaptedPeftModel(peft.PeftModel):  # type: ignore[misc]
    """A `peft.PeftModel` that holds an adapted model of minipeft's; see `as_peft_model`.

    The verbs that both libraries have are the adapted model's own. What only PEFT has is refused.
    """

    restores_adapters = True  # a plain Trainer reads the one called "default" back by `load_adapter`
    _is_prompt_learning = False
    prefix = "adapters."  # a part of the name of every adapter's parameter

    def __init__(self, model: SavableModel) -> None:
        nn.Module.__init__(self)
        self.base_model = Holder(model)
        self._configs: dict[str, tuple[AdapterConfig, Any]] = {}

    def get_base_model(self) -> Any:
        """The adapted model. PEFT calls what is inside a `PeftModel` its base model, adapters and all."""
        return self.base_model.model

    @property
    def peft_config(self) -> dict[str, Any]:
        """For each adapter the configuration that PEFT would have read from its file."""
        model = self.get_base_model()
        for name, own in model.adapter_configs.items():
            if self._configs.get(name, (None,))[0] is not own:
                values = {**file_config(model, own, name), "inference_mode": own.inference_mode}
                self._configs[name] = own, peft.PeftConfig.from_peft_type(**values)
        return _Configs({name: self._configs[name][1] for name in model.adapter_configs})

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that act now."""
        return self.get_base_model().active_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """The name alone if there is only one."""
        return self.get_base_model().active_adapter

    @property
    def peft_type(self) -> Any:
        """The method of the first adapter, in PEFT's words."""
        return next(iter(self.peft_config.values())).peft_type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_base_model()(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted model's own."""
        return self.get_base_model().generate(*args, **kwargs)

    def add_adapter(
        self, adapter_name: str, peft_config: Any, low_cpu_mem_usage: bool = False, autocast_adapter_dtype: bool = True
    ) -> None:
        """Add an adapter, which does not train until it is told to, as in PEFT.

        With the configuration of an adapter that is here, as `peft_config` gives it, the new one is its exact copy: so TRL
        makes its reference. `low_cpu_mem_usage` changes nothing.

        Raises:
            MinipeftError: see `minipeft.AdaptedModel.add_adapter`.
        """
        model = self.get_base_model()
        own = next((own for own, known in self._configs.values() if known is peft_config), peft_config)
        source = next((name for name, known in model.adapter_configs.items() if known is own), None)
        # As when the source was read from a file, its patterns need not all match.
        model._add(adapter_name, own, autocast_adapter_dtype=autocast_adapter_dtype, every_pattern=source is None)
        if source is not None:
            for _, wrapper in wrappers_of(model, source):
                wrapper.adapters[adapter_name].load_state_dict(wrapper.adapters[source].state_dict())

    def load_adapter(
        self, model_id: str | PathLike[str], adapter_name: str = DEFAULT, is_trainable: bool = False, **options: Any
    ) -> Any:
        """Read an adapter. One of this name that is here gets the values in the file, as in PEFT: so a Trainer resumes.

        Raises:
            CheckpointError: it was saved with another configuration, on another base, or is damaged.
            ConfigError: there are options for one that is here.
        """
        model = self.get_base_model()
        if adapter_name not in model.adapter_configs:
            return model.load_adapter(model_id, adapter_name, is_trainable, **options)
        if options:
            raise ConfigError(f"{shown(list(options))} is for a new adapter, and {adapter_name!r} is here already.")
        restore_adapter(model, adapter_name, str(model_id))
        return model

    def named_parameters(self, prefix: str = "", *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Torch's own. While adapters are merged, what trains in full has PEFT's names, by which TRL sends a model to vLLM."""
        merged = self.get_base_model()._state.merged and not prefix
        names = dict(trained_in_full(self)) if merged else {}
        for name, parameter in super().named_parameters(prefix, *args, **kwargs):
            yield names.get(name, name), parameter

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Torch's own. `peft.set_peft_model_state_dict` gives DoRA's magnitudes the name of a module that PEFT has."""
        by_name = {name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): name for name in state_dict}
        return super().load_state_dict({name: state_dict[own] for name, own in by_name.items()}, *args, **kwargs)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Let this adapter act; in inference mode it does not train. Otherwise whether it trains does not change."""
        self.get_base_model().set_adapter(adapter_name, inference_mode)

    def save_pretrained(
        self, save_directory: Any, *, state_dict: Mapping[str, Tensor] | None = None, **options: Any
    ) -> None:
        """See the adapted model's own method; a `state_dict` of this object is understood, too."""
        if state_dict is not None:
            state_dict = {name.removeprefix(PREFIX): value for name, value in state_dict.items()}
        self.get_base_model().save_pretrained(save_directory, state_dict=state_dict, **options)


class _Configs(dict[str, Any]):
    def __missing__(self, name: str) -> Any:
        raise StateError(
            f"there is no adapter {name!r}, only {shown(list(self))}. TRL trains the one that is called 'default': load or make "
            "it under that name."
        )


def _passed_on(name: str) -> Any:
    """The attribute of the adapted model; PEFT has a method of this name."""

    def method(self: AdaptedPeftModel, *args: Any, **kwargs: Any) -> Any:
        own = getattr(self.get_base_model(), name, None)
        if own is None:
            raise StateError(
                f"{name}() is PEFT's own, and minipeft adapted this model; see the verbs of get_base_model()."
            )
        return own(*args, **kwargs)

    return functools.update_wrapper(method, getattr(peft.PeftModel, name))


for _name in set(dir(peft.PeftModel)) - set(dir(nn.Module)) - set(vars(AdaptedPeftModel)):
    if not _name.startswith("_") and isinstance(inspect.getattr_static(peft.PeftModel, _name), FunctionType):
        setattr(AdaptedPeftModel, _name, _passed_on(_name))


def as_peft_model(model: SavableModel) -> AdaptedPeftModel:
    """The adapted model inside a `peft.PeftModel`, for TRL and whatever else asks for one; nothing is copied.

    Raises:
        ConfigError: the model is not adapted.
    """
    if not isinstance(model, SavableModel):
        raise ConfigError(
            f"as_peft_model takes a model that minipeft has adapted, not {type(model).__name__}; "
            "call get_lora_model(model, LoraConfig(...)) first."
        )
    return AdaptedPeftModel(model)


class FusedLinear(Linear):  # type: ignore[misc]
    """PEFT's LoRA layer on `nn.Linear` and GPT-2's `Conv1D`, computed by `minipeft.kernels.lora_linear` where it is plain LoRA.

    With several adapters at once, a variant, a bias of its own, mixed batches, or when merged, it is PEFT's own code.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        base, weight = self.base_layer, self.base_layer.weight
        weight = weight.t() if isinstance(base, Conv1D) else weight
        plain = len(names) == 1 and not (args or kwargs or self.disable_adapters or self.merged or self.lora_variant)
        if not plain or self.lora_B[names[0]].bias is not None or not can_fuse(x, weight, base.bias):
            return super().forward(x, *args, **kwargs)
        dropout = self.lora_dropout[names[0]]
        probability = dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0
        down, up = self.lora_A[names[0]].weight, self.lora_B[names[0]].weight
        return lora_linear(x, weight, base.bias, down, up, self.scaling[names[0]], probability)


def _fused(target: nn.Module, adapter_name: str, **kwargs: Any) -> nn.Module | None:
    """PEFT's layer for a linear target, fused; None for what else derives from `nn.Linear`, which PEFT then looks at."""
    module = dispatch_default(target, adapter_name, **kwargs) if type(target) in (nn.Linear, Conv1D) else None
    if type(module) is Linear:
        module.__class__ = FusedLinear
    return module


def config(own: AdapterConfig | peft.LoraConfig) -> peft.LoraConfig:
    """A configuration for PEFT (``get_peft_model``, or ``peft_config=`` of TRL's trainers) with minipeft's fused layer.

    Args:
        own: LoRA's options, minipeft's or PEFT's.

    Raises:
        ConfigError: it is the configuration of something else.
    """
    if isinstance(own, AdapterConfig):
        values = {**own.to_dict(), "inference_mode": own.inference_mode}
        own = peft.PeftConfig.from_peft_type(**values)
    if not isinstance(own, peft.LoraConfig):
        raise ConfigError(f"config takes a LoraConfig, minipeft's or PEFT's, not {type(own).__name__}.")
    custom: dict[Any, Callable[..., Any]] = {nn.Linear: _fused, Conv1D: _fused}
    own._register_custom_module(custom)
    return own
