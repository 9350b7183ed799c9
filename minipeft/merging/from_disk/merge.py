"""Merging an adapter into a checkpoint on disk: one tensor of the base in memory at a time, all or nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from minipeft.ecosystem.transformers_model import says_tied
from minipeft.errors import MergeError, all_or_nothing, shown
from minipeft.files.empty_model import empty_model
from minipeft.files.format import config_in, open_adapter
from minipeft.files.hub import adapter_directory, base_directory
from minipeft.files.load import load_parts, warn_if_idle
from minipeft.files.reading import as_path, reading
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.injection.attach import attach
from minipeft.injection.module_tree import TensorIndex, adapted_layers
from minipeft.kernels.full_precision import full_precision
from minipeft.layers.offloaded import present
from minipeft.merging.from_disk.base import Base, open_base
from minipeft.merging.from_disk.check import Checked, check_files
from minipeft.merging.from_disk.disk_model import DiskModel, connect
from minipeft.merging.from_disk.folder import check_place, small_files, whole_folder, write_index, write_small_files
from minipeft.merging.from_disk.layout import Sink, shards_to_write, write_new_copies
from minipeft.merging.from_disk.outcome import Outcome, settle
from minipeft.merging.from_disk.shards import ShardWriter, open_shards
from minipeft.merging.mergeable_model import MergeableModel
from minipeft.merging.plan import Options, plan_step
from minipeft.merging.report import MergeReport

logger = logging.getLogger("minipeft")
NAME = "default"
SPARE = 2**20  # bytes for headers and small changes


@dataclass(frozen=True)
class DiskMerge:
    """What a merge on disk did.

    Attributes:
        report: what rounding cost, as of `merge_and_unload`.
        out: the directory of the merged model.
        files: bytes of each weight file in it.
        changed: how many tensors were written.
        copied: how many were copied, bit for bit.
        checked: what was read again and compared.
        config: keys of ``config.json`` with another value than in the base.
        small_files: the other files, and where each comes from.
    """

    report: MergeReport
    out: Path
    files: Mapping[str, int]
    changed: int
    copied: int
    checked: Checked
    config: Mapping[str, Any]
    small_files: Mapping[str, Path]


@all_or_nothing
@torch.no_grad()
@full_precision()
def merge_from_disk(
    base: str | PathLike[str],
    adapter: str | PathLike[str],
    out: str | PathLike[str],
    *,
    untie: bool = False,
    allow_base_mismatch: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    progressbar: bool = False,
) -> DiskMerge:
    """Merge an adapter into a transformers checkpoint without loading that: tensor by tensor, from directory to directory.

    The merged tensors are bit for bit those that `load_adapter`, `merge_and_unload` and `save_pretrained` give, in the dtype
    that the base stores. All others are copied. The files, their names and their order are the base's, its configuration,
    generation configuration and tokenizer come along; a tokenizer that was saved with the adapter goes before the base's.
    Memory holds the adapter and one weight of the base, with its update in float32. What the base stores together and the
    model has apart, or the other way round, such as the experts of a mixture, counts as one weight.

    Args:
        base: a directory with ``config.json`` and safetensors files, or a model on the hub.
        adapter: as for `load_adapter`.
        out: a new directory. It appears when all is written and checked; after an error or Ctrl-C there is none.
        untie: give a weight that is tied elsewhere (GPT-2's embedding and head) its own copy instead of refusing.
        allow_base_mismatch: skip the comparison of the base with samples in the adapter's file.
        revision, token, local_files_only: for the base on the hub; the last two for the adapter too.
        progressbar: show one on stderr.

    Raises:
        CheckpointError: a directory cannot be read or written, or is not what it should be.
        MergeError: the base is quantized, or the adapter cannot be merged into it.
        MinipeftError: the adapter does not fit the base, see `load_adapter`.
    """
    place = as_path(out, "out")
    adapter_folder = adapter_directory(adapter, token=token, local_files_only=local_files_only)
    base_folder = base_directory(base, revision=revision, token=token, local_files_only=local_files_only)
    check_place(place, base_folder, adapter_folder)
    checkpoint = open_base(base_folder)
    disk, config = _adapted(checkpoint, adapter_folder, allow_base_mismatch)
    was_tied = says_tied(disk.model)
    outcome = settle(disk, NAME, untie=untie)
    if was_tied and not says_tied(disk.model):
        config["tie_word_embeddings"] = False
    shards = shards_to_write(checkpoint, disk, outcome, only_known="architectures" in config)
    with reading(base_folder):
        small = small_files(base_folder, adapter_folder)
        extra = sum(path.stat().st_size for path in small.values())
    entries = [entry for shard in shards.values() for entry in shard]
    with whole_folder(place, sum(entry.nbytes for entry in entries) + extra + SPARE) as folder:
        with open_shards(folder, shards, checkpoint.metadata) as writers:
            report = _write(disk, outcome, writers, progressbar)
            checked = check_files(folder, disk, outcome, writers)
        write_index(folder, checkpoint, shards)
        write_small_files(folder, checkpoint, small, config)
    logger.info("%s", report)
    sizes = {name: (place / name).stat().st_size for name in shards}
    copies = sum(entry.source is not None for entry in entries)
    return DiskMerge(report, place, sizes, len(entries) - copies, copies, checked, config, small)


def _adapted(base: Base, folder: Path, allow_base_mismatch: bool) -> tuple[DiskModel, dict[str, Any]]:
    """The base with the adapter on it, and what its configuration says otherwise than the base's file."""
    file = open_adapter(folder)
    made = empty_model(base.folder, base.config, file, (config_in(folder) or {}).get("auto_mapping"))
    disk = connect(made.model, base)
    lost = [name for name in file.base if name in disk.state and disk.source(name) is None]
    if lost:
        raise MergeError(
            f"{shown(lost)}: the adapter was trained with values for it that neither the base nor the adapter has. Save the "
            "model that it was trained on, and merge into that."
        )
    plan, parts, _ = load_parts(made.model, folder, strict=True, allow_base_mismatch=allow_base_mismatch)
    attach(made.model, MergeableModel, plan, parts, NAME, trainable=False)
    warn_if_idle(folder, parts)
    for _, layer in adapted_layers(made.model):
        layer.stored = None  # what reads a weight here wants the base's own
    return disk, made.changed


def _write(disk: DiskModel, outcome: Outcome, writers: Mapping[str, ShardWriter], progressbar: bool) -> MergeReport:
    """Copy what stays, then write what changes, layer by layer."""
    sink, errors = Sink(disk, outcome, writers), dict[str, float]()
    total = sum(entry.source is not None for writer in writers.values() for entry in writer.entries)
    with tqdm(total=total + len(outcome.layers), desc="merging", unit="tensor", disable=not progressbar) as bar:
        for writer in writers.values():
            for _ in writer.copy():
                bar.update()
        write_new_copies(disk, outcome, sink)
        for value in outcome.values:
            if value.trained is not None:
                sink.put(value, value.trained)
        values = outcome.by_name
        for path, layer, names in outcome.layers:
            with present(layer.owner):
                errors[path] = _merge_one(disk.model, path, layer)
                for name in names:
                    parameter = layer.owner._parameters[name.rpartition(".")[2]]
                    assert parameter is not None
                    sink.put(values[name], parameter.detach())
            bar.update()
    for writer in writers.values():
        writer.finish()
    return MergeReport(errors)


def _merge_one(model: nn.Module, path: str, layer: AdaptedLayer) -> float:
    """Fold the adapter into one layer, whose weights are present, as `merge_and_unload` does; returns what rounding cost."""
    layer.merged = ()
    # Ties were seen to before, by name, so the layer counts as the only owner of its weight here.
    step = plan_step(model, path, layer, (NAME,), (), TensorIndex(layer.owner), Options(undoable=False))
    step.apply()
    return step.relative_error or 0.0
