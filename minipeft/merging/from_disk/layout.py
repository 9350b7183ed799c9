"""Where each value of the merged model goes: into the files and under the keys of the base, and new ones next to them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from minipeft.merging.from_disk.base import Base
from minipeft.merging.from_disk.disk_model import DiskModel
from minipeft.merging.from_disk.names import Renamed
from minipeft.merging.from_disk.outcome import Outcome, Value
from minipeft.merging.from_disk.shards import Entry, ShardWriter, copied, to_write


def shards_to_write(base: Base, disk: DiskModel, outcome: Outcome, *, only_known: bool) -> dict[str, list[Entry]]:
    """The tensors of each file. A new one goes to the end of the last file; without any, the order is the base's.

    `only_known` leaves out what the model does not have, such as the head of another task. Raises MergeError if what is stored
    together could not be written back.
    """
    changed: dict[str, Entry] = {}
    for value in outcome.values:
        for name in value.names if value.changes else ():
            group = disk.stored_as(name)
            if isinstance(group, Renamed):
                key = group.stored[0].key
                changed[key] = to_write(key, like(disk, value))
            elif group is not None:
                meta = group.written(dict(group.made))  # also finds out whether that is possible
                changed |= {key: to_write(key, tensor) for key, tensor in meta.items()}
    groups = (*disk.groups.values(), *disk.unfit.values())
    known = {tensor.key for group in groups for tensor in group.stored} if only_known else base.tensors.keys()
    shards = {
        name: [changed.get(tensor.key, copied(tensor)) for tensor in tensors if tensor.key in known]
        for name, tensors in base.shards.items()
    }
    new = [entry for value in outcome.values if (entry := _new(disk, value)) is not None]
    if new:
        last = max(shards)
        # Wide dtypes first, as the library writes them, so that each tensor is aligned.
        shards[last] = sorted([*shards[last], *new], key=lambda entry: -_width(entry))
    return shards


def like(disk: DiskModel, value: Value) -> Tensor:
    """A tensor of the shape and dtype of a value."""
    return disk.state[value.names[0]] if value.trained is None else value.trained


def _new(disk: DiskModel, value: Value) -> Entry | None:
    """The entry of a value that the base stores under none of its names, if there is one."""
    if any(disk.stored_as(name) for name in value.names):
        return None
    if value.changes:
        return to_write(value.names[0], like(disk, value))
    source = disk.source(value.names[0])
    if source is None:
        return None  # a weight that the base does not have either
    if isinstance(source, Renamed) and source.stored[0].shape == disk.state[value.names[0]].shape:
        return copied(source.stored[0], value.names[0])
    return to_write(value.names[0], like(disk, value))


def _width(entry: Entry) -> int:
    numel = math.prod(entry.shape)
    return entry.nbytes // numel if numel else 0


class Sink:
    """Takes the values of the merged model, and writes what is stored together once all of it is there."""

    def __init__(self, disk: DiskModel, outcome: Outcome, writers: Mapping[str, ShardWriter]) -> None:
        self.disk = disk
        self.writer_of = {entry.key: writer for writer in writers.values() for entry in writer.entries}
        self.expected: dict[int, set[str]] = {}
        self.waiting: dict[int, dict[str, Tensor]] = {}
        for value in outcome.values:
            for name in value.names if value.changes else ():
                group = disk.stored_as(name)
                if group is not None:
                    self.expected.setdefault(id(group), set()).add(name)

    def put(self, value: Value, tensor: Tensor) -> None:
        """Write a value, under each key that it has."""
        groups = {name: group for name in value.names if (group := self.disk.stored_as(name)) is not None}
        if not groups:
            self.write(value.names[0], tensor)
        for name, group in groups.items():
            here = self.waiting.setdefault(id(group), {})
            here[name] = tensor if isinstance(group, Renamed) else tensor.detach().clone()
            if here.keys() == self.expected[id(group)]:
                values = self.waiting.pop(id(group))
                rest = {} if len(values) == len(group.made) else group.read()
                for key, stored in group.written({**rest, **values}).items():
                    self.write(key, stored)

    def write(self, key: str, tensor: Tensor) -> None:
        """Write one stored tensor."""
        self.writer_of[key].write(key, tensor)


@torch.no_grad()
def write_new_copies(disk: DiskModel, outcome: Outcome, sink: Sink) -> None:
    """Write values of the base that get a key of their own and cannot be copied byte for byte."""
    for value in outcome.values:
        entry = _new(disk, value)
        source = disk.source(value.names[0])
        if entry is not None and entry.source is None and not value.changes and source is not None:
            name = next(each for each in disk.tied(value.names[0]) if each in source.made)
            sink.write(entry.key, source.read()[name])
