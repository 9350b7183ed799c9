"""Weights that several modules share: what merging into one module would do to the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from minipeft.errors import MergeError, shown
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.module_tree import TensorIndex, wrappers_of
from minipeft.injection.modules_to_save import SavedModule, copy_tensors
from minipeft.kernels.functional import is_finite


def tied_layers(
    layer: AdaptedLayer, names: tuple[str, ...], others: Sequence[AdaptedLayer]
) -> tuple[AdaptedLayer, ...]:
    """The other layers that share the weight and these adapters, so merging into one layer merges into all."""
    weight = layer.owner._parameters.get("weight") if others else None
    if weight is None:
        return ()
    return tuple(
        other
        for other in others
        if other is not layer
        and other.owner._parameters.get("weight") is weight
        and all(_held(other, name) == _held(layer, name) for name in names)
    )


def _held(layer: AdaptedLayer, name: str) -> set[int] | None:
    return {id(p) for p in layer.adapter(name).parameters()} if name in layer.adapters else None


def adapts_tied_layers(layer: AdaptedLayer, names: Iterable[str]) -> bool:
    """Whether one of these adapters is here and may also be on layers tied to this one."""
    return any(layer.adapter(name).is_tied for name in names if name in layer.parts)


def shared_parameters(
    path: str, owners: Sequence[nn.Module], written: list[Tensor], index: TensorIndex, untie: bool
) -> dict[str, nn.Parameter]:
    """The parameters of the first of these modules that its merge would write and that other modules use too.

    Raises MergeError if there are some and `untie` is False.
    """
    shared: dict[str, nn.Parameter] = {}
    if not index.is_shared:  # as in most models
        return shared
    pointers = {tensor.data_ptr() for tensor in written}
    for name, parameter in owners[0]._parameters.items():
        if parameter is None or parameter.data_ptr() not in pointers:
            continue
        users = index.also_used_by(parameter, *owners)
        if users and not untie:
            raise MergeError(
                f"{path}.{name} is tied to {shown(users)}, which merging would change as well. "
                "Pass untie=True to give this layer its own weight."
            )
        if users:
            shared[name] = parameter
    return shared


def check_trained_copies(model: nn.Module, names: tuple[str, ...], outside: Iterable[tuple[str, nn.Module]]) -> bool:
    """Whether a module trained in full, among the model's `outside_adapters`, is tied, so that putting it in place unties it.

    Raises MergeError if a trained value is not finite.
    """
    copied = [(path, module) for path, module in outside if isinstance(module, SavedModule)]
    if not copied:
        return False
    index, unties = TensorIndex(model), False
    for path, wrapper in copied:
        for name in names:
            for key, tensor in wrapper.file_tensors(name).items():
                if not is_finite(tensor):
                    raise MergeError(f"{path}.{key}: the trained values are not finite.")
                original, inside = copy_tensors(wrapper.base_layer, wrapper.only)[key], wrapper.base_layer.modules()
                unties |= bool(index.also_used_by(original, *inside, *_followers(model, name, tensor)))
    return unties


def _followers(model: nn.Module, adapter_name: str, trained: Tensor) -> list[nn.Module]:
    """The modules that use this trained tensor in place of their own weight, so that they stay tied to it."""
    copies = [(wrapper.base_layer, wrapper.adapters[adapter_name]) for _, wrapper in wrappers_of(model, adapter_name)]
    return [base for base, copy in copies if any(tensor is trained for tensor in copy.parameters())]


def cut_remaining_ties(model: nn.Module) -> None:
    """Give every module that shares a parameter its own: the model's config says now that nothing is tied.

    Where several modules share a table and one of them was untied, transformers would find no weight for the others when
    it loads the merged model.
    """
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in seen:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            seen.add(id(parameter))
