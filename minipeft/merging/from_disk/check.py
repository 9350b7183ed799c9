"""Reading the merged files again: sampled rows must be what the base and the adapter give, computed anew in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from minipeft.errors import MergeError
from minipeft.injection.adapted_layer import AdaptedLayer
from minipeft.kernels.functional import accumulation_dtype
from minipeft.layers.base import LayerOps
from minipeft.layers.offloaded import present
from minipeft.merging.from_disk.disk_model import DiskModel
from minipeft.merging.from_disk.names import Group, Renamed, empty_like
from minipeft.merging.from_disk.outcome import Outcome
from minipeft.merging.from_disk.shards import ShardWriter
from minipeft.merging.from_disk.stored import StoredTensor, stored_tensors
from minipeft.methods.base import Adapter

ROWS = 4  # of each weight
# Elements; a larger weight whose rows cannot be merged one by one is merged again as it was, not in float64.
LARGE = 2**24
SAMPLE = 64  # bytes of each tensor that was copied, at three places


@dataclass(frozen=True)
class Checked:
    """What was read again: rows of merged weights, and tensors that were copied or replaced."""

    rows: int
    tensors: int


@torch.no_grad()
def check_files(folder: Path, disk: DiskModel, outcome: Outcome, writers: Mapping[str, ShardWriter]) -> Checked:
    """Compare what lies in the merged files with what should; raises MergeError if a value is another one."""
    merged = {tensor.key: tensor for name in writers for tensor in stored_tensors(folder / name)[0]}
    copies = [entry for writer in writers.values() for entry in writer.entries if entry.source is not None]
    for entry in copies:
        assert entry.source is not None
        if _sampled(merged[entry.key]) != _sampled(entry.source):
            raise _differs(entry.key)
    groups, values = _merged_groups(disk, outcome, merged), outcome.by_name
    for name, value in values.items():
        if value.trained is not None and name in groups and not torch.equal(groups[name].read()[name], value.trained):
            raise _differs(name)
    rows = 0
    for path, layer, written in outcome.layers:
        name = written[0]
        stored = next(each for each in values[name].names if each in groups)
        rows += _check_layer(path, layer, name.rpartition(".")[2], groups[stored].read()[stored])
    return Checked(rows, len(copies))


def _merged_groups(disk: DiskModel, outcome: Outcome, merged: Mapping[str, StoredTensor]) -> dict[str, Group]:
    """What each parameter is stored as in the merged files."""
    groups: dict[str, Group] = {}
    for name, group in {**disk.groups, **disk.unfit}.items():
        stored = tuple(merged[tensor.key] for tensor in group.stored)
        again = replace(group, stored=stored)
        # The rows of a vocabulary, or the labels of a head, may be more than they were.
        groups[name] = Renamed(stored, {name: empty_like(stored[0])}) if isinstance(group, Renamed) else again
    for value in outcome.values:
        name = value.names[0]
        if name in merged and name not in groups:
            groups[name] = Renamed((merged[name],), {name: empty_like(merged[name])})
    return groups


def _sampled(tensor: StoredTensor) -> list[bytes]:
    with tensor.path.open("rb") as file:
        found = []
        for place in (0, tensor.nbytes // 2, max(0, tensor.nbytes - SAMPLE)):
            file.seek(tensor.start + place)
            found.append(file.read(min(SAMPLE, tensor.nbytes - place)))
        return found


def _differs(name: str) -> MergeError:
    return MergeError(f"{name} was read again after it was written, and differs. Is the disk in order?")


def _check_layer(path: str, layer: AdaptedLayer, parameter: str, merged: Tensor) -> int:
    """Compare a merged weight, as it is stored, with what it should be; returns how many rows of it."""
    base, owner, ops = layer.base_layer, layer.owner, layer.ops
    (adapter,) = layer.adapters.values()
    assert isinstance(adapter, Adapter)
    with present(owner):
        weight, bias = ops.read_weight(base).detach(), ops.read_bias(base)
        rows = torch.linspace(0, len(weight) - 1, min(ROWS, len(weight)), dtype=torch.float64).long()
        exact, size = _exact_rows(adapter, ops, weight, bias, rows)
        before = owner._parameters[parameter]
        owner._parameters[parameter] = nn.Parameter(merged, requires_grad=False)
        try:
            written = ops.read_weight(base).detach()[rows].double()
        finally:
            owner._parameters[parameter] = before
    wide = torch.finfo(accumulation_dtype(merged)).eps
    allowed = torch.finfo(merged.dtype).eps * exact.abs() + 1000 * wide * size
    if not ((written - exact).abs() <= allowed).all():
        raise _differs(path)
    return len(rows)


def _exact_rows(
    adapter: Adapter, ops: LayerOps, weight: Tensor, bias: Tensor | None, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows of the merged weight in float64, and the size of what they are made of."""
    factors, changed = adapter.factors(), adapter.changed_rows()
    own = weight[rows].double()
    if factors is not None:
        up, down = factors[0][rows].double(), factors[1].double()
        return own + up @ down, own.abs().amax() + up.abs().amax() * down.abs().amax()
    if changed is not None:
        update, (places, change) = torch.zeros_like(own), changed
        if ops.is_embedding:
            update[:, places] = change.double().t()[rows]
        else:
            here = (rows[:, None] == places).nonzero()
            update[here[:, 0]] = change[here[:, 1]].double()
        return own + update, own.abs().amax() + update.abs().amax()
    twin, dtype = adapter, accumulation_dtype(weight)
    if weight.numel() <= LARGE:
        twin, dtype = copy.deepcopy(adapter).double(), torch.float64
    wide = weight.to(dtype), None if bias is None else bias.detach().to(dtype)
    exact = twin.merge_after(*wide, *wide)[0][rows].double()
    return exact, exact.abs().amax() + own.abs().amax()
