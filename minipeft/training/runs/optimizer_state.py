"""The state of any torch optimizer, by the names of the parameters instead of their numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from minipeft.errors import CheckpointError, StateError, shown, told
from minipeft.training.runs.plain import from_plain, to_plain

PLAIN = (type(None), bool, int, float)  # what an optimizer may keep for a parameter besides tensors


def named_groups(optimizer: Optimizer, names: Mapping[int, str]) -> list[list[str]]:
    """Names of the parameters of each group of an optimizer; raises StateError if it trains another parameter."""
    groups = [[names.get(id(parameter), "") for parameter in group["params"]] for group in optimizer.param_groups]
    strangers = sum(group.count("") for group in groups)
    if strangers:
        raise StateError(
            f"the optimizer trains {strangers} parameters that are not the adapter's and that no checkpoint would hold; give "
            "it only the adapter's (those that require a gradient), and build it after the model is wrapped."
        )
    return groups


def optimizer_to_plain(
    optimizer: Optimizer, groups: list[list[str]], put: Callable[[str, Tensor], None]
) -> dict[str, Any]:
    """An optimizer's state and groups as JSON can hold them; the tensors go to `put`, as ``<parameter>.<what it is>``.

    Raises CheckpointError if it keeps something other than tensors, numbers, bools and None.
    """
    saved = optimizer.state_dict()
    if saved.keys() != {"state", "param_groups"}:
        raise CheckpointError(
            f"the optimizer's state has {shown(saved)}; only 'state' and 'param_groups' can be saved."
        )
    state = {}
    names = [name for group in groups for name in group]
    for index, values in sorted(saved["state"].items()):
        for key, value in values.items():
            if not _is_state(value):
                raise CheckpointError(
                    f"the optimizer keeps a {type(value).__name__} as {key!r} of {names[index]}, which cannot be saved; "
                    "allowed are tensors, numbers, bools and None."
                )
        state[names[index]] = to_plain(values, names[index], put)
    options = [{key: value for key, value in group.items() if key != "params"} for group in saved["param_groups"]]
    return {"groups": groups, "options": to_plain(options, "param_groups", put), "state": state}


def optimizer_from_plain(
    saved: Mapping[str, Any], optimizer: Optimizer, groups: list[list[str]], get: Callable[[str], Tensor]
) -> dict[str, Any]:
    """What `load_exactly` takes, from what `optimizer_to_plain` gave; the optimizer is only read.

    Raises CheckpointError if its groups hold other parameters or have other options.
    """
    if len(saved["groups"]) != len(groups):
        raise CheckpointError(f"the optimizer has {len(groups)} groups, and {len(saved['groups'])} were saved.")
    options = from_plain(saved["options"], get)
    for index, (then, now) in enumerate(zip(saved["groups"], groups, strict=True)):
        if set(then) != set(now):
            gone, new = sorted(set(then) - set(now)), sorted(set(now) - set(then))
            raise CheckpointError(f"group {index} of the optimizer lacks {shown(gone, 3)} and adds {shown(new, 3)}.")
        other = options[index].keys() ^ (optimizer.param_groups[index].keys() - {"params"})
        if other:
            raise CheckpointError(f"group {index} of the optimizer is of another kind: {shown(sorted(other))} differ.")
        for key, value in options[index].items():
            check_alike(f"{key} of group {index} of the optimizer", value, optimizer.param_groups[index][key])
    numbers = {name: number for number, name in enumerate(name for group in groups for name in group)}
    state = {numbers[name]: from_plain(values, get) for name, values in saved["state"].items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state.items():
        _check_state(values, parameters[number])
    return {
        "state": state,
        "param_groups": [
            {**values, "params": [numbers[name] for name in names]}
            for values, names in zip(options, groups, strict=True)
        ],
    }


def _is_state(value: Any) -> bool:
    # bitsandbytes puts what it keeps for a parameter into a dictionary of its own when it is saved.
    inner = value.values() if type(value) is dict else [value]
    return all(isinstance(part, (*PLAIN, Tensor)) for part in inner)


def _check_state(values: Mapping[str, Any], parameter: Tensor) -> None:
    for key, value in values.items():
        if not _is_state(value):
            raise CheckpointError(
                f"the optimizer's {told(key)} is a {type(value).__name__}, neither a tensor nor a number."
            )
        # Factors of Adafactor have length 1 in one dimension, and those of 8-bit optimizers fewer dimensions.
        if isinstance(value, Tensor) and value.ndim == parameter.ndim > 1:
            if any(there not in (1, here) for there, here in zip(value.shape, parameter.shape, strict=True)):
                raise CheckpointError(
                    f"the optimizer's {told(key)} has shape {list(value.shape)}, and the parameter {list(parameter.shape)}."
                )


def check_alike(what: str, saved: Any, here: Any) -> None:
    """Raise CheckpointError unless a value can take another's place.

    A number can take that of a number, anything that of None, and any other value that of its own type.
    """
    numbers = isinstance(saved, int | float | Tensor) and isinstance(here, int | float | Tensor)
    unset = here is None or (saved is None and isinstance(here, bool))  # such as foreach
    if not (numbers or unset or type(saved) is type(here)):
        raise CheckpointError(f"{what} is {told(saved)} there, and {told(here)} here.")


def load_exactly(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Load a state, sharded like the parameters, without torch's rounding of it to their dtype."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {key: _sharded_like(parameters[index], value) for key, value in values.items()}
        for index, values in state_dict["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": state_dict["param_groups"]})
    for index, values in state.items():
        loaded = optimizer.state[parameters[index]]
        for key, value in values.items():
            if isinstance(value, Tensor) and loaded[key].dtype != value.dtype:
                loaded[key] = value.to(loaded[key].device)


def _sharded_like(parameter: nn.Parameter, value: Any) -> Any:
    if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
        return sharded_like(parameter, value)
    return value


def sharded_like(live: Tensor, whole: Tensor) -> Tensor:
    """This process's share of a whole tensor if `live` is sharded; otherwise the whole tensor, on the device of `live`.

    Every process calls it; the values are those of the first.
    """
    if isinstance(live, DTensor):
        return distribute_tensor(whole.to(live.device), live.device_mesh, live.placements)
    return whole.to(live.device)
