"""The view of a model that minipeft has adapted."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from minipeft.diagnosis.view import Part, View, unknown
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.fresh_parts import base_parameters
from minipeft.injection.module_tree import candidates, wrappers
from minipeft.injection.state import AdapterState, state_of
from minipeft.injection.watch import idle_layers
from minipeft.injection.wrapper import innermost
from minipeft.kernels.products import product_norm
from minipeft.layers.offloaded import present
from minipeft.methods.input_dropout import InputDropout


def our_view(model: nn.Module, root: nn.Module) -> View:
    """The view of `root`, which holds the adapters, called as `model`."""
    state = state_of(root)
    base = {name: parameter for name, _, parameter in base_parameters(root, candidates(root))}
    return View(
        model=model,
        root=root,
        others=(state, state.switch),
        parts=list(_parts(root, state)),
        configs=state.configs,
        active=state.switch.active,
        disabled=not state.switch.enabled,
        base=base,
        idle=functools.partial(idle_layers, root, state.switch.active),
    )


def _parts(root: nn.Module, state: AdapterState) -> Iterator[Part]:
    for layer, wrapper in wrappers(root):
        for name in state.configs:
            if name not in wrapper.adapters:
                continue
            active = name in state.switch.active
            if not isinstance(wrapper, AdaptedLayer):
                held = {k: t for k, t in wrapper.file_tensors(name).items() if isinstance(t, nn.Parameter)}
                yield Part(
                    adapter=name,
                    layer=layer,
                    module=wrapper,
                    base=innermost(wrapper),
                    parameters=held,
                    active=active,
                    is_full=True,
                )
            elif wrapper.owns(name):
                yield _adapter(layer, wrapper, name, active)


def _adapter(layer: str, wrapper: AdaptedLayer, name: str, active: bool) -> Part:
    adapter = wrapper.adapter(name)
    there = not any(parameter.is_meta for parameter in adapter.parameters())
    factors = dict(adapter.named_parameters(recurse=False))
    pair = None
    if factors.keys() >= {"lora_A", "lora_B"} and not wrapper.ops.is_embedding:
        pair = factors["lora_A"].detach().flatten(1), factors["lora_B"].detach().flatten(1)
    return Part(
        adapter=name,
        layer=layer,
        module=wrapper,
        base=innermost(wrapper),
        parameters=dict(adapter.named_parameters()),
        active=active,
        merged=name in wrapper.merged,
        scaling=adapter.scaling,
        pair=pair,
        dropout=adapter.drop_rate if isinstance(adapter, InputDropout) else 0.0,
        drops=isinstance(adapter, InputDropout) and adapter.drops > 0,
        is_zero=functools.partial(_is_zero, wrapper, name) if there else unknown,
        update_norm=functools.partial(_update_norm, wrapper, name) if there else unknown,
        weight_norm=functools.cache(functools.partial(_weight_norm, wrapper)),
    )


def _is_zero(layer: AdaptedLayer, name: str) -> bool | None:
    adapter = layer.adapter(name)
    rows = adapter.changed_rows()
    if rows is not None:
        return not bool(rows[1].any())
    if not adapter.overrides("factors"):
        return None if (delta := _delta(layer, name)) is None else not bool(delta.any())
    return not all(bool(factor.any()) for factor in adapter.stacked_factors() or ())


def _delta(layer: AdaptedLayer, name: str) -> Tensor | None:
    adapter = layer.adapter(name)
    if not adapter.overrides("delta"):
        return None
    with torch.no_grad(), present(layer.owner):
        return adapter.delta(layer.ops.read_weight(layer.base_layer))


@torch.no_grad()
def _update_norm(layer: AdaptedLayer, name: str) -> float | None:
    factors = layer.adapter(name).stacked_factors()
    if factors is None:
        delta = _delta(layer, name)
        return None if delta is None else float(delta.norm())
    up, down = (factor.double() for factor in factors)
    return product_norm([(up, down)], [1.0])


@torch.no_grad()
def _weight_norm(layer: AdaptedLayer) -> float | None:
    with present(layer.owner):
        weight = layer.ops.read_weight(layer.base_layer)
        return None if weight.is_meta else float(weight.float().norm())
