"""An adapted model where PEFT looks for its tuner, and where it finds the tensors of an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from minipeft.ecosystem.wrapper_names import wrapper_class
from minipeft.errors import ConfigError, StateError
from minipeft.files.save import is_gathered_elsewhere, named_tensors, tensors_from_state
from minipeft.files.save_pretrained import DEFAULT, SavableModel
from minipeft.injection.modules_to_save import SavedModule


class Holder(AuxiliaryTrainingWrapper):  # type: ignore[misc]
    """What PEFT calls the tuner: the model under ``model``, and its attributes.

    PEFT asks a module of this class for its adapter's tensors, so `peft.get_peft_model_state_dict` and its counterpart,
    by which FSDP saves, find ours.
    """

    def __init__(self, model: SavableModel) -> None:
        nn.Module.__init__(self)
        self.model = model

    def adapter_state_dict(self, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values that a state of this module holds for an adapter, with their keys in PEFT's file after its name.

        Raises:
            ConfigError: the adapter trains biases of the base, among which PEFT would count those that we keep beside ours.
        """
        if is_gathered_elsewhere(state_dict):
            return {}
        model: Any = self.model
        if getattr(model.adapter_configs[adapter_name], "bias", "none") != "none":
            raise ConfigError(
                f"PEFT cannot tell which biases of {adapter_name!r} train; get_base_model().adapter_state_dict() can."
            )
        state = {name.removeprefix("model."): value for name, value in state_dict.items()}
        tensors = tensors_from_state(model, model.adapter_state_dict(adapter_name), state)
        return {_after_base_model(key): tensor for key, tensor in tensors.items()}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """For each of those keys the name in a state of this module.

        Raises:
            StateError: the first FSDP is inside, whose names PEFT does not know; it would set nothing and say nothing.
        """
        if any(wrapper_class(module) == "FullyShardedDataParallel" for module in self.modules()):
            raise StateError(
                "PEFT cannot set the tensors of an adapter inside the first FSDP. Give the trainer the adapted model itself "
                "instead of as_peft_model(model), or use FSDP2 (fsdp_version: 2)."
            )
        names = {id(tensor): f"model.{name}" for name, tensor in named_tensors(self.model)}
        tensors = self.model.adapter_state_dict(adapter_name)
        return {_after_base_model(key): names[id(tensor)] for key, tensor in tensors.items() if id(tensor) in names}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            return getattr(nn.Module.__getattr__(self, "model"), name)


def trained_in_full(root: nn.Module) -> Iterator[tuple[str, str]]:
    """(name, PEFT's name) of what is called now of each module that is trained in full, and of the original that is not."""
    for path, module in root.named_modules():
        here = module.current() if isinstance(module, SavedModule) else None
        if here is None or here is module.base_layer:
            continue
        adapter = next(name for name, own in module.adapters.items() if own is here)
        for name, parameter in module.base_layer.named_parameters():
            if here.get_parameter(name) is not parameter:
                yield f"{path}.base_layer.{name}", f"{path}.original_module.{name}"
                yield f"{path}.adapters.{adapter}.{name}", f"{path}.modules_to_save.{DEFAULT}.{name}"


def _after_base_model(key: str) -> str:
    return key.removeprefix("base_model.")
