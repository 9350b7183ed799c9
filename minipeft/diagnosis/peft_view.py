"""The view of a model that PEFT has adapted: a `peft.PeftModel`, or one with PEFT's layers put into it by others."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.diagnosis.view import Part, View, unknown
from minipeft.injection.watch import Pass, ran_without

PRODUCTS = ("lora_", "hada_w", "lokr_w")  # how the names of factors begin
INSIDE = ("base_layer", "original_module")  # where PEFT's layers keep the layer


def has_peft_layers(root: nn.Module) -> bool:
    """Whether PEFT's layers are in a model; without PEFT having been imported there can be none."""
    return "peft" in sys.modules and any(isinstance(module, _kinds()) for module in root.modules())


def peft_view(model: nn.Module, root: nn.Module) -> View:
    """The view of `root`, which holds PEFT's layers, called as `model`."""
    layers = list(_layers(root))
    configs = getattr(model, "peft_config", None) or getattr(root, "peft_config", None) or {}
    parts = [part for name, module in layers for part in _parts(name, module, configs)]
    held = {id(parameter) for part in parts for parameter in part.parameters.values()}
    base = {_plain(name): p for name, p in root.named_parameters() if id(p) not in held}
    active = dict.fromkeys(name for _, module in layers for name in module.active_adapters)
    return View(
        model=model,
        root=root,
        others=(),
        parts=parts,
        configs=dict(configs),
        active=list(active),
        disabled=bool(layers) and all(module.disable_adapters for _, module in layers),
        base=base,
        idle=functools.partial(_idle, root),
        is_peft=True,
    )


def _layers(root: nn.Module) -> Iterator[tuple[str, Any]]:
    kinds = _kinds()
    return ((name, module) for name, module in root.named_modules() if isinstance(module, kinds))


def _kinds() -> tuple[type, ...]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    return BaseTunerLayer, ModulesToSaveWrapper


def _plain(name: str) -> str:
    return ".".join(word for word in name.split(".") if word not in (*INSIDE, "token_adapter"))


def _idle(root: nn.Module, seen: Pass) -> list[str]:
    # PEFT's layers act when they are called; whoever reads their weight gets the base's.
    return [
        _plain(name)
        for name, module in _layers(root)
        if id(module) not in seen.called
        and not any(seen.ran(container) for container in _containers(module))
        and ran_without(root, name, _innermost(module), seen, _kinds())
    ]


def _innermost(module: nn.Module) -> nn.Module:
    while (inner := next((module._modules[n] for n in INSIDE if n in module._modules), None)) is not None:
        module = inner
    return module


def _containers(module: nn.Module) -> list[nn.Module]:
    names = getattr(module, "adapter_layer_names", ())
    return [found for name in names if isinstance(found := module._modules.get(name), nn.Module)]


def _parts(path: str, module: Any, configs: Mapping[str, Any]) -> Iterator[Part]:
    held = _held(module)
    for name, parameters in held.items():
        full = "modules_to_save" in module._modules
        adds = _adds(parameters, configs.get(name))
        scaling = getattr(module, "scaling", None)
        dropouts = module._modules.get("lora_dropout")
        dropout = dropouts[name] if dropouts is not None and name in dropouts else None
        yield Part(
            name,
            _plain(path),
            module,
            _innermost(module),
            parameters,
            name in module.active_adapters,
            merged=name in getattr(module, "merged_adapters", ()),
            is_full=full,
            scaling=float(scaling[name]) if isinstance(scaling, dict) and name in scaling else None,
            pair=_pair(parameters),
            dropout=float(getattr(dropout, "p", 0.0)),
            drops=dropout is not None and dropout.training,
            is_zero=functools.partial(_is_zero, parameters),
            update_norm=functools.partial(_update_norm, module, name) if adds else unknown,
            weight_norm=functools.cache(functools.partial(_weight_norm, module, full)),
        )


def _adds(parameters: Mapping[str, object], config: object) -> bool:
    """Whether the update is a product that starts at zero; with inits such as PiSSA's PEFT takes it out of the weight."""
    start = getattr(config, "init_lora_weights", True)
    return all(name.startswith(PRODUCTS) for name in parameters) and (start == "gaussian" or not isinstance(start, str))


def _held(module: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Adapter -> its parameters here, by the names that PEFT has for them."""
    held: dict[str, dict[str, nn.Parameter]] = {}
    for container in getattr(module, "adapter_layer_names", ()):
        found = module._modules.get(container)
        for name, parameter in () if found is None else found.named_parameters():
            adapter, _, rest = name.partition(".")
            held.setdefault(adapter, {})[f"{container}.{rest}" if rest else container] = parameter
    return held


def _pair(parameters: dict[str, nn.Parameter]) -> tuple[Tensor, Tensor] | None:
    down, up = parameters.get("lora_A.weight"), parameters.get("lora_B.weight")
    return None if down is None or up is None else (down.detach().flatten(1), up.detach().flatten(1))


def _is_zero(parameters: dict[str, nn.Parameter]) -> bool | None:
    factors = [p for name, p in parameters.items() if name.partition(".")[0].startswith(PRODUCTS)]
    factors = [factor for factor in factors if factor.ndim > 1]
    if not factors or any(factor.is_meta for factor in factors):
        return None
    return any(not bool(factor.any()) for factor in factors)


@torch.no_grad()
def _update_norm(module: Any, name: str) -> float | None:
    try:
        return float(module.get_delta_weight(name).norm())
    except Exception:  # of layers for which PEFT forms no such weight
        return None


@torch.no_grad()
def _weight_norm(module: Any, full: bool) -> float | None:
    if full:
        return None
    try:
        weight = module.get_param() if hasattr(module, "get_param") else module.get_base_weight()
        return float(weight.float().norm())
    except Exception:  # a layer without one weight, or a quantized one whose package PEFT does not find
        return None
