"""Layers whose weights accelerate keeps on a CPU or a disk, and brings to a device for each call.

Between calls such a weight is on the meta device, with a shape and no values. accelerate's hook is all that knows them, so
everything that needs a value asks here.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from minipeft.errors import StateError
from minipeft.kernels.functional import is_in_parts

HOOK = "_hf_hook"  # where accelerate keeps the hook of a module


def offloads(module: nn.Module) -> bool:
    """Whether accelerate brings this module's own weights for a call and takes them away afterwards."""
    return HOOK in vars(module) and any(getattr(hook, "offload", False) is True for hook in _hooks(module))


def hides_ties(module: nn.Module) -> bool:
    """Whether only values tell what this module's weights are tied to: accelerate makes a new parameter at each call."""
    return offloads(module) and not any(getattr(hook, "keeps_ties", False) for hook in _hooks(module))


def present(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within the block an offloaded module has its weights, even after a call of it. Other modules are left alone."""
    return _brought(module) if offloads(module) else _NOTHING


_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def _brought(module: nn.Module) -> Iterator[None]:
    hook: Any = vars(module)[HOOK]
    hook.pre_forward(module)
    setattr(module, HOOK, _resident(hook))  # which leaves the weights where they are
    try:
        yield
    finally:
        setattr(module, HOOK, hook)
        hook.post_forward(module, None)


@contextlib.contextmanager
def all_present(module: nn.Module) -> Iterator[None]:
    """`present` for a module and everything in it."""
    with contextlib.ExitStack() as stack:
        for inner in module.modules():
            stack.enter_context(present(inner))
        yield


def values_of(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """These parameters and buffers of a model; of those that are offloaded, copies of the values.

    Raises:
        StateError: one has no values, since the model was never loaded.
    """
    values = dict(each_value(model, tensors.items()))
    absent = next((key for key, value in values.items() if value.is_meta), None)
    if absent is not None:
        raise StateError(f"{absent} is on the meta device, without values. Load the model first.")
    return values


def each_value(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """As `values_of`, one after the other, so that no two copies are in memory; what has no values comes as it is."""
    pairs, places = list(tensors), dict[int, tuple[nn.Module, str]]()
    if any(tensor.is_meta for _, tensor in pairs):
        for module in filter(offloads, model.modules()):
            places |= {id(p): (module, name) for name, p in (module._parameters | module._buffers).items()}
    for key, tensor in pairs:
        if tensor.is_meta and id(tensor) in places:
            module, name = places[id(tensor)]
            with present(module):
                yield key, getattr(module, name).detach().clone()
        else:
            yield key, tensor


def check_values_here(name: str, part: nn.Module) -> None:
    """Raise StateError if a part of an adapter cannot be read or written in place: it is offloaded or divided."""
    if any(map(is_in_parts, part.parameters())):
        raise StateError(
            f"{name}: FSDP or DeepSpeed has divided this adapter, so its values are not here as a whole. Save it from a gathered "
            "state, load it into a model that is not divided, and do this there."
        )
    if any(map(offloads, part.modules())):
        raise StateError(
            f"{name}: accelerate offloads this adapter, so its values are not here to be read or replaced. Offload the base "
            "before adapting it; adapters then stay where they are."
        )


def on_device_of(module: nn.Module, x: Any) -> Any:
    """An input, on the device where accelerate runs this module."""
    device = next((d for hook in _hooks(module) if (d := getattr(hook, "execution_device", None)) is not None), None)
    return x.to(device) if device is not None and isinstance(x, Tensor) else x


def without_offloading(module: nn.Module) -> dict[int, Any]:
    """For `copy.deepcopy`, the hooks that copies of a module and those in it get, by the ``id`` of the old ones."""
    hooks = [vars(inner)[HOOK] for inner in module.modules() if HOOK in vars(inner)]
    return {id(hook): _resident(hook) for hook in hooks}


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    hook: Any = vars(module).get(HOOK)
    return () if hook is None else (hook, *getattr(hook, "hooks", ()))


def _resident(hook: Any) -> Any:
    """A hook that moves inputs as this one does, and no weights."""
    twin = copy.copy(hook)
    if hasattr(twin, "hooks"):  # several in one
        twin.hooks = tuple(map(_resident, twin.hooks))
    elif getattr(twin, "offload", False) is True:
        twin.offload, twin.weights_map, twin.tied_params_map = False, None, None
    return twin


def is_absent(module: nn.Module) -> bool:
    """Whether a module's own parameters have no values and nothing brings them before a call of it."""
    return any(p is not None and p.is_meta for p in module._parameters.values()) and not offloads(module)
