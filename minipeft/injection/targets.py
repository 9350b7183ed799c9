"""From name patterns to module names: what ``target_modules`` and the options next to it select."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import regex
from torch import nn

from minipeft.config.adapter_config import ALL_LINEAR, ALL_LINEAR_TEXT, HEADS_OF_TASK, AdapterConfig
from minipeft.config.patterns import endings, is_suffix, selected
from minipeft.ecosystem.transformers_model import model_type
from minipeft.errors import TargetError, hint, nearest, shown, warn
from minipeft.injection.all_linear import all_linear, layers_left_out, of_text, why_experts_are_left_out
from minipeft.injection.base_state import has_statistics
from minipeft.injection.layers_to_transform import in_layers
from minipeft.injection.module_tree import Candidate
from minipeft.injection.modules_to_save import SavedModule
from minipeft.layers.base import LayerOps, layer_ops
from minipeft.layers.uncalled import matrices
from minipeft.registry import registry

# What the linear layers of an expert are called where experts are modules, as in transformers 4.
EXPERT_LAYERS = ("w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, eq=False)
class Selection:
    """What a configuration selects in a model.

    Args:
        model: the model.
        config: the configuration.
        found: the model's `candidates`.
        every_pattern: insist that each pattern matches something, and warn of experts that the patterns leave out.
    """

    model: nn.Module
    config: AdapterConfig
    found: dict[str, Candidate]
    every_pattern: bool = False

    @functools.cached_property
    def targets(self) -> list[str]:
        """Names of the modules to adapt, in the model's order.

        Raises:
            TargetError: a pattern matches nothing, nothing is left, or there is no default for this model.
        """
        config = self.config
        saved = set(self.saved)
        first_names = {name: first for first, candidate in self.found.items() for name in candidate.known_as}
        excluded = set(self._matching(config.exclude_modules or (), first_names, "exclude_modules"))
        eligible = [name for name in first_names if name not in excluded and not within(name, saved)]
        if config.target_modules in (ALL_LINEAR, ALL_LINEAR_TEXT):
            chosen, why = self._all_linear(eligible)
        else:
            chosen, why = self._by_pattern(eligible, first_names), ""
        chosen = in_layers(config, chosen, self.every_pattern)
        if self.every_pattern:
            _check_nothing_inside(config.exclude_modules, excluded, chosen)
        if not chosen and not config.target_parameters:
            given = list(config.target_modules) if isinstance(config.target_modules, tuple) else config.target_modules
            raise TargetError(
                f"target_modules {given!r} leaves no module of {type(self.model).__name__} to adapt{why}."
            )
        return list(dict.fromkeys(first_names[name] for name in chosen))

    def _all_linear(self, eligible: list[str]) -> tuple[list[str], str]:
        """The linear layers among these names; if there are none, what was left out instead, for an error."""
        if self.config.target_modules == ALL_LINEAR_TEXT:
            eligible = of_text(self.model, eligible)
        chosen, left_out = all_linear(self.model, self.found, eligible)
        if self.every_pattern and (chosen or self.config.target_parameters):
            if unadapted := {name: why for name, why in left_out.items() if name not in self.parameters}:
                said = layers_left_out(unadapted, self.found)
                warn(f"target_modules='all-linear' leaves out {said}.", ours=True)
        return chosen, f": {layers_left_out(left_out, self.found)}" if left_out and not chosen else ""

    def _by_pattern(self, eligible: list[str], names: Iterable[str]) -> list[str]:
        """Those of the eligible names that ``target_modules`` or the defaults of the model's family match."""
        given = self.config.target_modules
        if given is None:
            return self._matching(_defaults(self.model, self.found, self.config), eligible, "target_modules", names)
        chosen = self._matching(given, eligible, "target_modules", names)
        if self.every_pattern and chosen:
            self._warn_of_experts(eligible)
        return chosen

    @functools.cached_property
    def saved(self) -> list[str]:
        """Names of the modules to train in full: those of ``modules_to_save``, and the head of a classification task.

        Raises:
            TargetError: an entry matches no module, or none that holds anything to train, or the task's head is missing.
        """
        config, found = self.config, self.found
        of_task = HEADS_OF_TASK.get(config.task_type or "", ())
        wanted = {*(config.modules_to_save or ()), *of_task}
        if not wanted:
            return []
        hits = {
            first: wanted.intersection(ending for name in candidate.known_as for ending in endings(name))
            for first, candidate in found.items()
        }
        if self.every_pattern:
            self._check_saved(hits, of_task)
        chosen = {first for first, entries in hits.items() if entries}
        outermost = [name for name in found if name in chosen and not within(name.rpartition(".")[0], chosen)]
        return [each for name in outermost for each in _called(name, found)]

    def _check_saved(self, hits: Mapping[str, set[str]], of_task: Collection[str]) -> None:
        """Raise TargetError unless each entry matches something that can train, and the head of the task is there.

        `hits`: module -> the entries that match it.
        """
        named = [entry for entry in self.config.modules_to_save or () if entry not in of_task]
        used = set().union(*hits.values())
        if unused := [entry for entry in named if entry not in used]:
            raise TargetError(self._no_match("modules_to_save", unused[0], list(self.found)))
        for entry in sorted(named):
            bases = [self.found[first].base for first, entries in hits.items() if entry in entries]
            if not any(map(_can_change, bases)):
                raise TargetError(
                    f"modules_to_save: {entry!r} is a {type(bases[0]).__name__} without parameters, so there is nothing to "
                    "train. Leave it out."
                )
        if of_task and not used:
            raise TargetError(
                f"task_type {self.config.task_type!r} trains the head ({shown(of_task)}), and {type(self.model).__name__} has "
                "none. Name the head in modules_to_save, or leave task_type out."
            )

    @functools.cached_property
    def parameters(self) -> dict[str, list[str]]:
        """Bare parameters to adapt: module name -> names of its own, in its order; raises TargetError if an entry matches none."""
        wanted, names = set(self.config.target_parameters or ()), []
        chosen: dict[str, list[str]] = {}
        unused = set(wanted)
        for first, candidate in self.found.items() if wanted else ():
            for parameter in (name for name, value in candidate.base._parameters.items() if value is not None):
                names.append(f"{first}.{parameter}")
                hits = wanted.intersection(e for name in candidate.known_as for e in endings(f"{name}.{parameter}"))
                if hits:
                    chosen.setdefault(first, []).append(parameter)
                    unused -= hits
        if unused and self.every_pattern:
            raise TargetError(self._no_match("target_parameters", min(unused), names, "parameter"))
        return chosen

    def _matching(
        self, patterns: Sequence[str] | str, eligible: Iterable[str], option: str, all_names: Iterable[str] = ()
    ) -> list[str]:
        """The eligible names that match; each pattern of a list must match one of `all_names` (default: the eligible ones)."""
        names = list(eligible)
        chosen = selected(patterns, names, option)
        if not (self.every_pattern and patterns):
            return chosen
        if not isinstance(patterns, str):
            unused = set(patterns).difference(*(endings(name) for name in (all_names or names)))
            if unused:
                raise TargetError(self._no_match(option, next(entry for entry in patterns if entry in unused), names))
        elif not chosen:
            fix = ""
            if any(is_suffix(patterns, name) for name in names):
                fix = f" A string is a regular expression for the whole name; for the suffix give the list [{patterns!r}]."
            elif option == "target_modules" and (close := nearest(patterns, (ALL_LINEAR, ALL_LINEAR_TEXT))):
                fix = f" Closest: {close!r}, which needs no expression."
            raise TargetError(
                f"{option}: the regular expression {patterns!r} matches no module of {type(self.model).__name__}.{fix}"
            )
        return chosen

    def _no_match(self, option: str, entry: str, names: list[str], kind: str = "module") -> str:
        depth = entry.count(".") + 1
        close = nearest(entry, sorted({".".join(name.split(".")[-depth:]) for name in names}))
        where = ""
        if close:
            count = sum(is_suffix(close, name) for name in names)
            where = f" (closest: {close!r}, {count} {kind}{'s' if count != 1 else ''})"
        elif option == "target_modules":
            linear, _ = all_linear(self.model, self.found, names)
            last = sorted({name.rpartition(".")[2] for name in linear})
            where = f", whose linear layers are called {shown(last, 8)}" if last else ""
        if option == "target_modules" and (bare := _bare_parameters(self.model, entry)):
            where = f"; target_parameters can name {shown(bare)}"
        if entry in (ALL_LINEAR, ALL_LINEAR_TEXT):
            where = f"; give {entry!r} as a string, not in a list"
        return f"{option}: {entry!r} matches no {kind} of {type(self.model).__name__}{where}."

    def _warn_of_experts(self, eligible: Iterable[str]) -> None:
        """Warn about fused experts whose parts have names that ``target_modules`` selects, and that nothing adapts.

        The shared experts and dense layers of a mixture have such names, and would be all that is adapted.
        """
        reasons = {
            first: why for first, c in self.found.items() if (why := why_experts_are_left_out(c.base)) is not None
        }
        allowed, left_out = set(eligible) if reasons else set(), {}
        for first, why in reasons.items():
            parts = [*self.found[first].base._parameters, *(f"0.{part}" for part in EXPERT_LAYERS)]
            names = [f"{name}.{part}" for name in allowed.intersection(self.found[first].known_as) for part in parts]
            if first not in self.parameters and selected_names(self.config, names):
                left_out[first] = why
        if left_out:
            exclude = sorted({name.rpartition(".")[2] for name in left_out})
            warn(
                f"target_modules names parts of experts too, and leaves out {layers_left_out(left_out, self.found)}. "
                f"If that is meant, say exclude_modules={exclude}, or give longer names of the layers to adapt.",
                ours=True,
            )

    def warn_of_hidden(self, saved: Collection[str]) -> None:
        """Warn about layers that ``target_modules`` names, and that stay out as another adapter trains what is around them in full.

        `saved`: modules that this adapter trains in full, too.
        """
        config = self.config
        hidden = {
            f"{first}.{path}": ops
            for first, candidate in self.found.items()
            if isinstance(candidate.module, SavedModule) and not within(first, saved)
            for path, inner in candidate.base.named_modules()
            if path and (ops := layer_ops(inner)) is not None
        }
        if not hidden or config.target_modules == ():
            return
        if config.target_modules in (ALL_LINEAR, ALL_LINEAR_TEXT):
            hidden = {name: ops for name, ops in hidden.items() if ops.in_all_linear}
        elif config.target_modules is None:
            config = replace(config, target_modules=_defaults(self.model, self.found, config))
        if left_out := selected_names(config, list(hidden)):
            warn(
                f"target_modules leaves out {shown(left_out)}, since another adapter trains a module around it in full. Add this "
                "adapter to a model without that one, or train the module in full here as well.",
                ours=True,
            )


def selected_names(config: AdapterConfig, names: Sequence[str]) -> list[str]:
    """Those of these names that a configuration selects, for layers that the model no longer has.

    Without `target_modules`, and for ``"all-linear"`` and ``"all-linear-text"``, all that is not excluded.
    """
    given = config.target_modules
    every = given in (None, ALL_LINEAR, ALL_LINEAR_TEXT)
    chosen = list(names) if every else selected(given or (), names, "target_modules")
    excluded = set(selected(config.exclude_modules or (), names, "exclude_modules"))
    return [name for name in in_layers(config, chosen, False) if name not in excluded]


def _can_change(base: nn.Module) -> bool:
    """Whether training can change a module: it has parameters or running statistics."""
    return any(True for _ in base.parameters()) or any(map(has_statistics, base.modules()))


def _called(name: str, found: dict[str, Candidate]) -> list[str]:
    """The module itself; for a list of modules, which is never called, those in it."""
    if not isinstance(found[name].base, nn.ModuleList | nn.ModuleDict):
        return [name]
    inside = [first for first, c in found.items() if any(other.rpartition(".")[0] == name for other in c.names)]
    return [each for first in inside for each in _called(first, found)] or [name]


def _check_nothing_inside(
    patterns: Sequence[str] | str | None, excluded: Collection[str], chosen: Sequence[str]
) -> None:
    """Raise TargetError if a module is excluded and a layer in it is not: as in PEFT, that says nothing of what is inside."""
    inside = [name for name in chosen if within(name, excluded)] if excluded else []
    if not inside:
        return
    names = patterns if isinstance(patterns, str) else "|".join(map(regex.escape, patterns or ()))
    start, inner = "" if isinstance(patterns, str) else r"(.*\.)?", r"(\..*)?"
    root = next(name for name in excluded if within(inside[0], [name]))
    raise TargetError(
        f"exclude_modules excludes {root} itself, and {len(inside)} targeted layers are inside excluded modules, such as "
        f"{inside[0]}. To exclude all that is inside, give the regular expression {start}({names}){inner}."
    )


def within(name: str, roots: Collection[str]) -> bool:
    """Whether a module is one of these or inside one of them."""
    parts = name.split(".") if roots else []
    return any(".".join(parts[:depth]) in roots for depth in range(1, len(parts) + 1))


def _bare_parameters(model: nn.Module, entry: str) -> list[str]:
    """The parameters that an entry of target_modules may mean: those of its name, or those of fused experts."""
    own = [
        (path.rpartition(".")[2], module, name) for path, module in model.named_modules() for name in matrices(module)
    ]
    shapes = {f"{last}.{name}": module._parameters[name].ndim for last, module, name in own if name != "weight"}
    fused = [name for name, ndim in shapes.items() if ndim == 3 and entry.rpartition(".")[2] in EXPERT_LAYERS]
    return [name for name in shapes if is_suffix(entry, name)] or fused


def _defaults(model: nn.Module, found: dict[str, Candidate], config: AdapterConfig) -> Sequence[str] | str:
    kind = model_type(model)
    patterns = config.default_modules(model)
    if patterns is None and kind is not None:
        patterns = registry.targets_of(kind)
    if patterns is not None or config.target_parameters:
        return patterns or ()
    counts: dict[str, int] = {}
    for name, candidate in found.items():
        ops = layer_ops(candidate.base)
        if ops is not None and ops.in_all_linear:
            parts = name.split(".")
            last = next((at for at in reversed(range(len(parts))) if not parts[at].isdigit()), 0)
            ending = ".".join(parts[last:])  # "to_q"; "to_out.0" of a layer in a list
            counts[ending] = counts.get(ending, 0) + 1
    common = sorted(counts, key=lambda ending: -counts[ending])
    known = hint(kind, sorted(registry.default_targets())) if kind is not None else ""
    raise TargetError(
        f"no default target_modules for {f'model_type {kind!r}' if kind else type(model).__name__}{known}; "
        f"give target_modules, from this model's own: {shown((f'{e} ({counts[e]})' for e in common), 8)}, or 'all-linear'."
    )


def to_prepare(found: dict[str, Candidate]) -> Iterator[tuple[LayerOps, nn.Module]]:
    """Every (ops, layer) whose ops prepare a layer for training, whether it is adapted or not."""
    bases = [candidate.base for candidate in found.values()]
    concerned = {
        t
        for t in set(map(type, bases))
        if any(type(o).prepare is not LayerOps.prepare for _, o in registry.layer_candidates(t))
    }
    for base in bases:
        ops = layer_ops(base) if type(base) in concerned else None
        if ops is not None:
            yield ops, base
