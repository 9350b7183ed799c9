"""Loading an adapter directory: the parts that it describes for a model, with its values."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.config.adapter_config import AdapterConfig
from minipeft.ecosystem.older_peft import has_another_series
from minipeft.ecosystem.peft_options import KEPT
from minipeft.ecosystem.wrapper_names import PREFIX, named_modules
from minipeft.errors import OccupiedError, shown, warn
from minipeft.files.base_samples import planned_frozen_weights, planned_samples, warn_of_missing_parts
from minipeft.files.compare import Expected, read_values
from minipeft.files.format import AdapterFile, open_adapter
from minipeft.files.hub import adapter_directory
from minipeft.files.names.experts.layout import todays_layout
from minipeft.files.names.fitted import in_names_of
from minipeft.files.names.wrapper_parts import without_adapter_name
from minipeft.files.new_rows import NewRows
from minipeft.files.peft_extras import as_peft_reads, has_keys_of
from minipeft.files.reading import reading
from minipeft.files.resized_vocabulary import IN_LAYER
from minipeft.injection.build import Parts, build
from minipeft.injection.build_from_file import build_from
from minipeft.injection.fresh_parts import FreshParts, find_fresh_parts, with_fresh_parts
from minipeft.injection.module_tree import Candidate, candidates
from minipeft.injection.modules_to_save import SavedModule
from minipeft.injection.plan import Plan, check_loaded
from minipeft.injection.plan import plan as plan_injection
from minipeft.injection.sites import SavedSite
from minipeft.injection.targets import Selection, within
from minipeft.injection.tied_sites import rest_of
from minipeft.methods.base import Adapter

logger = logging.getLogger("minipeft")


def load_config(
    directory: str | PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
    local_files_only: bool = False,
) -> AdapterConfig:
    """The configuration in an adapter's directory, to learn its ``base_model_name_or_path`` before the base is loaded.

    Args:
        directory, revision, token, subfolder, local_files_only: see `minipeft.files.hub.adapter_directory`.

    Raises:
        CheckpointError: there is no adapter, or its files are damaged.
        ConfigError: it asks for something that is not implemented.
    """
    path = adapter_directory(
        directory, revision=revision, token=token, subfolder=subfolder, local_files_only=local_files_only
    )
    with reading(path):
        return open_adapter(path).config


def load_parts(
    model: nn.Module,
    directory: Path,
    *,
    strict: bool,
    allow_base_mismatch: bool,
    key_mapping: Mapping[str, str] | None = None,
    is_trainable: bool = False,
) -> tuple[Plan, Parts, NewRows]:
    """Read an adapter directory and build what it describes for this model; the model is only read.

    Of the new rows, the caller puts those that are for the base into it, once all else has gone well.

    Shapes are compared before memory is allocated for them, and everything is checked before anything is built.

    Raises:
        MinipeftError: see `minipeft.load_adapter`.
    """
    found = candidates(model)
    with reading(directory):
        file = open_adapter(directory, lambda _: [name for name, _ in named_modules(model) if name])
        file = as_peft_reads(in_names_of(model, file, key_mapping, strict=strict, found=found), model, found)
        new_rows = NewRows(file, model)
    _check_not_hidden(model, file, found)
    plan = plan_injection(model, _as_tied(file, new_rows.config, model), every_pattern=False, found=found)
    plan = replace(plan, saved=tuple(_as_saved(site, file) for site in plan.saved))
    check_loaded(model, plan, may_be_empty=False)
    frozen = dict(planned_frozen_weights(model, plan, found, file.base))
    sampled = [(name, weight) for name, weight in frozen.items() if name in file.base]
    plan, lacking = _with_lacking(model, plan, file, found) if is_trainable else (plan, ())
    shapes = build(plan, on_meta=True)
    tensors = _without(lacking, shapes.file_tensors(plan))
    samples = {} if allow_base_mismatch else planned_samples(model, plan, shapes, sampled)
    expected = Expected(
        model,
        {key: tensor for key, tensor in tensors.items() if key not in new_rows.values},
        base={name: row for name, row in samples.items() if f"{PREFIX}{name}{IN_LAYER}" not in new_rows.done},
        tied=_tied(plan),
        done=new_rows.done,
        base_advice=" Pass allow_base_mismatch=True if that is meant.",
    )
    file = without_adapter_name(file, expected.tensors, [site.name for site in plan.saved])
    file = todays_layout(file, plan)
    with reading(directory):
        values = read_values(file, expected, strict=strict)
    warn_of_missing_parts(model, file, plan, frozen)
    _tell(directory, file, plan, new_rows.lacking)
    values.update(new_rows.values)
    return plan, build_from(plan, shapes, tensors, values), new_rows


def _check_not_hidden(model: nn.Module, file: AdapterFile, found: dict[str, Candidate]) -> None:
    """Raise OccupiedError if the file adapts layers in a module that another adapter trains in full."""
    around = [first for first, c in found.items() if isinstance(c.module, SavedModule) and c.base._modules]
    saved = Selection(model, file.config, found).saved if around else []
    for name in around:
        if not within(name, saved) and has_keys_of(file, [name]):
            raise OccupiedError(f"{name}: another adapter trains it in full, and this one adapts layers in it.")


def _tell(directory: Path, file: AdapterFile, plan: Plan, lacking: Iterable[str]) -> None:
    """Say what the file has that does not act here, or not in PEFT, and what it lacks."""
    for message in lacking:
        warn(message)
    _tell_of_lost_biases(file, plan)
    if bookkeeping := file.config.other_keys.keys() - KEPT:
        logger.info("%s: kept as they are, since they ask for nothing: %s", directory, shown(sorted(bookkeeping)))
    if not file.is_own and has_another_series(file.said):
        warn(
            f"{directory} is from PEFT before 0.18, where the Cayley-Neumann series of OFT had another last term: large "
            "rotations differ from those that were trained, here and in PEFT."
        )


def _tell_of_lost_biases(file: AdapterFile, plan: Plan) -> None:
    """Warn where PEFT ties a head to a trained embedding, and leaves out what the head has besides its weight."""
    for site in plan.saved if not file.is_own else ():
        rest = rest_of(site.candidate.base) if site.tied_to is not None else {}
        lost = [
            key
            for key, own in rest.items()
            if f"{PREFIX}{site.name}.{key}" not in file.shapes and not own.is_meta and own.any()
        ]
        if lost:
            warn(
                f"{file.path.parent}: with ensure_weight_tying PEFT computes without {site.name}.{lost[0]}, so this adapter was trained "
                "without it. Here it acts, so outputs differ from PEFT's."
            )


def _tied(plan: Plan) -> dict[str, str]:
    """The layers that share what another one has: name -> name of that one."""
    return {site.name: site.tied_to for site in plan.sites if site.tied_to is not None}


def _with_lacking(
    model: nn.Module, plan: Plan, file: AdapterFile, found: dict[str, Candidate]
) -> tuple[Plan, tuple[str, ...]]:
    """The plan with a frozen copy of each new layer that the file lacks, as PEFT's may; the adapter's next file holds them."""
    fresh = find_fresh_parts(model, plan.config, found, replace(plan.origins, unknown=frozenset()))
    taken = [*file.base, *(site.name for site in plan.adapters)]
    names = tuple(n for n in (*fresh.trained, *fresh.kept) if not any(within(each, {n}) for each in taken))
    sites = [SavedSite(name, found[name], None, False) for name in names]
    config = with_fresh_parts(plan.config, FreshParts(kept=names))
    return replace(plan, config=config, saved=(*plan.saved, *sites)), names


def _without(modules: Collection[str], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of all other modules, by their keys in a file."""
    if not modules:
        return tensors
    return {key: tensor for key, tensor in tensors.items() if not within(key.removeprefix(PREFIX), modules)}


def _as_saved(site: SavedSite, file: AdapterFile) -> SavedSite:
    """A module to train in full, as the file has it: of a tied head, all but the weight may be the base's or missing."""
    trains, own = site.name not in file.kept, {f"{PREFIX}{site.name}.{key}" for key in site.only or ()}
    leaves = site.tied_to is not None and not (trains and own & file.shapes.keys())
    return replace(site, trains=trains, only=() if leaves else site.only)


def _as_tied(file: AdapterFile, config: AdapterConfig, model: nn.Module) -> AdapterConfig:
    """The configuration, without ``ensure_weight_tying`` if PEFT did not tie: its file repeats no tensors of tied layers then.

    PEFT ties only what it finds under the names ``embed_tokens`` and ``lm_head``.
    """
    if file.ties:
        return _tying(config, True)
    if file.is_own or not config.ensure_weight_tying:
        return config
    wanted = plan_injection(model, config, every_pattern=False)
    followers = {site.name: site.tied_to for site in wanted.adapters if site.tied_to is not None}
    adapted = _has_factors_of(file, followers) and _has_factors_of(file, followers.values())
    copies = [(site.name, site.tied_to) for site in wanted.saved if site.tied_to is not None]
    copied = any(_are_equal(file, *(f"{PREFIX}{name}.weight" for name in pair)) for pair in copies)
    return config if adapted or copied else _tying(config, False)


def _has_factors_of(file: AdapterFile, names: Iterable[str]) -> bool:
    starts = tuple(f"{PREFIX}{name}.lora_" for name in names)
    return any(key.startswith(starts) for key in file.shapes)


def _are_equal(file: AdapterFile, *keys: str) -> bool:
    """Whether these tensors are in a file, and the same; whole tables of a resized base have such keys, too."""
    values = file.read([key for key in keys if key in file.shapes])
    return len(values) == len(keys) and all(torch.equal(value, values[keys[0]]) for value in values.values())


def _tying(config: AdapterConfig, ties: bool) -> AdapterConfig:
    option: dict[str, Any] = {"ensure_weight_tying": ties}
    return replace(config, **option)


def warn_if_idle(directory: Path, parts: Parts) -> None:
    """Warn about an adapter that is loaded to be used and leaves the model as it is."""
    if not parts.copies and all(map(_is_zero, parts.adapters)):
        warn(f"{directory}: every update is zero, so this adapter changes nothing; was it ever trained?")


def _is_zero(adapter: Adapter) -> bool:
    """Whether the update is a product with a factor of zeros, or a change of rows by zero."""
    rows, factors = adapter.changed_rows(), adapter.factors()
    if rows is not None:
        return not rows[1].any()
    return factors is not None and not all(factor.any() for factor in factors)
