"""All that a training run needs to go on after an interruption as if there had been none, bit for bit.

    state = TrainingState(model, optimizer, scheduler, config=vars(args))
    state.save(checkpoints, step, position)                   # every process calls it, the first one writes
    progress = state.restore(checkpoints.latest())            # in a new process

A checkpoint is a folder with the adapter in PEFT's format, which `minipeft.load_adapter` reads as it is, and with
``optimizer.safetensors``, ``rng.safetensors`` and ``state.json``. There is no pickle, neither written nor read.
"""

from __future__ import annotations

import json
import math
import os
import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from minipeft.errors import CheckpointError, ConfigError, StateError, shown
from minipeft.files.base_samples import base_samples
from minipeft.files.format import CONFIG_FILE, WEIGHTS_FILE, open_adapter
from minipeft.files.model_card import write_card
from minipeft.files.save import file_config, save_adapter
from minipeft.model import AdaptedModel
from minipeft.step_hooks import check_schedule_state, load_schedule_state, schedule_state
from minipeft.training.distributed.ranks import agree, rank_and_world_size
from minipeft.training.runs.checkpoints import Checkpoints, verify
from minipeft.training.runs.differences import config_differences
from minipeft.training.runs.optimizer_state import (
    load_exactly,
    named_groups,
    optimizer_from_plain,
    optimizer_to_plain,
    sharded_like,
)
from minipeft.training.runs.plain import checked_json, from_plain, to_plain
from minipeft.training.runs.rng import check_rng_state, gathered_rng_states, set_rng_state
from minipeft.training.runs.snapshot import OPTIMIZER_FILE, RNG_FILE, STATE_FILE, Collected, Snapshot

FORMAT = 1


class Stateful(Protocol):
    """What a scheduler or a gradient scaler can do, Accelerate's wrappers of them too."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: number of updates done.
        position: where it is in the data, as the run put it.
    """

    step: int
    position: Any


class TrainingState:
    """The live objects of a run, to be saved and restored together.

    Args:
        model: the adapted model itself, out of DDP and ``torch.compile`` (``accelerator.unwrap_model``); its layers
            may be sharded by ``fully_shard``.
        optimizer: of the adapter's parameters, and no other.
        scheduler: of its learning rate, if any.
        scaler: for float16, if any.
        config: the run's resolved configuration, as JSON can hold it; compared when the run goes on.
        adapter_name: None: the only adapter.

    Raises:
        StateError: the model is not adapted, or the optimizer trains something else.
        ConfigError: the configuration is not plain JSON.
    """

    def __init__(
        self,
        model: AdaptedModel,
        optimizer: Optimizer,
        scheduler: Stateful | None = None,
        *,
        scaler: Stateful | None = None,
        config: Mapping[str, Any] | None = None,
        adapter_name: str | None = None,
    ) -> None:
        if not isinstance(model, AdaptedModel):
            raise StateError(f"model must be the adapted model itself, unwrapped, not {type(model).__name__}.")
        if adapter_name is None and len(model.adapter_configs) > 1:
            raise StateError(f"there are several adapters ({shown(model.adapter_configs)}); name one.")
        self.model = model
        self.optimizer = optimizer
        self.helpers = {"scheduler": scheduler, "scaler": scaler}
        self.config = checked_json(dict(config or {}), "config")
        self.adapter_name = adapter_name or next(iter(model.adapter_configs))
        self._groups(self._live())

    # --------------------------------------------------------------------------------------------------------- saving
    def save(self, checkpoints: Checkpoints, step: int, position: Any = None) -> Path:
        """Save a checkpoint. Every process calls it, between two updates; all return, or raise, when it is over.

        Args:
            checkpoints: of the run.
            step: number of updates done.
            position: where the run is in its data, as JSON can hold it.

        Returns:
            The folder of the checkpoint.

        Raises:
            CheckpointError: it could not be written; the run can go on, and try again later.
        """
        snapshot = self.capture(step, position)
        error = None
        if snapshot is not None:
            try:
                checkpoints.save(step, snapshot.write, needed=snapshot.nbytes)
            except Exception as caught:
                error = caught
        agree(error)
        return checkpoints.folder / f"step-{step:08d}"

    def capture(self, step: int, position: Any = None) -> Snapshot | None:
        """Copy the state. Every process calls it; the first one gets the copy, the others None.

        Raises:
            ConfigError: `position` is not plain JSON.
            CheckpointError: the optimizer, the scheduler or the scaler keeps something that cannot be saved.
        """
        rank, world_size = rank_and_world_size()
        live = self._live()
        adapter, others = Collected(rank == 0), Collected(rank == 0)
        for key, tensor in live.items():
            adapter.put(key, tensor)
        optimizer = optimizer_to_plain(self.optimizer, self._groups(live), others.put)
        helpers = {
            name: None if helper is None else to_plain(helper.state_dict(), name, others.put)
            for name, helper in self.helpers.items()
        }
        state = {
            "format": FORMAT,
            "step": step,
            "position": checked_json(position, "position"),
            "config": self.config,
            "world_size": world_size,
            "versions": _versions(),
            "optimizer": optimizer,
            "schedule": to_plain(schedule_state(self.model, self.adapter_name), "schedule", others.put),
            **helpers,
        }
        rng = gathered_rng_states()
        if rank != 0:
            return None
        name = self.adapter_name
        config = file_config(self.model, self.model.adapter_configs[name], name, compact=False)
        base = base_samples(self.model, name)
        return Snapshot(adapter.tensors, config, base, others.tensors, rng, state)

    def save_adapter(self, directory: str | os.PathLike[str]) -> None:
        """Save the adapter alone, as `save_pretrained` does, also where the model is sharded. Every process calls it.

        Raises:
            CheckpointError: the directory cannot be written, or holds a whole model.
        """
        adapter, name, error = Collected(rank_and_world_size()[0] == 0), self.adapter_name, None
        for key, tensor in self._live().items():
            adapter.put(key, tensor)
        if adapter.keep:
            config = file_config(self.model, self.model.adapter_configs[name], name)
            try:
                save_adapter(Path(directory), adapter.tensors, config, base_samples(self.model, name))
                write_card(Path(directory), config, sum(tensor.numel() for tensor in adapter.tensors.values()))
            except Exception as caught:
                error = caught
        agree(error)

    # ------------------------------------------------------------------------------------------------------ restoring
    def restore(
        self, folder: str | os.PathLike[str], *, may_differ: Sequence[str] = (), exact: bool = True
    ) -> Progress:
        """Put the live objects into the state of a checkpoint. Every process calls it; all restore it, or none does.

        Everything is read and compared before anything is changed.

        Args:
            folder: a checkpoint, such as `Checkpoints.latest` gives.
            may_differ: keys of the configuration that may have changed, ``"a.b"`` for one within another.
            exact: False: also go on with another number of processes, or other devices; the random generators are then
                left as they are.

        Returns:
            Where the run stood.

        Raises:
            CheckpointError: a file is damaged, or is of another adapter, base, optimizer or number of processes.
            ConfigError: the configuration differs.
        """
        loaded, error = None, None
        try:
            loaded = self._read(Path(folder), may_differ, exact)
        except Exception as caught:
            error = caught
        agree(error)
        assert loaded is not None
        adapter, optimizer, schedule, helpers, rng, progress = loaded
        with torch.no_grad():
            for key, tensor in self._live().items():
                tensor.copy_(sharded_like(tensor, adapter[key]))
        load_exactly(self.optimizer, optimizer)
        load_schedule_state(self.model, self.adapter_name, schedule)
        for name, helper in self.helpers.items():
            if helper is not None:
                helper.load_state_dict(helpers[name])
        if rng:  # last, so that nothing draws after it
            set_rng_state(rng)
        return progress

    def _read(
        self, folder: Path, may_differ: Sequence[str], exact: bool
    ) -> tuple[dict[str, Tensor], dict[str, Any], Any, dict[str, Any], dict[str, Tensor], Progress]:
        files = verify(folder)
        if files.keys() != {CONFIG_FILE, WEIGHTS_FILE, OPTIMIZER_FILE, RNG_FILE, STATE_FILE}:
            raise CheckpointError(f"{folder} is no checkpoint of a training run: it has {shown(files)}.")
        try:
            state = json.loads(files[STATE_FILE].read_bytes())
            if state["format"] != FORMAT:
                raise CheckpointError(f"it has format {state['format']!r}, and this version reads {FORMAT}.")
            self._compare_runs(folder, state, may_differ, exact)
            adapter = self._read_adapter(folder)
            tensors = _tensors(files[OPTIMIZER_FILE])
            helpers = {name: self._read_helper(name, state[name], tensors) for name in self.helpers}
            groups = self._groups(self._live())
            optimizer = optimizer_from_plain(state["optimizer"], self.optimizer, groups, tensors.__getitem__)
            rng = _random_state(files[RNG_FILE], state["world_size"], exact)
            schedule = from_plain(state.get("schedule"), tensors.__getitem__)
            check_schedule_state(self.model, self.adapter_name, schedule)
            return adapter, optimizer, schedule, helpers, rng, Progress(state["step"], state["position"])
        except ConfigError:
            raise
        except CheckpointError as error:
            raise CheckpointError(f"{folder} cannot be gone on from: {error} Nothing was loaded.") from None
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{folder} is no checkpoint of this format ({error!r:.200}); nothing was loaded."
            ) from None

    def _compare_runs(self, folder: Path, state: Mapping[str, Any], may_differ: Sequence[str], exact: bool) -> None:
        differences = config_differences(state["config"], self.config, may_differ)
        if differences:
            raise ConfigError(
                f"{folder} is of a run with another configuration: {'; '.join(differences)}. Nothing was loaded; give "
                "what was given then, or begin a new run in another directory."
            )
        world_size = rank_and_world_size()[1]
        if state["world_size"] != world_size and exact:
            raise CheckpointError(
                f"its run had {state['world_size']} processes, and here are {world_size}, which draw other random "
                "numbers. Start as many, or allow it with exact=False."
            )
        then, now = state["versions"], _versions()
        others = [f"{name} {then.get(name)} then, {now[name]} now" for name in now if then.get(name) != now[name]]
        if others:
            warnings.warn(f"{folder}: {'; '.join(others)}; the same numbers are not promised.", stacklevel=4)

    def _read_adapter(self, folder: Path) -> dict[str, Tensor]:
        file, live = open_adapter(folder), self._live()
        saved = _tensors(folder / WEIGHTS_FILE)
        if saved.keys() != live.keys():
            missing, unexpected = sorted(live.keys() - saved.keys()), sorted(saved.keys() - live.keys())
            raise CheckpointError(
                f"it is of another adapter: missing {shown(missing, 3)}; unexpected {shown(unexpected, 3)}."
            )
        for key, tensor in live.items():
            then, now = (tuple(saved[key].shape), saved[key].dtype), (tuple(tensor.shape), tensor.dtype)
            if then != now:
                raise CheckpointError(f"{key} is {then[0]} {then[1]} there, and {now[0]} {now[1]} here.")
        here = base_samples(self.model, self.adapter_name)
        for name, values in file.base.items():
            if len(here.get(name, ())) == len(values) and not all(map(_alike, values, here[name])):
                raise CheckpointError(f"it was trained on another base: the weights of {name} differ.")
        return saved

    def _read_helper(self, name: str, saved: Any, tensors: Mapping[str, Tensor]) -> Any:
        helper = self.helpers[name]
        if (helper is None) != (saved is None):
            there, here = ("no", "a") if saved is None else ("a", "no")
            raise CheckpointError(f"the run then had {there} {name}, and now has {here}.")
        state = from_plain(saved, tensors.__getitem__)
        other = () if helper is None else state.keys() ^ helper.state_dict().keys()
        if other:
            raise CheckpointError(f"the {name} is of another kind: {shown(sorted(other))} differ.")
        return state

    # ------------------------------------------------------------------------------------------------------ internals
    def _live(self) -> dict[str, Tensor]:
        """The adapter's tensors by their keys in a file, each process's share of them where the model is sharded."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after an evaluation the outermost still has its parameters whole
        return self.model.adapter_state_dict(self.adapter_name)

    def _groups(self, live: Mapping[str, Tensor]) -> list[list[str]]:
        return named_groups(self.optimizer, {id(tensor): key for key, tensor in live.items()})


def _alike(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-4)  # of the same dtype, so equal but for the rounding to 6 digits


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": str(torch.__version__)}


def _tensors(path: Path) -> dict[str, Tensor]:
    # Copied, since the library maps the file, which is removed with its checkpoint while the run goes on.
    return {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}


def _random_state(path: Path, world_size: int, exact: bool) -> dict[str, Tensor]:
    """This process's generators; none, where another number of processes or of devices is allowed and there is."""
    rank, world_size_now = rank_and_world_size()
    prefix = f"rank{rank}."
    states = {name.removeprefix(prefix): t for name, t in _tensors(path).items() if name.startswith(prefix)}
    try:
        check_rng_state(states)
    except CheckpointError:
        if exact:
            raise
        return {}
    return states if world_size == world_size_now else {}
