"""A checkpoint of a run, read and compared with the live objects; nothing is changed here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from minipeft.config.options import integer
from minipeft.errors import CheckpointError, ConfigError, shown, told, warn
from minipeft.files.base_samples import base_samples
from minipeft.files.compare import Expected, read_values
from minipeft.files.file_names import CONFIG_FILE, WEIGHTS_FILE
from minipeft.files.format import open_adapter
from minipeft.files.reading import read_limited
from minipeft.files.save import file_config
from minipeft.files.tensor_file import open_tensors
from minipeft.injection.step_hooks import check_schedule_state
from minipeft.training.distributed.ranks import rank_and_world_size
from minipeft.training.runs.checkpoints import verify
from minipeft.training.runs.optimizer_state import check_alike, optimizer_from_plain
from minipeft.training.runs.plain import from_plain
from minipeft.training.runs.rng import check_rng_state
from minipeft.training.runs.snapshot import FORMAT, OPTIMIZER_FILE, RNG_FILE, STATE_FILE, Live, versions

FILES = {CONFIG_FILE, WEIGHTS_FILE, OPTIMIZER_FILE, RNG_FILE, STATE_FILE}
SHOWN = 100  # characters of a value
MAX_STATE_BYTES = 2**26
NOT_SET = object()


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    step: int  # number of updates done
    position: Any  # place in the data, as the run gave it


@dataclass(frozen=True)
class SavedRun:
    """What a checkpoint holds, known to fit the live objects. `rng` is empty if the generators are to be left alone."""

    adapter: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    schedule: Any
    helpers: Mapping[str, Any]
    rng: Mapping[str, Tensor]
    progress: Progress


def is_finished(folder: Path) -> bool:
    """Whether a checkpoint is of the end of its run, whose position has the number of ``updates``."""
    try:
        state = json.loads(read_limited(folder / STATE_FILE, MAX_STATE_BYTES))
        return state["step"] == state["position"]["updates"]
    except (CheckpointError, OSError, ValueError, LookupError, TypeError, RecursionError):
        return False  # reading it in earnest says what is wrong


def read_run(live: Live, folder: Path, may_differ: Sequence[str] = (), exact: bool = True) -> SavedRun:
    """Read a checkpoint and compare it with the live objects; see `TrainingState.restore`.

    Raises:
        CheckpointError: a file is damaged, or is of another adapter, base, optimizer or number of processes.
        ConfigError: the configuration differs.
    """
    files = verify(folder)
    if files.keys() != FILES:
        raise CheckpointError(f"{folder} is not a checkpoint of a training run: it has {shown(files)}.")
    try:
        return _read(live, folder, may_differ, exact)
    except (ConfigError, Warning):
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{folder} cannot be resumed from: {error}") from None
    except Exception as error:  # whatever an edited state leads to
        raise CheckpointError(f"{folder} is not a checkpoint of this format ({told(error, 200)}).") from None


def _read(live: Live, folder: Path, may_differ: Sequence[str], exact: bool) -> SavedRun:
    state = json.loads(read_limited(folder / STATE_FILE, MAX_STATE_BYTES))
    if state["format"] != FORMAT:
        raise CheckpointError(f"it has format {state['format']!r}, and this version reads {FORMAT}.")
    _compare_runs(live, folder, state, may_differ, exact)
    adapter = _read_adapter(live, folder)
    # An optimizer may start from infinity, and numpy's generator has NaN for a number that it does not hold.
    tensors = open_tensors(folder / OPTIMIZER_FILE).read(finite=False)
    helpers = {name: _read_helper(live, name, state[name], tensors) for name in live.helpers}
    optimizer = optimizer_from_plain(state["optimizer"], live.optimizer, live.groups(), tensors.__getitem__)
    rng = _random_state(folder / RNG_FILE, state["world_size"], exact)
    schedule = from_plain(state.get("schedule"), tensors.__getitem__)
    check_schedule_state(live.model, live.adapter_name, schedule)
    step = integer("step", state["step"], at_least=0, at_most=2**63)
    return SavedRun(adapter, optimizer, schedule, helpers, rng, Progress(step, state["position"]))


def _compare_runs(live: Live, folder: Path, state: Mapping[str, Any], may_differ: Sequence[str], exact: bool) -> None:
    differences = config_differences(state["config"], live.config, may_differ)
    if differences:
        raise ConfigError(
            f"{folder} is of a run with another configuration: {'; '.join(differences)}. Give the same values, or begin "
            "a new run in another directory."
        )
    world_size = rank_and_world_size()[1]
    if state["world_size"] != world_size and exact:
        raise CheckpointError(
            f"its run had {state['world_size']} processes, and here are {world_size}, which draw other random "
            "numbers. Start as many, or allow it with exact=False."
        )
    then, now = state["versions"], versions()
    others = [f"{name} {then.get(name)} then, {now[name]} now" for name in now if then.get(name) != now[name]]
    if others:
        warn(f"{folder}: {'; '.join(others)}; the same numbers are not promised.")


def config_differences(
    saved: Mapping[str, Any], now: Mapping[str, Any], may_differ: Sequence[str] = (), prefix: str = ""
) -> list[str]:
    """What has changed in a configuration: ``learning_rate: was 0.001, is 0.002``; 1, 1.0 and True are not the same.

    Both are plain JSON; nested dictionaries are compared key by key. Keys in `may_differ` are left out with all that is under
    them; ``"a.b"`` stands for one within another.
    """
    found: list[str] = []
    for key in sorted(saved.keys() | now.keys()):
        name, old, new = f"{prefix}{key}", saved.get(key, NOT_SET), now.get(key, NOT_SET)
        if name in may_differ:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += config_differences(old, new, may_differ, f"{name}.")
        elif json.dumps(old, sort_keys=True, default=str) != json.dumps(new, sort_keys=True, default=str):
            found.append(f"{name}: was {_short(old)}, is {_short(new)}")
    return found


def _short(value: Any) -> str:
    text = "not set" if value is NOT_SET else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"


def _read_adapter(live: Live, folder: Path) -> dict[str, Tensor]:
    model, name = live.model, live.adapter_name
    config = file_config(model, model.adapter_configs[name], name, compact=False)
    expected = Expected(model, live.tensors(), base_samples(model, name), config, exact=True)
    return read_values(open_adapter(folder), expected)


def _read_helper(live: Live, name: str, saved: Any, tensors: Mapping[str, Tensor]) -> Any:
    helper = live.helpers[name]
    if (helper is None) != (saved is None):
        there, here = ("no", "a") if saved is None else ("a", "no")
        raise CheckpointError(f"the run then had {there} {name}, and now has {here}.")
    state = from_plain(saved, tensors.__getitem__)
    live_state = {} if helper is None else helper.state_dict()
    other = () if helper is None else state.keys() ^ live_state.keys()
    if other:
        raise CheckpointError(f"the {name} is of another kind: {shown(sorted(other))} differ.")
    for key, value in live_state.items():
        check_alike(f"{key} of the {name}", state[key], value)
    return state


def _random_state(path: Path, world_size: int, exact: bool) -> dict[str, Tensor]:
    """The states of this process's generators; none if `exact` is False and processes or devices differ."""
    rank, world_size_now = rank_and_world_size()
    prefix = f"rank{rank}."
    found = open_tensors(path).read(finite=False)
    states = {name.removeprefix(prefix): t for name, t in found.items() if name.startswith(prefix)}
    try:
        check_rng_state(states)
    except CheckpointError:
        if exact:
            raise
        return {}
    return states if world_size == world_size_now else {}
