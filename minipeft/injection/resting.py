"""The parameters of an adapter by their places, so that switching visits these and nothing else.

The parameters of an idle adapter must not require gradients, or DDP would wait for them. They are known by module and
name, not as objects: moving, sharding or loading a model may put other objects in their places.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from minipeft.injection.wrapper import Wrapper
from minipeft.wrapper_names import modules_in

Place = tuple[nn.Module, str]


def places_in(wrapper: Wrapper, adapter_name: str) -> list[Place]:
    """Where the parameters are that training this adapter changes in one wrapper."""
    part = wrapper.parts.get(adapter_name)
    if part is None:
        return []
    own = set(map(id, wrapper.trainable_parameters(adapter_name)))
    return [(module, name) for module in modules_in(part) for name, p in module._parameters.items() if id(p) in own]


def parameters_at(places: Iterable[Place]) -> Iterator[nn.Parameter]:
    """The parameters that are there now."""
    for module, name in places:
        parameter = module._parameters.get(name)
        if parameter is not None:
            yield parameter


def put_to_rest(places: Iterable[Place]) -> set[Place]:
    """Let no parameter there require a gradient any more; returns the places of those that did."""
    trained = {place for place in places if (p := place[0]._parameters.get(place[1])) is not None and p.requires_grad}
    for parameter in parameters_at(trained):
        parameter.requires_grad_(False)
    return trained
