"""Folding adapters into base weights: accumulated in float32, rounded once, checked before anything is written."""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minipeft import registry
from minipeft.adapted import AdaptedLayer, TensorIndex, adapted_layers, wrappers
from minipeft.errors import MergeError, shown
from minipeft.functional import accumulation_dtype
from minipeft.saved_module import SavedModule
from minipeft.undo import Undo, original_weight, remember, total_delta

logger = logging.getLogger("minipeft")
_forward = operator.attrgetter("forward")
PROBE_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}


@dataclass(frozen=True)
class MergeReport:
    """What rounding to the layers' own dtype cost: ``|realised - wanted| / |wanted|`` of each update, Frobenius norms."""

    relative_error: dict[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        """The largest of the errors, 0 where nothing was merged."""
        return max(self.relative_error.values(), default=0.0)

    def __str__(self) -> str:
        where = max(self.relative_error, key=self.relative_error.__getitem__, default="")
        return f"merged {len(self.relative_error)} layers; rounding changed the update by at most {self.worst:.2g}" + (
            f" of its norm ({where})" if where else ""
        )


# ------------------------------------------------------------------------------------------------------- merging
@torch.no_grad()
def merge(model: nn.Module, adapter_names: Iterable[str], *, untie: bool = False, undoable: bool = True) -> MergeReport:
    """Fold the named adapters into the base weights of every layer that has them and has none merged.

    Everything is computed and checked first; an error leaves every weight as it was.

    Raises:
        MergeError: a layer cannot be merged, a value is not finite, or a weight is tied elsewhere and `untie` is False.
    """
    names, index = tuple(adapter_names), TensorIndex(model)
    todo = []
    for path, layer in adapted_layers(model):
        here = tuple(name for name in names if name in layer.adapters)
        if here and not layer.merged:
            todo.append((path, layer, here, *_check(path, layer, here, index, untie, undoable)))
    for _, layer, here, undo, _ in todo:
        for parameter_name, shared in undo.untied.items():
            own = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
            setattr(layer.base_layer, parameter_name, own)
        if undo.untied:
            undo.retie = mark_untied(model)
        weight, bias = merged_weight(layer, here)
        layer.base_layer = layer.ops.write_weight(layer.base_layer, weight, bias)
        layer.merged, layer.undo = here, undo if undoable else None
    report = MergeReport({path: error for path, *_, error in todo})
    if todo:
        logger.info("%s", report)
    return report


def merged_weight(layer: AdaptedLayer, names: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
    """Canonical weight and bias with the named adapters folded in, not yet rounded to the layer's dtype."""
    weight, bias = layer.ops.read_weight(layer.base_layer).detach(), layer.ops.read_bias(layer.base_layer)
    dtype = accumulation_dtype(weight)
    weight, bias = weight.to(dtype), None if bias is None else bias.detach().to(dtype)
    for name in names:
        weight, bias = layer.adapter(name).merge(weight, bias)
    return weight, bias


def _check(
    path: str, layer: AdaptedLayer, names: tuple[str, ...], index: TensorIndex, untie: bool, undoable: bool
) -> tuple[Undo, float]:
    """Compute one layer's merge without writing it: how to undo it, and what rounding costs."""
    base, ops = layer.base_layer, layer.ops
    if not ops.can_merge:
        raise MergeError(
            f"{path}: {ops.__name__} cannot write a merged weight into {type(base).__name__}; nothing was merged."
        )
    weight, bias = ops.read_weight(base).detach(), ops.read_bias(base)
    merged, merged_bias = merged_weight(layer, names)
    rounded, rounded_bias = merged.to(weight.dtype), merged_bias
    if bias is not None and merged_bias is not None:
        rounded_bias = merged_bias.to(bias.dtype)
    for what, tensor in (("weight", rounded), ("bias", rounded_bias)):
        if tensor is not None and not _all_finite(tensor):
            raise MergeError(
                f"{path}: the merged {what} is not finite in {weight.dtype} (adapter {shown(names)}); nothing was merged. "
                "Check the adapter for NaN, or merge in a wider dtype."
            )
    written = [weight] if bias is None or rounded_bias is None or torch.equal(bias, rounded_bias) else [weight, bias]
    undo = Undo(base, None if bias is None else bias.detach().clone(), untied=_ties(path, base, written, index, untie))
    _check_own_forward(path, layer, names)
    adapters = tuple(layer.adapter(name) for name in names)
    update = total_delta(adapters, weight)
    if undoable and not undo.untied:
        remember(undo, weight, rounded, adapters, update)
    wanted = merged - weight if update is None else update.to(merged.dtype)
    return undo, _relative_error(rounded, weight, wanted)


def _ties(
    path: str, base: nn.Module, written: list[Tensor], index: TensorIndex, untie: bool
) -> dict[str, nn.Parameter]:
    """The layer's own parameters that the merge would write and that other modules use too."""
    pointers = {tensor.data_ptr() for tensor in written}
    shared = {}
    for name, parameter in base.named_parameters(recurse=False):
        users = index.also_used_by(base, parameter) if parameter.data_ptr() in pointers else []
        if users and not untie:
            raise MergeError(
                f"{path}.{name} is tied to {shown(users)}, which merging would change as well; nothing was merged. "
                "Pass untie=True to give this layer a weight of its own."
            )
        if users:
            shared[name] = parameter
    return shared


def _check_own_forward(path: str, layer: AdaptedLayer, names: tuple[str, ...]) -> None:
    """A subclass may use its weight in its own way: try the merge on a copy of such a layer, with a random input."""
    base = layer.base_layer
    registered = next((cls for cls, ops in registry.layer_candidates(type(base)) if ops is layer.ops), type(base))
    if _forward(type(base)) is _forward(registered):
        return
    trial = copy.deepcopy(layer).eval()
    trial.switch.active, trial.switch.enabled, trial.merged = names, True, ()
    with torch.random.fork_rng(devices=[]):
        x = layer.ops.example_input(base)
    expected = trial(x)
    weight, bias = merged_weight(trial, names)
    merged = layer.ops.write_weight(trial.base_layer, weight, bias)(x)
    error = float((merged - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    if not error <= PROBE_TOLERANCE[layer.ops.read_weight(base).dtype]:
        raise MergeError(
            f"{path}: {type(base).__name__} has a forward of its own, and with the merged weight its output is off by {error:.2g}; "
            "nothing was merged. Keep the adapter unmerged, or register_layer a LayerOps that knows this layer."
        )


def _all_finite(tensor: Tensor) -> bool:
    # One value that is not finite makes the sum not finite; only a sum that overflows by itself needs the closer look.
    return bool(tensor.sum(dtype=accumulation_dtype(tensor)).isfinite()) or bool(tensor.isfinite().all())


def _relative_error(rounded: Tensor, weight: Tensor, wanted: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(wanted))
    error = float(torch.linalg.vector_norm((rounded.to(wanted.dtype) - weight).sub_(wanted)))
    return error / norm if norm > 0 else error


# ------------------------------------------------------------------------------------------------------- undoing
@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Bring back, bit for bit, every weight that `merge` changed.

    Raises:
        MergeError: a weight has been written, or its dtype changed, since the merge; then every weight stays as it is.
    """
    todo = []
    for path, layer in adapted_layers(model):
        if layer.merged:
            if layer.undo is None:
                raise MergeError(f"{path}: this merge was made for good, and cannot be undone.")
            if layer.undo.base_layer is layer.base_layer and not layer.undo.untied:
                original_weight(path, layer)  # raises here, before any layer has been touched
            todo.append((path, layer))
    for path, layer in todo:
        undo: Undo = layer.undo
        if undo.base_layer is layer.base_layer and not undo.untied:
            layer.ops.write_weight(undo.base_layer, original_weight(path, layer), undo.bias)
        for name, parameter in undo.untied.items():
            setattr(undo.base_layer, name, parameter)
        if undo.retie:
            model.config.tie_word_embeddings = True  # type: ignore[union-attr]
        layer.base_layer, layer.merged, layer.undo = undo.base_layer, (), None


def check_trained_copies(model: nn.Module, names: tuple[str, ...]) -> bool:
    """Look at the modules trained in full; returns whether putting one in place parts it from a tensor it was tied to.

    Raises:
        MergeError: a trained value is not finite.
    """
    index, parts_ties = TensorIndex(model), False
    for path, wrapper in wrappers(model):
        for name in names if isinstance(wrapper, SavedModule) else ():
            for key, tensor in wrapper.file_tensors(name).items():
                if not tensor.isfinite().all():
                    raise MergeError(f"{path}.{key}: the trained values are not finite; nothing was merged.")
                original = wrapper.base_layer.state_dict(keep_vars=True)[key]
                owner = wrapper.base_layer.get_submodule(key.rpartition(".")[0])
                parts_ties |= bool(index.also_used_by(owner, original))
    return parts_ties


def mark_untied(model: nn.Module) -> bool:
    """Tell a transformers config that the output head has a weight of its own now; returns whether it said otherwise."""
    config = getattr(model, "config", None)
    said_tied = getattr(config, "tie_word_embeddings", None) is True
    if said_tied:
        config.tie_word_embeddings = False  # type: ignore[union-attr]
    return said_tied
