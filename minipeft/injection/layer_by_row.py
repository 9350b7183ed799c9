"""An adapted layer whose adapters act by row of a batch; see `minipeft.injection.rows`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minipeft.injection.rows import BASE, Parts, Rows, choose, select
from minipeft.kernels.block_linear import block_linear, block_update, stacked
from minipeft.kernels.frozen_linear import can_fuse
from minipeft.kernels.transformed import is_transformed
from minipeft.layers.base import LayerOps, takes_vectors
from minipeft.layers.offloaded import offloads
from minipeft.methods.base import Adapter

# So many values of factors are copied in the time that it takes to start the products of one adapter.
CALLS_COST = 2**15


class Layer(Protocol):
    """What is needed of a `minipeft.injection.adapted_layer.AdaptedLayer`."""

    base_layer: nn.Module
    adapters: nn.ModuleDict
    ops: LayerOps


def run_by_row(layer: Any, rows: Rows, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The output of a layer in which each row of x meets its own adapter; raises StateError if rows cannot be told apart."""
    here: Mapping[str, Any] = layer.adapters._modules
    repeats = rows.repeats(layer, x)
    if torch.compiler.is_compiling():
        known = {name: here[name] for name in rows.known if name in here}
        return _run_compiled(layer, rows, known, repeats, x, args, kwargs)
    present = rows.present(here)
    parts = rows.parts(present, repeats, x.device)
    blocks = None if args or kwargs else _blocks(layer, rows, present, parts, x)
    if blocks is not None:
        return _run_blocks(layer, parts, x, *blocks)
    return _run_groups(layer, parts, x, args, kwargs)


def _run_groups(layer: Layer, parts: Parts, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Any methods: the base layer runs once for all rows, and each adapter before and after it on its own."""
    base, ops = layer.base_layer, layer.ops
    here: Mapping[str, Any] = layer.adapters._modules
    groups = [(None if n is None else here[n], own, select(x, own)) for n, own in parts.groups]
    changed = [part if adapter is None else adapter.before(base, ops, part) for adapter, _, part in groups]
    same = all(new is part for new, (_, _, part) in zip(changed, groups, strict=True))
    y = ops.call(base, x if same else parts.joined(changed), *args, **kwargs)
    outputs = []
    for adapter, selector, part in groups:
        own = select(y, selector)
        outputs.append(own if adapter is None else adapter(base, ops, part, own))
    return parts.joined(outputs)


def _factors(layer: Layer, adapters: Sequence[Any]) -> list[tuple[Tensor, Tensor]] | None:
    """(up, down) of each adapter, if all that each does in this call is to add ``up down x``."""
    ops = layer.ops
    if ops.is_embedding or not takes_vectors(ops) or type(ops).scaled is not LayerOps.scaled:
        return None
    found = []
    for adapter in adapters:
        pair = None if offloads(adapter) else adapter.call_factors()  # its parameters come with a call of it
        if pair is None:
            return None
        found.append(pair)
    return found


def _blocks_pay(factors: Sequence[tuple[Tensor, Tensor]], parts: Parts, x: Tensor) -> bool:
    """Whether copying the factors for each block costs less than the products of one adapter after the other."""
    rank = max(len(down) for _, down in factors)
    up, down = factors[0]
    copied = len(parts.blocks) * rank * (len(up) + down.shape[1])
    rows = x.numel() // max(1, x.shape[-1] * len(parts.blocks))  # of a block
    return rows >= rank or copied <= len(factors) * CALLS_COST


def _blocks(
    layer: Layer, rows: Rows, present: tuple[str, ...], parts: Parts, x: Tensor
) -> tuple[Tensor, Tensor] | None:
    """(down, up) of each block, shapes (blocks, r, in) and (blocks, out, r); None if that is impossible or costs more.

    Kept while `generate` runs and the adapters' parameters stay as they are.
    """
    kept, key = None if torch.is_grad_enabled() else rows.kept, (id(layer), len(parts.blocks))
    if kept is not None and key in kept:
        adapters, parameters, state, made = kept[key]
        if state == _state(adapters, parameters):
            return made
    adapters = [layer.adapters[name] for name in present]
    factors = _factors(layer, adapters)
    if factors is None or not _blocks_pay(factors, parts, x):
        return None
    by_name = dict(zip(present, factors, strict=True))
    made = stacked([None if name is None else by_name[name] for name in parts.blocks], x.dtype)
    if kept is not None:
        parameters = [p for adapter in adapters for p in adapter.parameters()]
        kept[key] = adapters, parameters, _state(adapters, parameters), made
    return made


def _state(adapters: Sequence[Any], parameters: Sequence[Tensor]) -> tuple[list[int], list[Any]]:
    """What changes when the adapters' factors do."""
    return [parameter._version for parameter in parameters], [adapter.scaling for adapter in adapters]


def _run_blocks(layer: Layer, parts: Parts, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Methods that add a low-rank product: two batched products for all rows."""
    base, ops = layer.base_layer, layer.ops
    blocks = x.reshape(len(parts.blocks), -1, x.shape[-1])
    weight, bias = ops.linear_weight(base, x), ops.read_bias(base)
    learns = torch.is_grad_enabled() and (x.requires_grad or down.requires_grad or up.requires_grad)
    if learns and weight is not None and can_fuse(x, weight, bias):
        return block_linear(blocks, weight, bias, down, up).reshape(*x.shape[:-1], up.shape[1])
    y: Tensor = ops.call(base, x)
    if not learns and isinstance(weight, Tensor) and y.dtype is x.dtype and not is_transformed():
        y.view(len(blocks), -1, y.shape[-1]).baddbmm_(torch.bmm(blocks, down.mT), up.mT)  # the layer's output is new
        return y
    return y + block_update(blocks, down, up).reshape(y.shape).to(y.dtype)


def _run_compiled(
    layer: Layer,
    rows: Rows,
    known: Mapping[str, Adapter],
    repeats: int,
    x: Tensor,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Tensor:
    """One graph for any rows: every adapter of the layer takes part, and the index chooses."""
    base, ops = layer.base_layer, layer.ops
    index = rows.index.repeat_interleave(repeats)
    factors = None if args or kwargs else _factors(layer, list(known.values()))
    if factors is not None:
        by_name = dict(zip(known, factors, strict=True))
        down, up = stacked([by_name.get(name) for name in (*rows.known, BASE)], x.dtype)
        y: Tensor = ops.call(base, x)
        more = block_update(x.reshape(len(index), -1, x.shape[-1]), down[index], up[index])
        return y + more.reshape(y.shape).to(y.dtype)
    users = [(adapter, index == rows.known.index(name)) for name, adapter in known.items()]
    changed = x
    for adapter, which in users:
        changed = choose(which, adapter.before(base, ops, choose(which, x)), changed)
    y = result = ops.call(base, changed, *args, **kwargs)
    for adapter, which in users:
        result = choose(which, adapter(base, ops, choose(which, x), choose(which, y)), result)
    return result
