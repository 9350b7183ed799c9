"""Building what a plan puts into a model: adapters and trained copies, with the names of their tensors in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from minipeft.config.options import flag
from minipeft.ecosystem.wrapper_names import PREFIX, ROOT, parameters_in
from minipeft.errors import TargetError, told_error
from minipeft.injection.alike import Look, is_simple, stand_in
from minipeft.injection.modules_to_save import copy_tensors, trained_copy
from minipeft.injection.plan import Plan
from minipeft.injection.sites import AdapterSite, SavedSite
from minipeft.kernels.full_precision import full_precision
from minipeft.kernels.functional import HALF
from minipeft.layers.offloaded import present
from minipeft.methods.base import Adapter


@dataclass(frozen=True)
class Parts:
    """What a plan puts into a model: one adapter per adapter site, one trained copy per saved site."""

    adapters: tuple[Adapter, ...]
    copies: tuple[nn.Module, ...]

    def file_tensors(self, plan: Plan) -> dict[str, Tensor]:
        """Key in a file -> the live tensor."""
        held, own = dict[tuple[int, str | None], dict[str, Tensor]](), dict[str, Tensor]()
        for site, part in zip(plan.sites, (*self.adapters, *self.copies), strict=True):
            kind = id(part), site.tied_to  # on the meta device one adapter may be for many sites
            if kind not in held:
                held[kind] = _held(site, part)
            start = start_of(site)
            own.update({start + key: tensor for key, tensor in held[kind].items()})
        return own | shared_tensors(dict.fromkeys(self.adapters))


def own_tensors(site: AdapterSite | SavedSite, part: nn.Module) -> dict[str, Tensor]:
    """What a file holds of one part: key in a file -> the live tensor."""
    start = start_of(site)
    return {start + key: tensor for key, tensor in _held(site, part).items()}


def _held(site: AdapterSite | SavedSite, part: nn.Module) -> dict[str, Tensor]:
    """As `own_tensors`, without what the keys start with."""
    if isinstance(site, SavedSite):
        return copy_tensors(part, site.only)
    return cast(Adapter, part).file_tensors() if site.tied_to is None else {}


def start_of(site: AdapterSite | SavedSite) -> str:
    """What the keys of a part start with in a file."""
    return f"{PREFIX}{site.name}.{site.prefix if isinstance(site, AdapterSite) else ''}"


def shared_tensors(adapters: Iterable[Adapter]) -> dict[str, Tensor]:
    """The tensors that these adapters share and save once: key in a file -> the live tensor."""
    return {f"{ROOT}{key}": tensor for adapter in adapters for key, tensor in adapter.shared_tensors().items()}


@full_precision()  # or adapters would start from rounded products
def build(
    plan: Plan,
    *,
    autocast_adapter_dtype: bool = True,
    on_meta: bool = False,
    fill: Callable[[dict[str, Tensor], nn.Module], None] | None = None,
) -> Parts:
    """Create the adapters and copies of a plan, on their layers' devices; nothing in the model changes.

    Args:
        plan: what to create.
        autocast_adapter_dtype: hold adapter parameters in float32 if the base is in half precision.
        on_meta: create shapes without memory, to compare a file with before anything is allocated for it. Layers that look
            alike may then have one adapter between them.
        fill: called with what a file holds of each part, by key, and the part.

    Raises:
        ConfigError: `autocast_adapter_dtype` is neither True nor False.
        TargetError: a part cannot be made.
    """
    flag("autocast_adapter_dtype", autocast_adapter_dtype)
    looks: dict[Look, nn.Module] = {}
    bases = [stand_in(site.candidate.base, looks) if on_meta else site.candidate.base for site in plan.adapters]
    shared: dict[type[Adapter], object | None] = {}
    for cls in dict.fromkeys(site.adapter_class for site in plan.adapters):
        members = [(base, s.ops) for base, s in zip(bases, plan.adapters, strict=True) if s.adapter_class is cls]
        with present(members[0][0]):  # what they share lies on the device of the first
            shared[cls] = cls.share(members, plan.config)
    adapters: dict[str, Adapter] = {}
    alike: dict[tuple[object, ...], Adapter] = {}
    for base, site in zip(bases, plan.adapters, strict=True):
        kind = id(base), id(site.ops), site.adapter_class, id(site.config), site.prefix
        if site.tied_to is not None:
            adapters[site.name] = adapters[site.tied_to].for_tied(base, site.ops)
        elif kind in alike:
            adapters[site.name] = alike[kind]
        else:
            adapters[site.name] = adapter = _made(site, base, shared[site.adapter_class], autocast_adapter_dtype)
            if on_meta and is_simple(adapter):
                alike[kind] = adapter
            if fill is not None:
                fill(own_tensors(site, adapter), adapter)
    copies: dict[str, nn.Module] = {}
    for saved in plan.saved:
        tied = None if saved.tied_to is None else copies[saved.tied_to]
        copies[saved.name] = _copied(saved, tied, on_meta)
        if not (saved.trains or saved.tied_to):
            copies[saved.name].requires_grad_(False)
        if fill is not None:
            fill(own_tensors(saved, copies[saved.name]), copies[saved.name])
    return Parts(tuple(adapters[site.name] for site in plan.adapters), tuple(copies.values()))


def _made(site: AdapterSite, base: nn.Module, shared: object | None, autocast_adapter_dtype: bool) -> Adapter:
    with present(base):
        adapter = site.adapter_class(base, site.ops, site.config, shared)
    for parameter in parameters_in(adapter) if autocast_adapter_dtype else ():
        if parameter.dtype in HALF:
            parameter.data = parameter.data.float()
    if site.prefix:  # assigning an attribute of a module takes long, and most need none of these
        adapter.key_prefix = site.prefix
    if adapter.ties(site.config):
        adapter.is_tied = True
    if not base.training:
        adapter.eval()
    return adapter


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
