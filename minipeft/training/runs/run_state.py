"""All that a training run needs to resume after an interruption as if there had been none, bit for bit.

    state = TrainingState(model, optimizer, scheduler, config=vars(args))
    state.save(checkpoints, step, position)                   # every process calls it, the first one writes
    progress = state.restore(checkpoints.latest())            # in a new process

A checkpoint is a folder with the adapter in PEFT's format, which `minipeft.load_adapter` reads directly, and with
``optimizer.safetensors``, ``rng.safetensors`` and ``state.json``. No file is or contains a pickle.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from minipeft.errors import StateError, all_or_nothing, shown
from minipeft.files.reading import reading
from minipeft.files.resized_vocabulary import tables
from minipeft.files.save import named_tensors
from minipeft.injection.step_hooks import load_schedule_state, schedule_state
from minipeft.model import AdaptedModel
from minipeft.training.distributed.ranks import agreeing, rank_and_world_size
from minipeft.training.runs.checkpoints import Checkpoints
from minipeft.training.runs.optimizer_state import load_exactly, sharded_like
from minipeft.training.runs.plain import checked_json
from minipeft.training.runs.rng import rng_state, set_rng_state
from minipeft.training.runs.saved_run import Progress, SavedRun, read_run
from minipeft.training.runs.snapshot import Collected, Live, Snapshot, Stateful, capture


class TrainingState:
    """The live objects of a run, to be saved and restored together.

    Args:
        model: the adapted model itself, not its DDP or ``torch.compile`` wrapper (``accelerator.unwrap_model``); its
            layers may be sharded by ``fully_shard``.
        optimizer: of the adapter's parameters, and no others.
        scheduler: of its learning rate, if any.
        scaler: for float16, if any.
        config: the run's resolved configuration, plain JSON; it is compared when the run resumes.
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
        name = adapter_name or next(iter(model.adapter_configs))
        helpers = {"scheduler": scheduler, "scaler": scaler}
        self.live = Live(model, name, optimizer, helpers, checked_json(dict(config or {}), "config"))
        self.live.groups()

    def save(self, checkpoints: Checkpoints, step: int, position: Any = None) -> Path:
        """Save a checkpoint after `step` updates; returns its folder. `position` is the run's place in its data, plain JSON.

        Every process calls it between two updates; all return, or raise, when it is done.

        Raises:
            CheckpointError: it could not be written; the run can go on, and try again later.
        """
        snapshot = self.capture(step, position)
        with agreeing():
            if snapshot is not None:
                checkpoints.save(step, snapshot.write, needed=snapshot.nbytes)
        return checkpoints.folder / f"step-{step:08d}"

    def capture(self, step: int, position: Any = None) -> Snapshot | None:
        """Copy the state in memory; see `minipeft.training.runs.snapshot.capture`."""
        return capture(self.live, step, position)

    def save_adapter(self, directory: str | os.PathLike[str]) -> None:
        """Save the adapter alone, as `save_pretrained` does, even if the model is sharded. Every process calls it.

        Raises:
            CheckpointError: the directory cannot be written, or holds a whole model.
        """
        model, tensors = self.live.model, self.live.tensors()
        resized = (table.weight for table in tables(model).values() if table.is_resized)
        divided = (weight for weight in resized if isinstance(weight, DTensor))
        wanted = {id(tensor) for tensor in (*tensors.values(), *divided)}
        state = Collected(rank_and_world_size()[0] == 0)
        for name, tensor in {id(tensor): (name, tensor) for name, tensor in named_tensors(model)}.values():
            if id(tensor) in wanted:
                state.put(name, tensor)
        with agreeing():
            if state.keep:
                model.save_pretrained(directory, self.live.adapter_name, state_dict=state.tensors)

    @all_or_nothing
    def restore(
        self,
        folder: str | os.PathLike[str],
        *,
        may_differ: Sequence[str] = (),
        exact: bool = True,
        go_to: Callable[[Any], object] | None = None,
    ) -> Progress:
        """Put the live objects into the state of a checkpoint. Every process calls it; all restore it, or none does.

        Everything is read and compared before anything is changed, and changes are taken back if one fails.

        Args:
            folder: a checkpoint, such as `Checkpoints.latest` returns.
            may_differ: keys of the configuration that may have changed, ``"a.b"`` for one within another.
            exact: False: also accept another number of processes or other devices; the random generators are then left
                alone.
            go_to: takes the position in the data, before anything else changes; it raises if that is not a position.

        Returns:
            Where the run stood.

        Raises:
            CheckpointError: a file is damaged, or is of another adapter, base, optimizer or number of processes.
            ConfigError: the configuration differs.
        """
        with agreeing():
            saved = read_run(self.live, Path(folder), may_differ, exact)
            if go_to is not None:
                with reading(f"the position in {folder}"):
                    go_to(saved.progress.position)
        put_back = self._way_back()
        try:
            with agreeing(), reading(folder):
                self._load(saved)
        except BaseException:
            put_back()
            raise
        return saved.progress

    def _load(self, saved: SavedRun) -> None:
        with torch.no_grad():
            for key, tensor in self.live.tensors().items():
                tensor.copy_(sharded_like(tensor, saved.adapter[key]))
        load_exactly(self.live.optimizer, saved.optimizer)
        load_schedule_state(self.live.model, self.live.adapter_name, saved.schedule)
        for name, helper in self.live.helpers.items():
            if helper is not None:
                helper.load_state_dict(saved.helpers[name])
        if saved.rng:  # last, so that nothing draws after it
            set_rng_state(saved.rng)

    def _way_back(self) -> Callable[[], None]:
        """What puts the live objects back into their present state."""
        live = self.live
        optimizer = getattr(live.optimizer, "optimizer", live.optimizer)  # Accelerate wraps it
        tensors = [(tensor, tensor.detach().clone()) for tensor in live.tensors().values()]
        state, groups = optimizer.state, optimizer.param_groups  # loading replaces them
        schedule = {key: tensor.clone() for key, tensor in schedule_state(live.model, live.adapter_name).items()}
        helpers = [
            (helper, copy.deepcopy(helper.state_dict())) for helper in live.helpers.values() if helper is not None
        ]
        rng = rng_state()

        def put_back() -> None:
            with torch.no_grad():
                for tensor, value in tensors:
                    tensor.copy_(value)
            optimizer.state, optimizer.param_groups = state, groups
            load_schedule_state(live.model, live.adapter_name, schedule)
            for helper, kept in helpers:
                helper.load_state_dict(kept)
            set_rng_state(rng)

        return put_back
