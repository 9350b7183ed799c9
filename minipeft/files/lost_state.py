"""What no adapter's file will hold: changes of the base, and layers that were replaced. Said when an adapter is saved."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize, prune

from minipeft.errors import shown, warn
from minipeft.injection.base_state import base_modules, buffer_samples, changed_buffers
from minipeft.injection.module_tree import adapters_of, wrappers_of
from minipeft.injection.modules_to_save import SavedModule, copy_tensors
from minipeft.injection.state import state_of
from minipeft.injection.wrapper import Wrapper


def warn_of_lost_state(model: nn.Module) -> None:
    """Warn about parameters of the base that were unfrozen by hand, buffers that changed, and adapted layers that are gone."""
    state = state_of(model)
    here = set(map(id, model.modules()))
    for adapter_name, places in state.places.items():
        parts = {id(module) for module, _ in places}
        if gone := len(parts - here):
            warn(
                f"{gone} of the {len(parts)} parts of adapter {adapter_name!r} are no longer in the model, since layers were replaced "
                "or removed after adapting. Its file lacks them, and fits only a model without these layers."
            )
    modules = base_modules(model)
    unfrozen = [
        f"{name}.{key}" if name else key
        for name, module in modules.items()
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    if unfrozen:
        _warn(unfrozen, "of the base train (requires_grad is True)")
    changed = changed_buffers(state.buffers, buffer_samples(modules))
    if changed:
        _warn(changed, "of the base changed since it was adapted")


def warn_of_scale(model: nn.Module, adapter_name: str) -> None:
    """Warn about an adapter that `set_scale` lets act with another strength than its file will say."""
    scales = {
        path: adapter.strength for path, adapter in adapters_of(model, adapter_name).items() if adapter.strength != 1
    }
    if scales:
        warn(
            f"saving adapter {adapter_name!r}: set_scale lets it act with {shown(sorted(set(scales.values())), 3)} of its "
            f"update on {shown(scales, 2)}, and the file holds it at full strength. convert_to_lora=True saves it as it acts."
        )


def warn_of_computed(model: nn.Module, adapter_name: str) -> None:
    """Warn about parts of an adapter that pruning or a parametrization computes since the model was adapted: no file says so."""
    gone = [name for module, name in state_of(model).places[adapter_name] if name not in module._parameters]
    if not gone:  # as nearly always, and found without a walk
        return
    computed = [path for path, wrapper in wrappers_of(model, adapter_name) if _is_computed(wrapper, adapter_name)]
    if computed:
        warn(
            f"saving adapter {adapter_name!r}: what trains at {shown(computed)} is computed, by pruning or a parametrization that was put "
            "on it after adapting. The file may hold older values, or not load. Save again after torch.nn.utils.prune.remove() or "
            "parametrize.remove_parametrizations()."
        )


def _is_computed(wrapper: Wrapper, adapter_name: str) -> bool:
    part = wrapper.parts[adapter_name]
    if isinstance(wrapper, SavedModule):
        return copy_tensors(part, wrapper.only).keys() != copy_tensors(wrapper.base_layer, wrapper.only).keys()
    if prune.is_pruned(part):
        return True
    return parametrize.is_parametrized(part) and any(
        "parametrizations." in key for key in wrapper.file_tensors(adapter_name)
    )


def _warn(names: list[str], fact: str) -> None:
    modules = sorted({name.rpartition(".")[0] for name in names} - {""})
    warn(
        f"{shown(names)} {fact}. That is no part of the adapter, so its file does not hold it. To train and save these "
        f"modules too, name them in modules_to_save: {shown(modules)}."
    )
