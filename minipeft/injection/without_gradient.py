"""Warning of adapters that learn nothing: frozen or quantized after they were made, or without a gradient in ten steps.

A frozen or quantized one is named at the first step. A gradient is missing if the model computes the layer under `torch.no_grad`,
uses its output for nothing that the loss depends on, or never runs it. In one batch that can be right, as for an expert that no
token chose; in ten steps it rarely is.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from collections.abc import Set as AbstractSet

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from minipeft.errors import shown, warn
from minipeft.injection.module_tree import wrappers_of
from minipeft.injection.state import STATE, AdapterState
from minipeft.injection.wrapper import Wrapper

STEPS = 10


class GradientWatch:
    """Looks at an adapter after the first steps of its optimizer: once if every layer has a gradient, else ten times.

    Its optimizer is one that has all of its parameters that train.
    """

    def __init__(self, adapter_name: str) -> None:
        self.name = adapter_name
        self.steps = 0
        self.has_looked = False  # at what requires a gradient
        self.without: set[str] = set()  # names of the layers that got no gradient in any of these steps
        self.others: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # which train something else
        self.is_done = False

    def after_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Look at the adapter, while the gradients are still there."""
        state: AdapterState | None = model.__dict__.get(STATE)
        if state is None or self.name not in state.switch.trainable:  # unloaded, deleted or renamed
            self.is_done = True
        elif self.name in state.switch.learning and optimizer not in self.others:
            layers = {path: _trained(wrapper, self.name) for path, wrapper in wrappers_of(model, self.name)}
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            trained = {id(parameter) for own in layers.values() for parameter in own}
            if not self.has_looked and not held.isdisjoint(trained):
                self.has_looked = True
                _say_frozen(model, state, self.name)
                _say_not_projected(optimizer, trained)
            if held.issuperset(trained):
                self._note_step(layers, state)
            else:
                self.others.add(optimizer)

    def _note_step(self, layers: Mapping[str, list[nn.Parameter]], state: AdapterState) -> None:
        without = {path for path, own in layers.items() if own and all(p.grad is None for p in own)}
        self.without = self.without & without if self.steps else without
        self.steps += 1
        if self.without and self.steps < STEPS:
            return
        self.is_done = True
        said = state.idle.get(self.name, ())
        named = [path for path in layers if path in self.without and path not in said]
        if named and len(self.without) < len(layers):  # without any, something else has the gradients, as shards do
            warn(
                f"{shown(named)}: no gradient came to adapter {self.name!r} there in {STEPS} steps of the optimizer, so it "
                "learns nothing. The model does not run this layer, cuts its gradient (torch.no_grad, detach), or the loss "
                "does not depend on it; leave it out of the targets (exclude_modules), or let the loss depend on it."
            )


WATCHES: weakref.WeakKeyDictionary[nn.Module, dict[str, GradientWatch]] = weakref.WeakKeyDictionary()


def watch_gradients(model: nn.Module, adapter_name: str) -> None:
    """Warn once if an adapter that trains gets no gradient in some layers."""
    WATCHES.setdefault(model, {})[adapter_name] = GradientWatch(adapter_name)
    _listen()


@functools.cache  # once, and for good: torch does not allow a hook to remove itself
def _listen() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Optimizer, *args: object) -> None:
    if not WATCHES or torch.compiler.is_compiling():
        return
    for model, watches in list(WATCHES.items()):
        for name, watch in list(watches.items()):
            if watch.is_done:
                del watches[name]
            else:
                watch.after_step(model, optimizer)


def _say_frozen(model: nn.Module, state: AdapterState, adapter_name: str) -> None:
    """Warn about layers where something has frozen the adapter since it was made, or quantized what it trains."""
    frozen, quantized = [], []
    for path, wrapper in wrappers_of(model, adapter_name):
        own = list(wrapper.trainable_parameters(adapter_name))
        if path in state.kept[adapter_name]:  # a copy that is saved and does not train
            continue
        if any(_is_quantized(parameter) for parameter in own):
            quantized.append(path)
        elif own and not any(parameter.requires_grad for parameter in own):
            frozen.append(path)
    if quantized:
        warn(
            f"{shown(quantized)}: what adapter {adapter_name!r} trains there was quantized after adapting, so it can neither "
            "learn nor be saved. Quantize the base first and adapt it then, or let the quantization pass over the adapters."
        )
    if frozen:
        warn(
            f"{shown(frozen)}: adapter {adapter_name!r} learns nothing there, since something has set requires_grad=False after "
            f"adapting. If it is to learn: for p in model.adapter_parameters({adapter_name!r}): p.requires_grad_(True), and "
            "then make the optimizer."
        )


def _say_not_projected(optimizer: Optimizer, trained: AbstractSet[int]) -> None:
    """Warn about GaLore or APOLLO, which are to project gradients, and project none of what an adapter trains, by id."""
    projected = [group["params"] for group in optimizer.param_groups if "update_proj_gap" in group]
    if projected and trained.isdisjoint(id(parameter) for group in projected for parameter in group):
        warn(
            f"{type(optimizer).__name__} projects the gradients of frozen weights alone, which have none: its optim_target_modules "
            "means nn.Linear modules, and the factors of an adapter are none. They train without a projection, which so small "
            "matrices do not need; take optim='adamw_torch'."
        )


def _is_quantized(parameter: nn.Parameter) -> bool:
    """Whether it holds codes: integers, or a class of torchao's, bitsandbytes' or the like that requires no gradient."""
    is_torchs = type(parameter).__module__.partition(".")[0] == "torch"
    return not parameter.requires_grad and not (is_torchs and parameter.is_floating_point())


def _trained(wrapper: Wrapper, adapter_name: str) -> list[nn.Parameter]:
    return [parameter for parameter in wrapper.trainable_parameters(adapter_name) if parameter.requires_grad]
