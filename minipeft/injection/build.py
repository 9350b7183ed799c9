"""Building what a plan puts into a model: adapters and trained copies, with the names of their tensors in a file."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minipeft.errors import TargetError, told_error
from minipeft.injection.modules_to_save import copy_tensors, trained_copy
from minipeft.injection.plan import Plan
from minipeft.injection.sites import SavedSite
from minipeft.layers.offloaded import HOOK, present
from minipeft.methods.base import Adapter

HALF = frozenset({torch.bfloat16, torch.float16})
ROOT = "base_model."  # every key in PEFT's files starts so
PREFIX = f"{ROOT}model."  # and every key of a module


@dataclass(frozen=True)
class Parts:
    """What a plan puts into a model: one adapter per adapter site, one trained copy per saved site."""

    adapters: tuple[Adapter, ...]
    copies: tuple[nn.Module, ...]

    def file_tensors(self, plan: Plan) -> dict[str, Tensor]:
        """Key in a file -> the live tensor."""
        pairs = [
            (f"{site.name}.{site.prefix}", adapter.file_tensors())
            for site, adapter in zip(plan.adapters, self.adapters, strict=True)
            if site.tied_to is None
        ]
        pairs += [
            (f"{site.name}.", copy_tensors(module, site.only))
            for site, module in zip(plan.saved, self.copies, strict=True)
        ]
        own = {f"{PREFIX}{name}{key}": tensor for name, tensors in pairs for key, tensor in tensors.items()}
        return own | shared_tensors(self.adapters)


def shared_tensors(adapters: Iterable[Adapter]) -> dict[str, Tensor]:
    """The tensors that these adapters share and save once: key in a file -> the live tensor."""
    return {f"{ROOT}{key}": tensor for adapter in adapters for key, tensor in adapter.shared_tensors().items()}


def build(plan: Plan, *, autocast_adapter_dtype: bool = True, on_meta: bool = False) -> Parts:
    """Create the adapters and copies of a plan, on their layers' devices; nothing in the model changes.

    Args:
        plan: what to create.
        autocast_adapter_dtype: hold adapter parameters in float32 if the base is in half precision.
        on_meta: create shapes without memory, to compare a file with before anything is allocated for it.
    """
    bases = [_on_meta(site.candidate.base) if on_meta else site.candidate.base for site in plan.adapters]
    shared: dict[type[Adapter], object | None] = {}
    for cls in dict.fromkeys(site.adapter_class for site in plan.adapters):
        members = [(base, s.ops) for base, s in zip(bases, plan.adapters, strict=True) if s.adapter_class is cls]
        with present(members[0][0]):  # what they share lies on the device of the first
            shared[cls] = cls.share(members, plan.config)
    adapters: dict[str, Adapter] = {}
    for base, site in zip(bases, plan.adapters, strict=True):
        if site.tied_to is not None:
            adapters[site.name] = adapters[site.tied_to].for_tied(base, site.ops)
            continue
        with present(base):
            adapter = site.adapter_class(base, site.ops, site.config, shared[site.adapter_class])
        for parameter in adapter.parameters():
            if autocast_adapter_dtype and parameter.dtype in HALF:
                parameter.data = parameter.data.float()
        adapter.key_prefix, adapter.is_tied = site.prefix, adapter.ties(site.config)
        adapters[site.name] = adapter.train(base.training)
    copies: dict[str, nn.Module] = {}
    for saved in plan.saved:
        tied = None if saved.tied_to is None else copies[saved.tied_to]
        copies[saved.name] = _copied(saved, tied, on_meta)
        if not saved.trains:
            copies[saved.name].requires_grad_(False)
    return Parts(tuple(adapters[site.name] for site in plan.adapters), tuple(copies.values()))


def _copied(site: SavedSite, tied: nn.Module | None, on_meta: bool) -> nn.Module:
    try:
        return trained_copy(site.candidate.base, site.only, tied, on_meta=on_meta)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever a module's own copying raises
        raise TargetError(
            f"{site.name} cannot be trained in full, since {type(site.candidate.base).__name__} cannot be copied "
            f"({told_error(error)})."
        ) from error


def build_from(plan: Plan, tensors: Mapping[str, Tensor]) -> Parts:
    """Create the parts of a plan with these values, by key in a file, without advancing torch's random generator."""
    with torch.random.fork_rng(devices=_cuda_devices(site.candidate.base for site in plan.adapters)):
        parts = build(plan)
    with torch.no_grad():
        for name, live in parts.file_tensors(plan).items():
            if name in tensors:
                live.copy_(tensors[name])
    return parts


def _cuda_devices(modules: Iterable[nn.Module]) -> list[int]:
    indices = {p.device.index for module in modules for p in module.parameters() if p.device.type == "cuda"}
    return sorted(index for index in indices if index is not None)


def _on_meta(base: nn.Module) -> nn.Module:
    stand_in = copy.copy(base)
    vars(stand_in).pop(HOOK, None)
    stand_in._parameters = {
        # Made anew: a quantized weight, a subclass of Tensor, may not be able to move to the meta device.
        k: None if p is None else nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), False)
        for k, p in base._parameters.items()
    }
    return stand_in
