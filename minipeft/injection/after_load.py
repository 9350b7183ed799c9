"""Values of the base that adapters keep follow when ``load_state_dict`` gives the base others.

A whole state (Lightning, ``accelerate.save_state``, ``torch.save``) brings the base along, often into a process in which
it was another one until then: built empty, or with other random rows of a resized vocabulary. What an adapter keeps of
the base is not in that state, so that older states still load. It is read again from what was loaded.
"""

from __future__ import annotations

from torch import nn

from minipeft.injection.adapted_layer import AdaptedLayer


def follow_loads(layer: AdaptedLayer) -> None:
    """Have the adapters of a layer read their values again after each load."""
    if _after_load not in layer._load_state_dict_post_hooks.values():
        layer.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]


def _after_load(layer: nn.Module, incompatible_keys: object) -> None:
    assert isinstance(layer, AdaptedLayer)
    if layer.merged or any(parameter.is_meta for parameter in layer.owner.parameters(recurse=False)):
        return  # then the weight is not the base's own, or not here
    for name in layer.adapters:
        layer.adapter(name).base_loaded(layer.owner, layer.ops)
