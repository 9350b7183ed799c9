"""Names of PEFT and transformers: they work if they mean the same here, and else raise an error with our name."""

from __future__ import annotations

from typing import Any, NoReturn

from typing_extensions import Self

from minipeft.config.adapter_config import AdapterConfig
from minipeft.errors import StateError, all_or_nothing
from minipeft.injection.manageable_model import ManageableModel
from minipeft.injection.own_methods import Configurations


class OtherNames(ManageableModel):
    """The part of `minipeft.AdaptedModel` with names from PEFT and transformers."""

    @property
    def peft_config(self) -> dict[str, AdapterConfig]:
        """PEFT's name for `adapter_configs`; PEFT itself would write its own configuration into it."""
        return Configurations(self._state.configs)

    @peft_config.deleter
    def peft_config(self) -> None:
        """Diffusers' way to unload a text encoder, in a pipeline's ``unload_lora_weights``."""
        model: Any = self
        model.unload()

    @property
    def active_adapter(self) -> str | list[str]:
        """`active_adapters` as PEFT's attribute has it: the name alone if there is only one."""
        names = list(self._state.switch.active)
        return names[0] if len(names) == 1 else names

    @property
    def active_peft_config(self) -> AdapterConfig:
        """PEFT's: the configuration of the active adapter; of several that act, of the first."""
        return self._state.configs[self._state.switch.active[0]]

    @property
    def targeted_module_names(self) -> list[str]:
        """PEFT's: the names of the layers that have an adapter."""
        return list(dict.fromkeys(row.layer for row in self.layer_status() if row.method != "full"))

    def get_base_model(self) -> Self:
        """PEFT's: what is inside its wrapper, adapters and all. Here there is no wrapper; `unload` gives the base."""
        return self

    @all_or_nothing
    def disable_adapters(self) -> None:
        """Transformers' verb: no adapter acts until `enable_adapters`.

        Raises:
            StateError: an adapter is merged; `disable_adapter` takes it out for a while.
        """
        self._state.check_unmerged()
        self._state.switch.turn(False)

    def enable_adapters(self) -> None:
        """Transformers' verb: the active adapters act again."""
        self._state.switch.turn(True)

    # PEFT's names for the two.
    disable_adapter_layers, enable_adapter_layers = disable_adapters, enable_adapters

    def get_layer_status(self) -> NoReturn:
        """PEFT's, with other rows than ours.

        Raises:
            StateError: always, with the name of ours; and so do the methods below.
        """
        raise StateError("get_layer_status() is PEFT's; call layer_status(), a row for each adapter on each layer.")

    def get_model_status(self) -> NoReturn:
        """PEFT's, with other fields than ours."""
        raise StateError("get_model_status() is PEFT's; call adapter_status(), a row for each adapter.")

    def set_requires_grad(self, *args: Any, **kwargs: Any) -> NoReturn:
        """PEFT's, which `set_adapter` would undo there."""
        raise StateError("set_requires_grad() is PEFT's; call train_adapters(names) to say which adapters train.")

    def enable_peft_hotswap(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Transformers', for PEFT's adapters."""
        raise StateError("enable_peft_hotswap() is for PEFT's adapters; call prepare_hotswap(max_rank).")

    def update_and_allocate(self, *args: Any, **kwargs: Any) -> NoReturn:
        """PEFT's, of AdaLoRA, whose loss there has the regularisation in it."""
        raise StateError(
            "update_and_allocate() is PEFT's; call after_step(model, step), and add extra_loss(model) to the loss. Both are minipeft's."
        )
