"""The live objects of a run, a copy of their state at one moment, and how it is written."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from minipeft.errors import CheckpointError
from minipeft.files.base_samples import base_samples
from minipeft.files.save import file_config, save_adapter
from minipeft.injection.step_hooks import schedule_state
from minipeft.model import AdaptedModel
from minipeft.training.distributed.ranks import rank_and_world_size
from minipeft.training.runs.optimizer_state import named_groups, optimizer_to_plain
from minipeft.training.runs.plain import checked_json, to_plain
from minipeft.training.runs.rng import gathered_rng_states

OPTIMIZER_FILE, RNG_FILE, STATE_FILE = "optimizer.safetensors", "rng.safetensors", "state.json"
FORMAT = 1
MARGIN_BYTES = 2**20  # for headers, state.json and COMPLETE


class Stateful(Protocol):
    """What a scheduler or a gradient scaler can do; Accelerate's wrappers of them too."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...


@dataclass(frozen=True)
class Live:
    """The live objects of a run."""

    model: AdaptedModel  # the adapted model itself
    adapter_name: str  # the adapter that trains
    optimizer: Optimizer  # of its parameters
    helpers: Mapping[str, Stateful | None]  # scheduler and scaler by name; None if the run has none
    config: Mapping[str, Any]  # of the run, plain JSON

    def tensors(self) -> dict[str, Tensor]:
        """The adapter's tensors by their keys in a file; of a sharded model, this process's share of each."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # an evaluation leaves the outermost module's parameters whole
        return self.model.adapter_state_dict(self.adapter_name)

    def groups(self) -> list[list[str]]:
        """The keys of the parameters of each group of the optimizer; raises StateError if it trains anything else."""
        return named_groups(self.optimizer, {id(tensor): key for key, tensor in self.tensors().items()})


def versions() -> dict[str, str]:
    """Versions that the exact numbers of a run depend on."""
    return {"python": platform.python_version(), "torch": str(torch.__version__)}


@dataclass(frozen=True)
class Snapshot:
    """A copy of the state of all processes in main memory, to be written into a checkpoint's folder."""

    adapter: Mapping[str, Tensor]
    adapter_config: Mapping[str, Any]
    base: Mapping[str, Any]
    optimizer: Mapping[str, Tensor]
    rng: Mapping[str, Tensor]
    state: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes on disk, roughly."""
        tensors = [*self.adapter.values(), *self.optimizer.values(), *self.rng.values()]
        return sum(tensor.nbytes for tensor in tensors) + MARGIN_BYTES

    def write(self, folder: Path) -> None:
        """Write the files into a folder.

        Raises:
            OSError, SafetensorError, CheckpointError: a file cannot be written; `Checkpoints.save` catches all three.
        """
        save_adapter(folder, self.adapter, self.adapter_config, self.base)
        safetensors.torch.save_file(dict(self.optimizer), folder / OPTIMIZER_FILE)
        safetensors.torch.save_file(dict(self.rng), folder / RNG_FILE)
        (folder / STATE_FILE).write_text(json.dumps(self.state, indent=1, allow_nan=False) + "\n", "utf-8")


def capture(live: Live, step: int, position: Any) -> Snapshot | None:
    """Copy the state of a run. Every process calls it; the first one gets the copy, the others None.

    Raises:
        ConfigError: `position` is not plain JSON.
        CheckpointError: the optimizer, the scheduler or the scaler keeps something that cannot be saved.
    """
    rank, world_size = rank_and_world_size()
    adapter, others = Collected(rank == 0), Collected(rank == 0)
    for key, tensor in live.tensors().items():
        adapter.put(key, tensor)
    state = {
        "format": FORMAT,
        "step": step,
        "position": checked_json(position, "position"),
        "config": live.config,
        "world_size": world_size,
        "versions": versions(),
        "optimizer": optimizer_to_plain(live.optimizer, live.groups(), others.put),
        "schedule": to_plain(schedule_state(live.model, live.adapter_name), "schedule", others.put),
    }
    for name, helper in live.helpers.items():
        state[name] = None if helper is None else to_plain(helper.state_dict(), name, others.put)
    rng = gathered_rng_states()
    if rank != 0:
        return None
    name = live.adapter_name
    config = file_config(live.model, live.model.adapter_configs[name], name, compact=False)
    return Snapshot(adapter.tensors, config, base_samples(live.model, name), others.tensors, rng, state)


@dataclass
class Collected:
    """Whole tensors, copied to main memory if `keep`. Every process takes part, as a sharded tensor needs all."""

    keep: bool
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def put(self, name: str, tensor: Tensor) -> None:
        """Take a tensor under a name; raises CheckpointError if the name is taken, or the tensor is not plain and dense."""
        if name in self.tensors or tensor.layout != torch.strided:
            raise CheckpointError(f"{name} names two tensors, or a sparse one; neither can be saved.")
        whole = tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()
        if type(whole) not in (Tensor, torch.nn.Parameter):
            raise CheckpointError(f"{name} is a {type(whole).__name__}, which cannot be saved; plain tensors can.")
        if self.keep:
            self.tensors[name] = whole.to("cpu", copy=True, memory_format=torch.contiguous_format)
