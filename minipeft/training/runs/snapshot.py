"""The state of a run at one moment, copied, and how it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from minipeft.errors import CheckpointError
from minipeft.files.save import save_adapter
from minipeft.training.runs.faults import fault_point

OPTIMIZER_FILE, RNG_FILE, STATE_FILE = "optimizer.safetensors", "rng.safetensors", "state.json"
MARGIN_BYTES = 2**20  # for headers, state.json and COMPLETE


@dataclass(frozen=True)
class Snapshot:
    """A copy of the state in main memory, of all processes together; to be written into a checkpoint's folder."""

    adapter: Mapping[str, Tensor]
    adapter_config: Mapping[str, Any]
    base: Mapping[str, Any]
    optimizer: Mapping[str, Tensor]
    rng: Mapping[str, Tensor]
    state: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes on a disk, about."""
        tensors = [*self.adapter.values(), *self.optimizer.values(), *self.rng.values()]
        return sum(tensor.nbytes for tensor in tensors) + MARGIN_BYTES

    def write(self, folder: Path) -> None:
        """Put the files into a folder.

        Raises:
            OSError, SafetensorError, CheckpointError: they cannot be written; `Checkpoints.save` makes one of these.
        """
        save_adapter(folder, self.adapter, self.adapter_config, self.base)
        fault_point("adapter_written")
        safetensors.torch.save_file(dict(self.optimizer), folder / OPTIMIZER_FILE)
        fault_point("optimizer_written")
        safetensors.torch.save_file(dict(self.rng), folder / RNG_FILE)
        (folder / STATE_FILE).write_text(json.dumps(self.state, indent=1, allow_nan=False) + "\n", "utf-8")


@dataclass
class Collected:
    """Whole tensors, copied to main memory where they are wanted; every process helps with those that are sharded."""

    keep: bool
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def put(self, name: str, tensor: Tensor) -> None:
        """Take a tensor under a name.

        Raises:
            CheckpointError: the name is taken, or it is no plain, dense tensor.
        """
        if name in self.tensors or tensor.layout != torch.strided:
            raise CheckpointError(f"{name}: this tensor's name stands for two, or it is sparse; neither can be saved.")
        whole = tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()
        if type(whole) not in (Tensor, torch.nn.Parameter):
            raise CheckpointError(f"{name} is a {type(whole).__name__}, which cannot be saved; plain tensors can.")
        if self.keep:
            self.tensors[name] = whole.to("cpu", copy=True, memory_format=torch.contiguous_format)
