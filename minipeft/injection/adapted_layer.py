"""A frozen layer and its adapters, which change its output one after the other."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from minipeft.ecosystem.wrapper_names import modules_in
from minipeft.errors import UNCHANGED, StateError
from minipeft.injection.adapted_value import AdaptedValue, adapted_value
from minipeft.injection.layer_by_row import run_by_row
from minipeft.injection.rows import BASE, CURRENT, in_backward, rows_now
from minipeft.injection.stored_weight import Stored, stored_weight
from minipeft.injection.wrapper import Place, Switch, Wrapper, innermost
from minipeft.kernels.functional import accumulation_dtype
from minipeft.kernels.transformed import is_transformed
from minipeft.layers.base import LayerOps
from minipeft.layers.offloaded import HOOK, on_device_of, present
from minipeft.methods.base import Adapter


class AdaptedLayer(Wrapper):
    """A frozen layer and its adapters: ``y = base_layer(x)``, which the active adapters change one after the other.

    Merged adapters are in the base weight already and do nothing here; `undo` (see `minipeft.merging`) brings the base
    weight back. `targeted` says whether ``target_modules`` selects the module. An adapter in `tied_adapters` belongs to
    another layer that shares this weight, and is saved and trained there.
    """

    ops: LayerOps
    targeted: bool
    merged: tuple[str, ...]
    undo: Any
    tied_adapters: set[str]
    stored: Stored | None
    computed: bool  # whether something has computed with the adapted weight that it read

    def __init__(self, base_layer: nn.Module, switch: Switch, ops: LayerOps, targeted: bool = True) -> None:
        super().__init__(base_layer, switch)
        owner, own = innermost(base_layer), vars(self)  # as in `Wrapper`
        own["ops"] = ops
        own["targeted"] = targeted
        own["merged"] = ()
        own["undo"] = None
        own["tied_adapters"] = set()
        own["computed"] = False
        own["stored"] = None if ops.is_quantized else stored_weight(ops.read_weight(owner), owner)

    def __getattr__(self, name: str) -> Any:
        """The base layer's attribute; its weight and bias with the acting adapters folded in."""
        value = super().__getattr__(name)
        if (type(value) is not nn.Parameter and not self.stands_in(name, value)) or "stored" not in self.__dict__:
            return self.traced(name, value) if isinstance(value, Proxy) else value
        rows = None if self.ops.is_quantized else self.mixed_rows()
        if rows is not None:
            return adapted_value(value, functools.partial(rows.refuse, self, "is read, not called"), ())
        names = self.acting() if not self.ops.is_quantized else ()
        return self.read(name, value, names) if names else value

    def __setattr__(self, name: str, value: Any) -> None:
        """Another parameter goes to the base layer, as tying means it, unless it may be made of the adapted one."""
        made = isinstance(value, nn.Parameter) and self.computed and value is not self.owner._parameters.get(name)
        if made and isinstance(getattr(self, name, None), AdaptedValue):
            raise StateError(
                f"a new {name} was assigned to an adapted {type(self.owner).__name__}. Reading gives the adapted {name} and "
                "assigning changes the base layer's, so an adapter would act twice on what fuse_conv_bn_eval or torchao's quantize_ "
                f"makes of it. Call merge_and_unload() first, or assign to its base_layer. {UNCHANGED}"
            )
        super().__setattr__(name, value)

    def traced(self, name: str, proxy: Proxy) -> Proxy:
        """The base layer's parameter in a graph of ``torch.fx.symbolic_trace``; raises StateError if an adapter acts on it."""
        if not self.ops.is_quantized and self.acting():
            raise StateError(
                f"torch.fx.symbolic_trace: the model reads the {name} of an adapted {type(self.owner).__name__} instead of calling the "
                "layer, and the graph would hold the base's alone. Call merge_and_unload() first, or use torch.export."
            )
        return proxy

    def stands_in(self, name: str, value: Any) -> bool:
        """Whether this is a tensor in a parameter's place, as `functional_call`, `torch.export` and FSDP put there."""
        return isinstance(value, Tensor) and self.owner._parameters.get(name) is value

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(x, Proxy):
            return self.as_one_node(x, *args, **kwargs)
        if HOOK in self._modules["base_layer"].__dict__:  # accelerate's, which may offload the weight
            with present(self.owner):
                return self.run(on_device_of(self.owner, x), *args, **kwargs)
        return self.run(x, *args, **kwargs)

    def run(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output with the adapters that act now."""
        if CURRENT.rows is not None and (rows := self.mixed_rows()) is not None:
            return run_by_row(self, rows, x, args, kwargs)
        return self.run_with(self.acting(), x, *args, **kwargs)

    def acting(self) -> tuple[str, ...]:
        """Names of the adapters that act now; raises StateError if rows of a batch use different ones."""
        if not self.switch.enabled:
            return ()
        here: Any = self._modules["adapters"]._modules  # type: ignore[union-attr]  # three times as fast as by the attribute
        rows = rows_now(self.switch) if CURRENT.rows is not None else None
        if rows is not None:
            common = rows.common(here)
            if common is None:
                rows.refuse(self, "has one weight for all rows")
            return () if common == BASE else (common,)
        if self.switch.trained_by_row and not torch.compiler.is_compiling() and in_backward():
            raise StateError(
                "the backward pass calls this layer again and does not say which rows use which adapter. With adapter_names, "
                "checkpoint by model.gradient_checkpointing_enable() or minipeft.lean, not by a call of your own."
            )
        return tuple([n for n in self.switch.active if n in here and n not in self.merged])

    def changed_rows(self) -> list[tuple[Tensor, Tensor]] | None:
        """What the acting adapters add to rows of the weight (see `Adapter.changed_rows`); None if one does more than that."""
        changed = [self.adapter(name).changed_rows() for name in self.acting()]
        known = [rows for rows in changed if rows is not None]
        return known if len(known) == len(changed) else None

    def run_with(self, names: tuple[str, ...], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output with exactly these adapters, one after the other."""
        y: Any = None
        here: Any = self._modules["adapters"]._modules  # type: ignore[union-attr]
        if len(names) == 1 and here[names[0]].runs_base and not (args or kwargs):
            return here[names[0]](self._modules["base_layer"], self.ops, x, None)  # kept short for single tokens
        acting: list[Any] = [here[name] for name in names]
        inputs = [x]  # of each adapter, the last one first: its `before` makes the input of those before it
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

    def read(self, name: str, own: Tensor, names: tuple[str, ...]) -> Tensor:
        """The weight or bias `own`, called `name`, with these adapters folded in; another parameter as it is."""
        adapters = [self.adapter(each) for each in names]
        is_bias = own is self.ops.read_bias(self.base_layer)
        if is_bias and not own.is_meta and not any(adapter.overrides("merge", "merge_after") for adapter in adapters):
            return _sum_of_biases(own, adapters)
        if not is_bias and (self.stored is None or self.stored.name != name):
            return own

        parameters = [p for adapter in adapters for p in adapter.parameters()]

        def compute() -> Tensor:
            now = [p for adapter in adapters for p in adapter.parameters()]
            if any(p is not then for p, then in zip(now, parameters, strict=False)):
                raise StateError(
                    f"the {name} of a {type(self.owner).__name__} was read with other parameters than the adapter has now, in the "
                    "backward pass. Give functional_call tensors, such as p * 1, in place of each nn.Parameter p."
                )
            return self._read_now(own, names, is_bias=is_bias)

        # What stands in for a parameter is gone in the backward pass, so that cannot compute the value again.
        if not all(isinstance(p, nn.Parameter) for p in (own, *parameters)):
            return compute()
        return adapted_value(own, compute, parameters)

    def _read_now(self, own: Tensor, names: tuple[str, ...], *, is_bias: bool) -> Tensor:
        """The value of `read`, in the shape and dtype of the parameter `own`."""
        self.switch.note_read(self)
        if not is_transformed():
            vars(self)["computed"] = True
        with present(self.owner):
            device = self.ops.read_weight(self.base_layer).device.type
            with torch.autocast(device, enabled=False):
                weight, bias = self.folded(names)
        if is_bias:
            assert bias is not None
            return bias.to(own.dtype)
        assert self.stored is not None
        return self.stored.from_canonical(weight, own)

    def folded(self, names: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
        """Canonical weight (out, in) and bias (out,) with these adapters folded in, in float32 or float64.

        Differentiable in the adapters' parameters.
        """
        weight, bias = self.ops.read_weight(self.base_layer), self.ops.read_bias(self.base_layer)
        dtype = accumulation_dtype(weight)
        weight, bias = own = weight.to(dtype), None if bias is None else bias.to(dtype)
        for name in names:
            weight, bias = self.adapter(name).merge_after(weight, bias, *own)
        return weight, bias

    def note_merged(self, names: tuple[str, ...], undo: Any = None) -> None:
        """Say which adapters are in the base weight now."""
        vars(self).update(merged=names, undo=undo)

    @property
    def owner(self) -> nn.Module:
        """The module that owns the weight."""
        return innermost(self.base_layer)

    def adapter(self, name: str) -> Adapter:
        """The adapter with this name on this layer."""
        return self._modules["adapters"]._modules[name]  # type: ignore[union-attr,return-value]  # as in `parts`, asked as often

    def owns(self, adapter_name: str) -> bool:
        """Whether the adapter is here, does something, and belongs to this layer, not to one it is tied to."""
        adapter = self.parts.get(adapter_name)
        return adapter is not None and adapter_name not in self.tied_adapters and not cast(Adapter, adapter).is_vacant

    def drop(self, adapter_name: str) -> None:
        super().drop(adapter_name)
        self.tied_adapters.discard(adapter_name)

    def rename(self, old: str, new: str) -> None:
        super().rename(old, new)
        self.merged = tuple(new if name == old else name for name in self.merged)
        if old in self.tied_adapters:
            self.tied_adapters = (self.tied_adapters - {old}) | {new}

    def places(self, adapter_name: str) -> list[Place]:
        if not self.owns(adapter_name):
            return []
        modules = modules_in(self.parts[adapter_name])
        return [(module, name) for module in modules for name, p in module._parameters.items() if p is not None]

    def file_tensors(self, adapter_name: str) -> dict[str, Tensor]:
        if not self.owns(adapter_name):
            return {}
        adapter = self.adapter(adapter_name)
        return {f"{adapter.key_prefix}{key}": tensor for key, tensor in adapter.file_tensors().items()}

    def extra_repr(self) -> str:
        return f"merged={list(self.merged)}" if self.merged else ""


def _sum_of_biases(own: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """The bias with what additive adapters add to it; cheap, so computed at once. `own` if they add nothing."""
    start = bias = own.to(accumulation_dtype(own))
    for adapter in adapters:
        changed = adapter.merge_bias(bias)
        assert changed is not None
        bias = changed
    return own if bias is start else bias.to(own.dtype)
