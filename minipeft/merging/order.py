"""In which order adapters may be merged: merged ones act first, and not all of them commute."""

from __future__ import annotations

from minipeft.errors import MergeError, shown
from minipeft.injection.adapted_layer import AdaptedLayer


def check_order(path: str, layer: AdaptedLayer, names: tuple[str, ...], *, permanent: bool) -> None:
    """Check that merging these adapters, in this order, leaves what all active ones do together unchanged.

    Merged adapters act before the others, so two that change places must both add to the weight (see `Adapter.adds`).
    Adapters that are not active come after those that are. After a permanent merge no other adapter acts.

    Raises:
        MergeError: two that do not commute would change places, or one depends on the base weight and another acts
            without being merged.
    """
    active = [name for name in layer.switch.active if name in layer.adapters]
    left_out = () if permanent else tuple(name for name in active if name not in names)
    readers = [name for name in names + left_out if layer.adapter(name).overrides("merge_after")]
    if left_out and readers:
        raise MergeError(
            f"{path}: {shown(readers)} depends on the base weight, so {shown(names)} cannot be merged "
            f"without {shown(left_out)}."
        )
    place = {name: number for number, name in enumerate(dict.fromkeys((*active, *names)))}
    acting = names + left_out
    for number, first in enumerate(acting):
        for second in acting[number + 1 :]:
            if place[first] > place[second] and not (_adds(layer, first) and _adds(layer, second)):
                raise MergeError(
                    f"{path}: {second!r} acts before {first!r}, and the two do not commute, so {first!r} cannot be merged "
                    f"first. Merge them in the order in which they act ({shown(active)}), or call set_adapter first."
                )


def _adds(layer: AdaptedLayer, name: str) -> bool:
    return layer.adapter(name).adds(layer.ops.read_weight(layer.base_layer).detach())
