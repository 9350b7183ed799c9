"""Whether a merge into one layer would hold: the adapters commute, and the layer stores its weight and computes what they do."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from minipeft.errors import MergeError, shown
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.rollback import unchanged_afterwards
from minipeft.kernels.generators import generators_kept
from minipeft.layers.base import LayerOps, has_own_forward
from minipeft.layers.offloaded import HOOK
from minipeft.layers.uncalled import UncalledOps

TRIAL_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def check_stored(path: str, layer: AdaptedLayer, owner: nn.Module, written: list[Tensor]) -> None:
    """Raise MergeError if the weight, or a bias in `written`, is computed or was replaced since: what a merge writes would be lost."""
    ops = layer.ops
    if isinstance(ops, UncalledOps):
        accepted = type(owner._parameters.get(ops.parameter)) is nn.Parameter
    else:
        accepted = ops.accepts(owner)
    if not accepted:
        raise MergeError(
            f"{path}: the weight of this {type(owner).__name__} is no longer a plain parameter that a merge can write: "
            "pruning, a parametrization, sharding or a quantization was applied after adapting. Undo that first."
        )
    own = type(layer.ops).read_bias is LayerOps.read_bias  # otherwise its ops know better than we do
    if len(written) > 1 and own and owner._parameters.get("bias") is None:
        raise MergeError(
            f"{path}: the bias of this {type(owner).__name__} is computed (by pruning or a parametrization), so a "
            "merge cannot write it. Undo that first."
        )


def check_by_trial(path: str, layer: AdaptedLayer, names: tuple[str, ...]) -> None:
    """Raise MergeError if the merged layer would compute something else for a random input, or that fails.

    It is tried if a subclass, a hook or a patched forward may use the weight in its own way. Hooks are called in evaluation mode;
    the layer's weights stay as they are.
    """
    base = layer.base_layer
    attached = "forward" in vars(base) or bool(base._forward_hooks or base._forward_pre_hooks)
    if not attached and not has_own_forward(layer.ops, base):
        return
    if isinstance(layer.ops, UncalledOps) or layer.ops.is_quantized:
        return  # a weight that is read is the merged one at every call; a quantized layer with hooks is refused elsewhere
    what = "has hooks or a patched forward" if attached else "has a forward of its own"
    try:
        error = output_error(layer, names, functools.partial(_with_merged_weight, layer, names))
    except Exception as raised:
        raise MergeError(
            f"{path}: {type(base).__name__} {what}, and trying the merge on a random input failed "
            f"({type(raised).__name__}: {raised!s:.200}). Keep the adapter unmerged, or remove what is attached."
        ) from raised
    if not error <= TRIAL_TOLERANCE[layer.ops.read_weight(base).dtype]:
        raise MergeError(
            f"{path}: {type(base).__name__} {what}, and with the merged weight its output is off by {error:.2g}. Keep the "
            "adapter unmerged, or register_layer a LayerOps that knows this layer."
        )


def check_own_forward(path: str, layer: AdaptedLayer) -> None:
    """Raise MergeError if someone gave the adapted layer itself another forward, which would go with the adapter."""
    if "forward" in vars(layer) and HOOK not in vars(layer):  # accelerate's only moves tensors
        raise MergeError(
            f"{path}: this {type(layer.owner).__name__} was given another forward after it was adapted, which would be lost. Take "
            "it back (del layer.forward), or call merge_adapter(), after which the layer still has it."
        )


def output_error(layer: AdaptedLayer, names: tuple[str, ...], merged: Callable[[Tensor], Tensor]) -> float:
    """The largest difference between the outputs of `merged` and of a layer with these adapters, as a share of the largest output.

    Both get the same random input, in eval mode, without advancing torch's random generator.
    """
    parts = [part for module in (layer.base_layer, *map(layer.adapter, names)) for part in module.modules()]
    with unchanged_afterwards(*parts):
        for part in parts:
            part.training = False
        with generators_kept():
            x = layer.ops.example_input(layer.base_layer)
        expected = layer.run_with(names, x)
        found = merged(x).to(expected.dtype)
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def _with_merged_weight(layer: AdaptedLayer, names: tuple[str, ...], x: Tensor) -> Tensor:
    base = layer.base_layer
    bare = _without_hooks(base)
    written = layer.ops.write_weight(bare, *layer.folded(names))
    # Called as the layer itself: a patched forward may hold the module that it was made for.
    result: Tensor = functional_call(base, dict(written.named_parameters()), (x,)) if written is bare else written(x)
    return result


def _without_hooks(base: nn.Module) -> nn.Module:
    """A copy whose hooks and patched forward, which may hold anything, are not copied."""
    left_out: dict[int, object] = {id(getattr(base, hooks)): {} for hooks in HOOKS}
    left_out |= {id(vars(base)[name]): None for name in ("forward", HOOK) if name in vars(base)}
    return copy.deepcopy(base, left_out)


def check_order(path: str, layer: AdaptedLayer, names: tuple[str, ...], *, permanent: bool) -> None:
    """Raise MergeError if merging these adapters, in this order, would change what all active ones do together.

    Merged adapters act before the others, so two that change places must both add to the weight (see `Adapter.adds`).
    Adapters that are not active come after those that are. After a permanent merge no other adapter acts.
    """
    if permanent and len(names) == 1:
        return
    active = [name for name in layer.switch.active if name in layer.parts]
    left_out = () if permanent else tuple(name for name in active if name not in names)
    if len(names + left_out) == 1:
        return
    readers = [name for name in names + left_out if layer.adapter(name).overrides("merge_after")]
    if left_out and readers:
        raise MergeError(
            f"{path}: {shown(readers)} depends on the base weight, so {shown(names)} cannot be merged "
            f"without {shown(left_out)}."
        )
    place = {name: number for number, name in enumerate(dict.fromkeys((*active, *names)))}
    acting = names + left_out
    for number, first in enumerate(acting):
        for second in acting[number + 1 :]:
            if place[first] > place[second] and not (_adds(layer, first) and _adds(layer, second)):
                raise MergeError(
                    f"{path}: {second!r} acts before {first!r}, and the two do not commute, so {first!r} cannot be merged "
                    f"first. Merge them in the order in which they act ({shown(active)}), or call set_adapter first."
                )


def _adds(layer: AdaptedLayer, name: str) -> bool:
    return layer.adapter(name).adds(layer.ops.read_weight(layer.base_layer).detach())
