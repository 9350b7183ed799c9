"""One LoRA adapter made of several adapters: its values, its configuration, and its place in the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.config.adapter_config import AdapterConfig, config_class
from minipeft.config.options import rank as checked_rank
from minipeft.errors import TargetError, shown
from minipeft.injection.attach import attach
from minipeft.injection.build import build
from minipeft.injection.plan import plan
from minipeft.injection.state import state_of
from minipeft.kernels.full_precision import full_precision
from minipeft.kernels.functional import is_finite
from minipeft.kernels.generators import generators_kept
from minipeft.kernels.products import padded
from minipeft.merging.combining.combination import Combination, measured, summed_bias
from minipeft.merging.combining.report import CombineReport
from minipeft.merging.combining.sources import Update, sources, widest

METHOD = "lora"
TARGETING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")
Values = dict[str, tuple[Tensor, Tensor, "Tensor | None"]]


@torch.no_grad()
@full_precision()
def add_weighted(
    model: nn.Module, weights: Mapping[str, float], adapter_name: str, how: Combination, *, different_targets: bool
) -> CombineReport:
    """See `minipeft.merging.combining.combinable_model.CombinableModel.add_weighted_adapter`.

    Until all values are there, the model is only read.
    """
    found = sources(model, weights, different_targets=different_targets)
    values, report = _combined(found, how)
    _check_biases(found, values)
    state = state_of(model)
    configs = {name: state.configs[name] for name in weights}
    made = plan(model, _config(found, configs, values, report.rank), every_pattern=False)
    # A suffix in a list of names may fit more modules than the one it was taken from.
    sites = tuple(site for site in made.adapters if (site.tied_to or site.name) in found)
    if missing := found.keys() - {site.name for site in sites}:
        raise TargetError(f"{shown(sorted(missing))}: this layer cannot have an adapter of its own any more.")
    made = replace(made, adapters=sites, saved=())
    with generators_kept():  # the starting values are replaced, so they draw nothing
        parts = build(made, autocast_adapter_dtype=False)
    for site, adapter in zip(made.adapters, parts.adapters, strict=True):
        if site.tied_to is None:
            one: Any = adapter
            one.hold(*values[site.name])
    attach(model, type(model), made, parts, adapter_name, trainable=False)
    return report


def _combined(found: Mapping[str, list[Update]], how: Combination) -> tuple[Values, CombineReport]:
    """The factors of each layer in the adapter's own dtype, all of one rank, and what they cost."""
    dtype, made, norms, distances = widest(found), {}, {}, {}
    ranks = [_rank(update) for updates in found.values() for update in updates]
    for path, updates in found.items():
        pair = how.of(path, updates, ranks)
        up, down = (factor.to(dtype) for factor in pair)
        if not (is_finite(up) and is_finite(down)):
            raise TargetError(f"{path}: the combined factors are not finite in {dtype}; use smaller weights.")
        made[path] = up, down
        norms[path], distances[path] = measured(updates, (up, down))
        if not math.isfinite(norms[path] + distances[path]):
            raise TargetError(f"{path}: the weighted sum of the updates is not finite; use smaller weights.")
    rank = checked_rank("the rank of the combined adapter", max(down.shape[-2] for _, down in made.values()))
    biases = {path: summed_bias(updates) for path, updates in found.items()}
    values = {
        path: (*padded(*pair, rank), None if (bias := biases[path]) is None else bias.to(dtype))
        for path, pair in made.items()
    }
    return values, CombineReport(how.combination_type, rank, norms, distances)


def _check_biases(found: Mapping[str, list[Update]], values: Values) -> None:
    """Raise TargetError if a sum of biases would be kept as ``lora_bias``, which a plain LoRA has on all layers or on none."""
    trains = any(bias is not None for _, _, bias in values.values())
    tables = [path for path, updates in found.items() if updates[0].layer.ops.is_embedding]
    if trains and tables:
        raise TargetError(
            f"{tables[0]} is an embedding, and the adapters train biases of other layers: one LoRA cannot hold both. Train them "
            "without the embedding, or without bias and lora_bias."
        )


def _rank(update: Update) -> int:
    factors = update.factors()
    return factors[1].shape[-2] if factors is not None else update.adapter.rank or 1


def _config(
    found: Mapping[str, list[Update]], configs: Mapping[str, AdapterConfig], values: Values, rank: int
) -> AdapterConfig:
    """The configuration of a plain LoRA on these layers: one rank, scaling 1, no pattern tables."""
    first = next(iter(configs.values()))
    options: dict[str, Any] = {name: getattr(first, name) for name in TARGETING}
    alike = all(getattr(config, name) == value for config in configs.values() for name, value in options.items())
    if not alike or options["target_modules"] is None:  # a default of the method, and another method's differs
        names = [path for path, updates in found.items() if updates[0].layer.targeted]
        parameters = [entry for config in configs.values() for entry in config.target_parameters or ()]
        options = {"target_modules": names, "target_parameters": list(dict.fromkeys(parameters)) or None}
    cls = config_class(METHOD)
    known = {f.name for f in fields(first)}
    kept = {
        name: getattr(first, name) for name in ("lora_dropout", "task_type", "base_model_name_or_path") if name in known
    }
    return cls(
        **options,
        **kept,
        r=rank,
        lora_alpha=rank,
        lora_bias=any(bias is not None for _, _, bias in values.values()),
        ensure_weight_tying=any(config.ensure_weight_tying for config in configs.values()),
    )
