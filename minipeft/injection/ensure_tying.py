"""``ensure_weight_tying``: one adapter, or one trained copy, for an embedding and the layers that are tied to it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from minipeft.config import AdapterConfig
from minipeft.errors import TargetError
from minipeft.injection.module_tree import Candidate, TensorIndex
from minipeft.injection.sites import AdapterSite, SavedSite, module_sites
from minipeft.injection.tied_sites import owners
from minipeft.injection.wrapper import innermost
from minipeft.transformers_model import input_embedding


def with_one_copy(
    model: nn.Module, config: AdapterConfig, found: dict[str, Candidate], saved: list[SavedSite]
) -> list[SavedSite]:
    """If a module to train in full is tied to the input embedding, a copy of that, whose weight the others use.

    PEFT does the same for modules named ``embed_tokens`` or ``lm_head``, and then leaves `target_modules` as they are.
    """
    name, tied = _group(model, config, found)
    members = [site for site in saved if site.name in tied]
    if not members:
        return saved
    leader = SavedSite(name, found[name], None, any(site.trains for site in members))
    followers = [SavedSite(other, found[other], (), tied_to=name) for other in tied if other != name]
    return [*(site for site in saved if site.name not in tied), leader, *followers]


def with_one_adapter(
    model: nn.Module,
    config: AdapterConfig,
    found: dict[str, Candidate],
    sites: list[AdapterSite],
    saved: Sequence[SavedSite],
    every_pattern: bool,
) -> list[AdapterSite]:
    """If a targeted layer is tied to the input embedding, one site on that; `with_tied_sites` adds the others.

    Raises:
        TargetError: the options differ for the tied layers, or the embedding cannot be adapted.
    """
    name, tied = _group(model, config, found)
    members = [site for site in sites if site.name in tied]
    if not members or any(site.name in tied for site in saved):
        return sites
    configs = config.for_modules(tied)
    for other in tied:
        if configs[other] != configs[name]:
            raise TargetError(f"ensure_weight_tying: {other} and {name} are given different ranks or alphas.")
    leader = list(module_sites(name, found[name], configs[name], every_pattern))
    return [*(site for site in sites if site.name not in tied), *leader]


def _group(model: nn.Module, config: AdapterConfig, found: dict[str, Candidate]) -> tuple[str, list[str]]:
    """The name of the input embedding, and those of all layers with its weight; none if there is no other."""
    table = input_embedding(model) if config.ensure_weight_tying else None
    base = None if table is None else innermost(table)
    name = next((name for name, candidate in found.items() if candidate.base is base), "")
    if base is None or not name:
        return "", []
    holders = {id(module) for _, module in owners(TensorIndex(model), found, base)}
    tied = [other for other, candidate in found.items() if id(candidate.base) in holders]
    return (name, tied) if len(tied) > 1 else ("", [])
