"""What a Trainer's checkpoint holds to resume from, besides its adapters: which of them acted, and their schedules."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from minipeft.errors import CheckpointError, all_or_nothing, shown, told, warn
from minipeft.files.atomic import write_files
from minipeft.files.reading import reading
from minipeft.files.restore import adapters_in, restore_adapters
from minipeft.files.save import file_config
from minipeft.files.save_pretrained import SavableModel, directory_of
from minipeft.files.tensor_bytes import file_of
from minipeft.files.tensor_file import open_tensors
from minipeft.files.trainer_guard import OPTIMIZER_FILE, RATE_FILE, SCHEDULE_FILE, TRAINER_STATE
from minipeft.injection import step_hooks

RECORD = "minipeft"  # our place in trainer_state.json, among the states of callbacks
Schedules = Mapping[str, Mapping[str, Tensor] | None]  # by adapter, see `minipeft.injection.step_hooks.schedule_state`


def save_whole_adapters(model: SavableModel, root: Path) -> None:
    """Save again, completely, the adapters of which `save_pretrained` leaves out what only training needs."""
    for name, config in model._state.configs.items():
        whole = file_config(model, config, name, compact=False)
        if whole != file_config(model, config, name):
            model._write_adapter(directory_of(root, name), name, model.adapter_state_dict(name), whole)


def save_schedules(model: SavableModel, root: Path) -> None:
    """Save the states of the adapters' schedules, if any has one."""
    if any(step_hooks.keeps_state(model, name) for name in model._state.configs):
        tensors = {
            f"{name}/{key}": tensor
            for name in model._state.configs
            for key, tensor in step_hooks.schedule_state(model, name).items()
        }
        write_files(root, {SCHEDULE_FILE: file_of(tensors, {})})


@all_or_nothing
def resume(model: SavableModel, checkpoint: Path, processes: int) -> None:
    """Continue from a checkpoint, in so many processes: the values of all adapters and the states of their schedules.

    Raises:
        CheckpointError: saving it was cut off, other adapters are active, or a file does not fit the model or is damaged.
    """
    record = _record(checkpoint)
    _check_active(model, checkpoint, record.get("active_adapters"))
    schedules = _read_schedules(model, checkpoint)
    restore_adapters(model, checkpoint)
    _load_schedules(model, schedules)
    if lost := _lost(checkpoint):
        warn(
            f"{checkpoint} holds no {', '.join(lost)}, as save_only_model=True leaves it: the adapters go on from their values, "
            "but these start anew."
        )
    before = record.get("processes", processes)
    if before != processes:
        warn(
            f"{checkpoint} is of a run in {before} processes, and this one has {processes}: random numbers start anew, and "
            "examples are left out or repeated if an update has another number of them."
        )


def _lost(checkpoint: Path) -> list[str]:
    """What Trainer will not bring back; it reads the optimizer and the learning rate both or neither, and says nothing."""
    both = all((checkpoint / name).exists() for name in (OPTIMIZER_FILE, RATE_FILE))
    lost = [] if both else ["optimizer", "learning rate"]
    return lost if any(checkpoint.glob("rng_state*")) else [*lost, "random numbers"]


@all_or_nothing
def restore_best(model: SavableModel, checkpoint: Path) -> None:
    """As `resume`, whichever adapters are active, and also from a checkpoint that was saved without training states."""
    schedules = _read_schedules(model, checkpoint) if (checkpoint / SCHEDULE_FILE).exists() else {}
    restore_adapters(model, checkpoint)
    _load_schedules(model, schedules)


def _read_schedules(model: SavableModel, root: Path) -> Schedules:
    """The state of each adapter's schedule in a checkpoint, None if the checkpoint has no states."""
    path = root / SCHEDULE_FILE
    states: dict[str, dict[str, Tensor] | None] = dict.fromkeys(model._state.configs)
    try:
        found = open_tensors(path).read() if path.exists() else None
        for name in states:
            if found is not None:
                prefix = f"{name}/"
                states[name] = {key.removeprefix(prefix): t for key, t in found.items() if key.startswith(prefix)}
            step_hooks.check_schedule_state(model, name, states[name])
    except CheckpointError as error:
        raise CheckpointError(f"this run cannot resume from {path}: {error}") from None
    return states


def _load_schedules(model: SavableModel, schedules: Schedules) -> None:
    for name, state in schedules.items():
        step_hooks.load_schedule_state(model, name, state)


def _record(checkpoint: Path) -> dict[str, Any]:
    """What `AdapterTrainerMixin` has noted in a checkpoint; empty if it is another Trainer's or holds no adapter."""
    path = checkpoint / TRAINER_STATE
    if adapters_in(checkpoint) and not path.exists():
        raise CheckpointError(
            f"{checkpoint} has no {TRAINER_STATE}, which a Trainer writes last: saving it was cut off. Delete it, and resume "
            "from the checkpoint before it."
        )
    with reading(path):
        callbacks = json.loads(path.read_text("utf-8")).get("stateful_callbacks", {}) if path.exists() else {}
        record: dict[str, Any] = callbacks.get(RECORD, {}).get("attributes", {})
        active, processes = record.get("active_adapters", []), record.get("processes", 1)
    if not isinstance(processes, int) or not isinstance(active, list) or not all(isinstance(a, str) for a in active):
        raise CheckpointError(
            f"{path} is damaged: what it says of the adapters, {told(record)}, is of the wrong types."
        )
    return record


def _check_active(model: SavableModel, checkpoint: Path, active: list[str] | None) -> None:
    """Refuse to resume with other active adapters: the optimizer's state belongs to those that trained."""
    if active is None or not set(active) <= model._state.configs.keys():
        return  # unknown, or refused with a better message when the adapters are restored
    here = list(model._state.switch.active)
    if active != here:
        raise CheckpointError(
            f"{checkpoint}: {shown(active)} was active there, and here it is {shown(here)}; "
            f"call model.set_adapter({active}) first."
        )
