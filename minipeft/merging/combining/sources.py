"""What is combined: the updates that several adapters make to each layer, all checked; the model is only read."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minipeft.errors import StateError, TargetError, shown
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.module_tree import wrappers
from minipeft.injection.wrapper import Wrapper
from minipeft.kernels.functional import is_finite
from minipeft.layers.offloaded import check_values_here
from minipeft.methods.base import Adapter


@dataclass(frozen=True)
class Update:
    """One adapter's update of one layer, and its weight in the sum."""

    name: str
    weight: float
    adapter: Adapter
    layer: AdaptedLayer

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """See `Adapter.stacked_factors`."""
        return self.adapter.stacked_factors()

    def dense(self) -> Tensor:
        """The whole update, shape (matrices, out, in)."""
        factors = self.factors()
        if factors is not None:
            return factors[0] @ factors[1]
        update = self.adapter.delta(self.layer.ops.read_weight(self.layer.base_layer).detach())
        assert update is not None
        return update.unsqueeze(0)

    def bias(self) -> Tensor | None:
        """What is added to the layer's bias, shape (out,), or None."""
        nothing = next(self.adapter.parameters()).new_zeros(self.layer.ops.shape(self.layer.base_layer)[0])
        bias = self.adapter.merge_bias(nothing)
        return None if bias is nothing else bias


def sources(model: nn.Module, weights: Mapping[str, float], *, different_targets: bool) -> dict[str, list[Update]]:
    """The updates of these adapters, by the name of the layer that each is on, in the model's and the adapters' order.

    `weights`: adapter name -> its weight in the sum.

    Raises:
        StateError: an adapter does more than add to weights, a value is not finite, or accelerate offloads it.
        TargetError: the adapters are on different layers.
    """
    found: dict[str, list[Update]] = {}
    followed: dict[frozenset[int], str] = {}  # the parameters of an adapter -> a layer that shares it
    for path, wrapper in wrappers(model):
        updates = _updates(path, wrapper, weights)
        following = [update for update in updates if update.name in update.layer.tied_adapters]
        followed |= {parameters_of(update.adapter): path for update in following}
        if following and len(following) < len(updates):
            raise _unevenly_tied(path, following, updates)
        if updates and not following:
            found[path] = updates
    for path, updates in found.items():
        leading = [update for update in updates if parameters_of(update.adapter) in followed]
        if leading and len(leading) < len(updates):
            raise _unevenly_tied(path, leading, updates)
    _check_targets(found, weights, different_targets)
    return found


def _updates(path: str, wrapper: Wrapper, weights: Mapping[str, float]) -> list[Update]:
    """The updates of these adapters on one layer, each checked."""
    here = [name for name in weights if name in wrapper.adapters]
    if not here:
        return []
    if not isinstance(wrapper, AdaptedLayer):
        raise StateError(
            f"{path}: adapter {here[0]!r} trains this module in full, and a low-rank adapter cannot hold a sum of such "
            "modules. Leave it out, or train it without modules_to_save and bias='all'."
        )
    updates = [Update(name, weights[name], wrapper.adapter(name), wrapper) for name in here]
    for update in updates:
        _check(path, update)
    return updates


def parameters_of(adapter: Adapter) -> frozenset[int]:
    """What tells an adapter, and those that it is tied to, from others: ids of its parameters."""
    return frozenset(map(id, adapter.parameters()))


def _unevenly_tied(path: str, sharing: list[Update], updates: list[Update]) -> TargetError:
    others = [update.name for update in updates if update not in sharing]
    return TargetError(
        f"{path}: adapter {shown(u.name for u in sharing)} shares its update with the layers tied to this one "
        f"(ensure_weight_tying), and {shown(others)} does not."
    )


def _check(path: str, update: Update) -> None:
    adapter, layer = update.adapter, update.layer
    if adapter.key_prefix or adapter.overrides("changed_rows"):
        raise StateError(
            f"{path}: adapter {update.name!r} trains rows of tokens here, which a low-rank adapter cannot hold. Leave it "
            "out, or train it without tokens."
        )
    check_values_here(path, adapter)
    if not all(map(is_finite, adapter.parameters())):
        raise StateError(f"{path}: adapter {update.name!r} has values that are not finite.")
    if adapter.stacked_factors() is None and not adapter.adds(layer.ops.read_weight(layer.base_layer).detach()):
        raise StateError(
            f"{path}: adapter {update.name!r} ({type(adapter).__name__}) multiplies what is there instead of adding to it, "
            "so what it does is no term of a weighted sum. Merge it into the base, or leave it out."
        )


def _check_targets(found: Mapping[str, list[Update]], weights: Mapping[str, float], different_targets: bool) -> None:
    lacks = {
        name: [path for path, updates in found.items() if name not in {u.name for u in updates}] for name in weights
    }
    missing = {name: paths for name, paths in lacks.items() if paths}
    if missing and not different_targets:
        said = "; ".join(f"{name!r} is not on {shown(paths, 3)}" for name, paths in missing.items())
        raise TargetError(
            f"the adapters are on different layers: {said}. Pass different_targets=True to take an update that is not there "
            "for zero."
        )


def widest(found: Mapping[str, list[Update]]) -> torch.dtype:
    """The dtype that holds the parameters of all of them."""
    dtypes = {p.dtype for updates in found.values() for update in updates for p in update.adapter.parameters()}
    return functools.reduce(torch.promote_types, dtypes)
