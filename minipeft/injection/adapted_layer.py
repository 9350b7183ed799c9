"""A frozen layer and its adapters, each of which takes its turn on the output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from minipeft.errors import MergeError, shown
from minipeft.injection.wrapper import Switch, Wrapper, innermost
from minipeft.layers.base import LayerOps
from minipeft.layers.uncalled import UncalledOps
from minipeft.methods.base import Adapter


class AdaptedLayer(Wrapper):
    """A frozen layer and its adapters: ``y = base_layer(x)``, then each active adapter's turn on y.

    Merged adapters are in the base weight already and take no turn; `undo` (see `minipeft.merging`) brings the base
    weight back. `targeted` says whether ``target_modules`` selects the module. An adapter in `tied_adapters` belongs to
    another layer that shares this weight, and is saved and trained there.
    """

    def __init__(self, base_layer: nn.Module, switch: Switch, ops: LayerOps, targeted: bool = True) -> None:
        super().__init__(base_layer, switch)
        self.ops = ops
        self.targeted = targeted
        self.merged: tuple[str, ...] = ()
        self.undo: Any = None
        self.tied_adapters: set[str] = set()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.run_with(self.acting(), x, *args, **kwargs)

    def acting(self) -> tuple[str, ...]:
        """Names of the adapters that take their turn now."""
        if not self.switch.enabled:
            return ()
        here = self.adapters._modules
        return tuple([n for n in self.switch.active if n in here and n not in self.merged])

    def changed_rows(self) -> list[tuple[Tensor, Tensor]] | None:
        """What the acting adapters add to rows of the weight (see `Adapter.changed_rows`); None if one does more than that."""
        changed = [self.adapter(name).changed_rows() for name in self.acting()]
        known = [rows for rows in changed if rows is not None]
        return known if len(known) == len(changed) else None

    def run_with(self, names: tuple[str, ...], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output with exactly these adapters, each taking its turn."""
        y: Any = None
        here = self.adapters._modules
        acting: list[Any] = [here[name] for name in names]
        if len(acting) == 1 and acting[0].runs_base and not (args or kwargs):
            return acting[0](self.base_layer, self.ops, x, None)  # the usual case, kept short for single tokens
        inputs = [x]  # of each adapter, the last one first: its `before` decides what those in front of it see
        for adapter in reversed(acting):
            inputs.append(adapter.before(self.base_layer, self.ops, inputs[-1]))
        x = inputs.pop()
        for adapter in acting:
            if y is None and (args or kwargs or not adapter.runs_base):
                y = self.ops.call(self.base_layer, x, *args, **kwargs)
            y = adapter(self.base_layer, self.ops, inputs.pop(), y)
        if y is not None:
            return y
        if self.ops.is_quantized:  # its own backward pass may keep the weight in float
            return self.ops.call(self.base_layer, x, *args, **kwargs)
        return self.base_layer(x, *args, **kwargs)

    @property
    def owner(self) -> nn.Module:
        """The module that owns the weight."""
        return innermost(self.base_layer)

    def adapter(self, name: str) -> Adapter:
        """The adapter with this name on this layer."""
        adapter = self.adapters[name]
        assert isinstance(adapter, Adapter)
        return adapter

    def owns(self, adapter_name: str) -> bool:
        """Whether the adapter is here and belongs to this layer, not to one it is tied to."""
        return adapter_name in self.adapters and adapter_name not in self.tied_adapters

    def drop(self, adapter_name: str) -> None:
        super().drop(adapter_name)
        self.tied_adapters.discard(adapter_name)

    def trainable_parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        if self.owns(adapter_name):
            yield from self.adapter(adapter_name).parameters()

    def check_separable(self, path: str, names: tuple[str, ...]) -> None:
        """Check that merging only these adapters leaves the combined effect of all active ones unchanged.

        Raises:
            MergeError: one of them reads the base weight, and another acts without being merged.
        """
        left_out = tuple(name for name in self.switch.active if name in self.adapters and name not in names)
        readers = [name for name in names + left_out if self.adapter(name).overrides("merge_after")]
        if left_out and readers:
            raise MergeError(
                f"{path}: {shown(readers)} depends on the base weight, so {shown(names)} cannot be merged "
                f"without {shown(left_out)}."
            )

    def file_tensors(self, adapter_name: str) -> dict[str, Tensor]:
        if not self.owns(adapter_name):
            return {}
        adapter = self.adapter(adapter_name)
        return {f"{adapter.key_prefix}{key}": tensor for key, tensor in adapter.file_tensors().items()}

    def extra_repr(self) -> str:
        return f"merged={list(self.merged)}" if self.merged else ""


class AdaptedWeight(AdaptedLayer):
    """A module that reads its weight instead of calling a layer: it runs with the adapted weight in place of its own.

    Two adapted parameters of one module are two of these, one around the other, as in PEFT's files. The adapted
    weights of the children that `UncalledOps.children` names are passed in along with the module's own.
    """

    ops: UncalledOps

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        weights = self.adapted_weights("")
        for attribute in self.ops.children:
            part = self.owner._modules[attribute]
            if isinstance(part, AdaptedWeight):
                weights.update(part.adapted_weights(f"{attribute}."))
        return functional_call(self.base_layer, weights, args, kwargs) if weights else self.base_layer(*args, **kwargs)

    def adapted_weights(self, prefix: str) -> dict[str, Tensor]:
        """The weight with the acting adapters, by its name below `prefix`; empty if none acts."""
        owner, acting = self.owner, self.acting()
        if not acting:
            return {}
        x, y = self.ops.as_call(owner)
        with torch.autocast(y.device.type, enabled=False):
            for name in acting:
                y = self.adapters[name](owner, self.ops, x, y)
        path = "base_layer." * (prefix != "")
        inner = self.base_layer
        while isinstance(inner, Wrapper):
            path, inner = f"{path}base_layer.", inner.base_layer
        return {f"{prefix}{path}{self.ops.parameter}": self.ops.from_call(owner, y)}
