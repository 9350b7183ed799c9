"""Layers that share a weight: which of them an adapter or a trained copy is put on, and which it does not reach."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from minipeft.config.adapter_config import AdapterConfig
from minipeft.ecosystem.transformers_model import input_embedding
from minipeft.errors import TargetError, shown, warn
from minipeft.injection.module_tree import Candidate, TensorIndex
from minipeft.injection.modules_to_save import copy_tensors
from minipeft.injection.sites import AdapterSite, SavedSite, module_sites, ops_for
from minipeft.injection.targets import within
from minipeft.injection.wrapper import innermost
from minipeft.layers.offloaded import hides_ties, present


class TiedLayers:
    """The layers of a model that share a weight, and what that means for one plan.

    Args:
        model: the model.
        outside: its `outside_adapters`.
        config: the configuration of the plan.
        found: the model's `candidates`.
    """

    def __init__(
        self,
        model: nn.Module,
        outside: Sequence[tuple[str, nn.Module]],
        config: AdapterConfig,
        found: dict[str, Candidate],
    ) -> None:
        table = input_embedding(model)
        self.table = None if table is None else innermost(table)  # the input embedding, if the model names it
        self.index, self.config, self.found = TensorIndex(model, outside), config, found
        self.kept_tied = self._kept_tied()

    def with_one_copy(self, saved: list[SavedSite], every_pattern: bool) -> list[SavedSite]:
        """With ``ensure_weight_tying``, one copy for the embedding and all that is tied to it, if any of them trains in full.

        What another one has besides its weight, such as the bias of BERT's head, trains too if that one is named, or with
        ``bias="all"``. PEFT does the same for modules named ``embed_tokens`` or ``lm_head``, and leaves their biases out.

        Raises TargetError if a module to train in full holds one of them among others.
        """
        tied = self.kept_tied
        members = {site.name: site.trains for site in saved if site.name in tied}
        holders = [site.name for site in saved if any(within(name, [site.name]) for name in tied if name != site.name)]
        if holders and every_pattern:
            raise TargetError(
                f"ensure_weight_tying: modules_to_save trains all of {holders[0]}, and {shown(tied)} in and outside of it share "
                "one weight. Name the layers in it that are to train, or leave out ensure_weight_tying."
            )
        if not members:
            return saved
        name, *others = tied
        leader = SavedSite(name, self.found[name], None, any(members.values()))
        followers = []
        for other in others:
            own = rest_of(self.found[other].base)
            trains = members.get(other, False) or self.config.bias == "all"
            only = tuple(own) if trains else ()
            followers.append(SavedSite(other, self.found[other], only, trains or not own, tied_to=name))
        return [*(site for site in saved if site.name not in tied), leader, *followers]

    def with_one_adapter(self, sites: list[AdapterSite], saved: Sequence[SavedSite]) -> list[AdapterSite]:
        """With ``ensure_weight_tying``, one site on the embedding if it or a layer tied to it is targeted.

        `with_tied_sites` adds the others. Raises TargetError if the options differ for the tied layers, one of them trains
        in full, or the embedding cannot be adapted.
        """
        tied = self.kept_tied
        members = [site for site in sites if site.name in tied]
        if not members:
            return sites
        if any(site.name in tied for site in saved):
            raise TargetError(
                f"ensure_weight_tying: {shown(tied)} share one weight, which modules_to_save trains in full, and "
                f"target_modules adapts {members[0].name}. Choose one of the two."
            )
        name, configs = tied[0], self.config.for_modules(tied)
        for other in tied:
            if configs[other] != configs[name]:
                raise TargetError(f"ensure_weight_tying: {other} and {name} are given different ranks or alphas.")
        leader = list(module_sites(name, self.found[name], configs[name]))
        return [*(site for site in sites if site.name not in tied), *leader]

    def with_tied_sites(self, sites: list[AdapterSite]) -> list[AdapterSite]:
        """These sites and, after each whose method adapts tied layers, a site for every layer tied to it.

        As in PEFT, a tied layer that is named with other options stays apart, unless ``ensure_weight_tying`` is set.

        Raises TargetError if two tied layers are to be adapted in different ways, or one cannot be adapted.
        """
        if not any(self._ties(site) for site in sites):
            return sites
        names = {id(candidate.base): name for name, candidate in self.found.items()}
        named = [site for site in sites if site.adapter_class.ties(site.config)]
        leaders = [site for site in named if self._ties(site)]
        apart = {id(site.candidate.base) for site in named if not all(_alike(leader, site) for leader in leaders)}
        first_of: dict[int, AdapterSite] = {}  # by tied layer: the site it is tied to
        complete = []
        # What reaches others comes first, since a later site may name a layer that it reaches.
        for site in sorted(sites, key=lambda site: not self._ties(site)):
            first = first_of.get(id(site.candidate.base)) if site.adapter_class.ties(site.config) else None
            if first is not None:  # the layer was reached through its tie, and is named too
                _check_alike(first, site)
                continue
            complete.append(site)
            if not self._ties(site):
                continue
            for owner, module in self._tied_to(site.candidate.base):
                if id(module) in apart and not self.config.ensure_weight_tying:
                    continue
                if id(module) not in names:
                    raise TargetError(
                        f"{site.name} shares its weight with {owner}, which cannot be adapted along with it."
                    )
                name = names[id(module)]
                ops = ops_for(name, self.found[name])
                complete.append(
                    replace(site, name=name, candidate=self.found[name], ops=ops, targeted=False, tied_to=site.name)
                )
                first_of[id(module)] = site
        return complete

    def with_tied_copies(self, saved: list[SavedSite], adapted: list[AdapterSite]) -> list[SavedSite]:
        """These sites and, for a table that encoder and decoder share, a site for every module tied to it.

        T5, BART and their kin call their encoder's and decoder's own embeddings, which are tied to the table that the model
        names (``shared``); nothing calls that one. So whatever is tied to it, and not named itself, uses its trained copy. In
        PEFT, which copies the table alone, that copy does nothing. A head tied to an embedding that is called keeps its own
        weight, as in PEFT.

        Raises:
            TargetError: a module tied to the table is adapted.
        """
        leader = next((site for site in saved if site.candidate.base is self.table), None)
        weight = None if leader is None else leader.candidate.base._parameters.get("weight")
        if leader is None or weight is None:
            return saved
        tied = [module for _, module in self._tied_to(leader.candidate.base)]
        is_shared = len(leader.candidate.places) > 1  # once it was resized, one module in all these places
        if not (is_shared or any(isinstance(module, nn.Embedding) for module in tied)):
            return saved
        named, taken = [site.name for site in saved], {id(site.candidate.base) for site in adapted}
        followers = [
            SavedSite(name, candidate, (), tied_to=leader.name)
            for name, candidate in self.found.items()
            if any(candidate.base is module for module in tied) and not within(name, named)
        ]
        for site in followers:
            if id(site.candidate.base) in taken:
                raise TargetError(
                    f"{site.name} shares its weight with {leader.name}, which is trained in full, so it cannot be adapted too. "
                    "Choose one of the two."
                )
        return [*saved, *followers]

    def warn_of_tied_layers(self, sites: Sequence[AdapterSite], saved: Sequence[SavedSite]) -> None:
        """Warn if another layer of the same type shares a trained weight: the model may call that layer instead."""
        if not self.index.is_shared:
            return
        reached = {id(site.candidate.base) for site in sites}
        reached |= {id(module) for site in saved for module in site.candidate.base.modules()}
        layers = [(site.name, site.candidate.base, "adapter", "target") for site in sites]
        inside = [(site.name, layer) for site in saved if site.only is None for layer in site.candidate.base.modules()]
        # Embeddings keep a copy each, see `with_one_copy_of_tied`.
        layers += [
            (name, layer, "trained copy", "name") for name, layer in inside if not isinstance(layer, nn.Embedding)
        ]
        for name, base, part, verb in layers:
            weight = base._parameters.get("weight")
            owners = self.index.owners(weight) if weight is not None else []
            tied = [other for other, module in owners if type(module) is type(base) and id(module) not in reached]
            if tied:
                warn(
                    f"{name} shares its weight with {shown(tied)}, which the {part} does not reach; {verb} those too if the "
                    "model calls them.",
                    ours=True,
                )

    def _kept_tied(self) -> list[str]:
        """Names of the input embedding, then of all other layers with its weight; none without ``ensure_weight_tying``."""
        table, found = self.table, self.found
        name = next((name for name, candidate in found.items() if candidate.base is table), None)
        if table is None or name is None or not self.config.ensure_weight_tying:
            return []
        tied = {id(module) for _, module in self._tied_to(table)}
        others = [other for other, candidate in found.items() if id(candidate.base) in tied]
        return [name, *others] if others else []

    def _ties(self, site: AdapterSite) -> bool:
        """Whether a site reaches the layers tied to its own: as in PEFT, only the input embedding's does, if the model names it."""
        return site.adapter_class.ties(site.config) and (self.table is None or site.candidate.base is self.table)

    def _tied_to(self, base: nn.Module) -> list[tuple[str, nn.Module]]:
        """(parameter name, module) of everything else that shares the weight of this layer."""
        weight = base._parameters.get("weight")
        if weight is None:
            return []
        holders = self.index.owners(weight)
        # Offloading gives each of two tied layers a weight of its own, so only the values tell.
        for name, candidate in self.found.items():
            other = candidate.base
            twin = other._parameters.get("weight")
            if twin is None or twin.shape != weight.shape or any(other is module for _, module in holders):
                continue
            if (hides_ties(base) or hides_ties(other)) and _same_values(base, other):
                holders.append((f"{name}.weight", other))
        return [(name, module) for name, module in holders if module is not base]


def rest_of(layer: nn.Module) -> dict[str, nn.Parameter]:
    """What a layer has besides its weight."""
    return {key: parameter for key, parameter in layer.named_parameters() if key != "weight"}


def _same_values(one: nn.Module, other: nn.Module) -> bool:
    """Whether two layers, which may be offloaded, have equal weights."""
    with present(one), present(other):
        return torch.equal(one.get_parameter("weight").cpu(), other.get_parameter("weight").cpu())


def _alike(first: AdapterSite, second: AdapterSite) -> bool:
    return replace(first.config, target_modules=None) == replace(second.config, target_modules=None)


def _check_alike(first: AdapterSite, second: AdapterSite) -> None:
    if not _alike(first, second):
        raise TargetError(
            f"{second.name} and {first.name} share their weight, and the configuration adapts them in different ways. "
            "Say the same for both, name only the embedding, or leave out ensure_weight_tying."
        )


def check_shared(config: AdapterConfig, sites: list[AdapterSite], saved: list[str]) -> None:
    """Raise TargetError if a layer adapted by a companion method or through a tie is adapted or trained a second time."""
    counts = Counter(id(site.candidate.base) for site in sites)
    for site in sites:
        if not site.prefix and site.tied_to is None:
            continue
        method = site.adapter_class.__name__
        why = f", which it shares with {site.tied_to}," if site.tied_to else ""
        if counts[id(site.candidate.base)] > 1 or within(site.name, saved):
            raise TargetError(
                f"{site.name}: {method} trains rows of its weight{why} so it cannot be adapted or trained in another "
                "way too. Choose one of the two."
            )
        if config.bias == "all" and site.candidate.base._parameters.get("bias") is not None:
            raise TargetError(
                f"{site.name}: bias='all' would leave out its bias, since {method} trains rows of its weight. "
                "Use bias='none' or 'lora_only'."
            )


def with_one_copy_of_tied(saved: Sequence[SavedSite]) -> list[SavedSite]:
    """These sites, where modules of one type that share all they train, such as the heads of a detector, have one copy.

    Each is saved under its own name too. Embeddings keep a copy each, as in PEFT.
    """
    alike: dict[tuple[object, ...], list[SavedSite]] = {}
    for site in saved:
        base = site.candidate.base
        trained = () if site.tied_to or isinstance(base, nn.Embedding) else copy_tensors(base, site.only).values()
        held = (type(base), site.only, *map(id, trained)) if trained else (id(base),)
        alike.setdefault(held, []).append(site)
    complete = []
    for first, *others in alike.values():
        complete.append(replace(first, trains=any(site.trains for site in (first, *others))))
        complete += [replace(site, only=(), tied_to=first.name) for site in others]
    return complete
