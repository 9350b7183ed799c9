"""Models whose weights are not there: on the meta device, with nothing that loads them before a call."""

from __future__ import annotations

from torch import nn

from minipeft.errors import TargetError
from minipeft.injection.plan import Plan
from minipeft.layers.offloaded import is_absent, offloads


def check_loaded(model: nn.Module, plan: Plan, *, may_be_empty: bool) -> None:
    """Check that the layers to adapt or train have values; otherwise adapters would have none either.

    `may_be_empty` allows a model without any value, as for counting its parameters.

    Raises:
        TargetError: a layer has none.
    """
    if may_be_empty and all(parameter.is_meta for parameter in model.parameters()):
        if not any(map(offloads, model.modules())):
            return
    sites = [(site.name, [site.candidate.base]) for site in plan.adapters]
    sites += [(site.name, list(site.candidate.base.modules())) for site in plan.saved]
    for name, modules in sites:
        if any(map(is_absent, modules)):
            raise TargetError(
                f"{name}: its weight is on the meta device, without values, and no hook of its own loads it. Load the "
                "model's weights first; with accelerate, without preload_module_classes."
            )
