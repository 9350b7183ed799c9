"""Giving one module the values of another of its kind, in the tensors that it has."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from minipeft.errors import told

NUMBERS = (bool, int, float, str)
# Attributes that say nothing of what a module computes.
OF_THE_LIBRARY = {"training", "is_vacant", "strength", "full_scaling"}


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers, saved or not, by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def numbers_of(module: nn.Module) -> dict[str, object]:
    """A module's attributes that are numbers, texts, or lists of them, by name; the scaling as the configuration says it."""
    own = vars(module)
    if "full_scaling" in own:
        own = {**own, "scaling": own["full_scaling"]}
    return {k: v for k, v in own.items() if not k.startswith("_") and _is_number(v) and k not in OF_THE_LIBRARY}


def _is_number(value: object) -> bool:
    return all(map(_is_number, value)) if isinstance(value, tuple | list) else isinstance(value, NUMBERS)


def unlike(here: nn.Module, there: nn.Module, but: Collection[str] = ()) -> str:
    """What differs between two modules besides the values of tensors, or ""; `but` names what is not compared."""
    if type(here) is not type(there):
        return f"it is {type(there).__name__} there and {type(here).__name__} here"
    ours, theirs = tensors_of(here), tensors_of(there)
    if odd := sorted((ours.keys() ^ theirs.keys()) - set(but)):
        return f"{odd[0]} is only {'there' if odd[0] in theirs else 'here'}"
    for name in ours.keys() - set(but):
        if ours[name].shape != theirs[name].shape:
            return f"{name} is {list(theirs[name].shape)} there and {list(ours[name].shape)} here"
    own, other = numbers_of(here), numbers_of(there)
    for name in sorted(own.keys() | other.keys() - set(but)):
        if name not in but and own.get(name) != other.get(name):
            return f"{name} is {told(other.get(name))} there and {told(own.get(name))} here"
    return ""


def copy_tensors(here: nn.Module, there: nn.Module, but: Collection[str] = ()) -> None:
    """Copy the values of all tensors, but for these."""
    theirs = tensors_of(there)
    for name, tensor in tensors_of(here).items():
        if name not in but:
            tensor.copy_(theirs[name])
