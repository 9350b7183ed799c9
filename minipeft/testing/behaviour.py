"""What an adapted layer computes, and what it leaves alone: outputs, gradients, shapes, and the base."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.kernels.frozen_linear import held_or_made
from minipeft.model import get_adapter_model
from minipeft.testing.case import Case, bits, layers_of, read_and_written, relative_error


def layer_facts(case: Case) -> str | None:
    """The ops tell the truth: the shape is right, a weight read and written back is the same, and so is a linear call."""
    model = case.adapted(moved=False)
    x = case.input(case.base())
    for layer in layers_of(model):
        base, ops, weight = layer.base_layer, layer.ops, layer.ops.read_weight(layer.base_layer)
        if tuple(weight.shape) != tuple(ops.shape(base)):
            raise case.fail("layer_facts", f"shape says {ops.shape(base)}, read_weight gives {tuple(weight.shape)}")
        written = read_and_written(layer)
        if type(written) is type(base) and bits(ops.read_weight(written)) != bits(weight):
            raise case.fail("layer_facts", "a weight that is read and written back is another weight")
        for training in (False, True):
            linear = ops.linear_weight(base.train(training), x)
            if linear is not None:
                wanted = base(x)
                product = F.linear(x, held_or_made(linear, x.dtype), ops.read_bias(base))
                case.same("layer_facts", "the product by linear_weight", product, wanted)
                case.same("layer_facts", "the output of call", ops.call(base, x), wanted)
    return None


def identity_at_init(case: Case) -> str | None:
    """An adapter that has not been trained leaves the output as it is."""
    for dtype in (torch.float32, torch.bfloat16):
        if case.no(dtype) is None:
            base = case.base(dtype)
            x = case.input(base)
            case.same("identity_at_init", "the output of a fresh adapter", case.adapted(dtype, moved=False)(x), base(x))
    return None


def frozen_base(case: Case) -> str | None:
    """Only adapters train: an optimizer step changes the output, and no bit of the base."""
    model, base = case.adapted(), case.base()
    x, before = case.input(base), [bits(tensor) for tensor in _base_tensors(model)]
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = model(x).detach().clone()
    optimizer = torch.optim.SGD(trained, lr=0.1)
    torch.autograd.backward(loss(model.train(), x))
    optimizer.step()
    if [bits(tensor) for tensor in _base_tensors(model)] != before:
        raise case.fail("frozen_base", "an optimizer step changed the base")
    if torch.equal(model.eval()(x), expected):
        raise case.fail("frozen_base", "an optimizer step did not change the output")
    return None


def gradients(case: Case) -> str | None:
    """Every trainable parameter gets a finite, nonzero gradient; the input's is the slope of the output."""
    dtype = torch.float64 if case.no(torch.float64) is None else torch.float32
    model, base = case.adapted(dtype).train(), case.base(dtype)
    x = case.input(base)
    if relative_error(model(x), base(x)) < 1e-3:
        raise case.fail("gradients", "moving the adapter's parameters does not change the output")
    x = x.requires_grad_() if x.is_floating_point() else x
    torch.autograd.backward(loss(model, x))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = parameter.grad
            if grad is None or not grad.any():
                raise case.fail("gradients", f"{name} gets {'no' if grad is None else 'a zero'} gradient")
            if not grad.isfinite().all():
                raise case.fail("gradients", f"the gradient of {name} is not finite")
    if dtype == torch.float64 and x.is_floating_point():
        assert x.grad is not None
        with torch.no_grad():
            direction, step = torch.sin(torch.arange(x.numel(), dtype=dtype, device=x.device).view(x.shape)), 1e-5
            slope = (loss(model, x + step * direction) - loss(model, x - step * direction)) / (2 * step)
        got = (x.grad * direction).sum()
        if not abs(float(got - slope)) <= 1e-6 * float(x.grad.norm() * direction.norm()):
            raise case.fail("gradients", f"the input's gradient says {got:.6g}, the output's slope is {slope:.6g}")
    return None


def ownership(case: Case) -> str | None:
    """An adapter owns its parameters and holds no reference to the layer or a parameter of it."""
    base = case.base()
    held = {id(p) for p in base.parameters()} | {id(module) for module in base.modules()}
    model = get_adapter_model(base, case.config())
    for layer in layers_of(model):
        for adapter in layer.adapters.values():
            if not held.isdisjoint(map(id, (*adapter.parameters(), *adapter.modules()))):
                raise case.fail("ownership", "the adapter holds the layer it is on, or a parameter of it")
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise case.fail("ownership", "no parameter of the adapter trains")
    if any(id(p) in held for p in trained):
        raise case.fail("ownership", "a parameter of the base trains")
    return None


def not_in_place(case: Case) -> str | None:
    """Neither the layer nor its adapter writes into the input or output it is given: another module may hold them."""
    base, model = case.base(), case.adapted(moved=False)
    x = case.input(base)
    kept = x.clone()
    base(x)
    if not torch.equal(x, kept):
        raise case.fail("not_in_place", "the layer itself writes its input in place")
    seen: dict[int, list[tuple[Tensor, int]]] = {}
    written: list[str] = []

    def note(adapter: nn.Module, args: Any) -> None:
        seen[id(adapter)] = [(value, value._version) for value in args if isinstance(value, Tensor)]

    def compare(adapter: nn.Module, args: Any, output: Any) -> None:
        if any(value._version != version for value, version in seen[id(adapter)]):
            written.append(type(adapter).__name__)

    for layer in layers_of(model):
        for adapter in layer.adapters.values():
            adapter.register_forward_pre_hook(note)
            adapter.register_forward_hook(compare)
    with torch.no_grad():
        model(x)
    if written or not torch.equal(x, kept):
        raise case.fail("not_in_place", "the adapter writes in place what it is given")
    return None


def shapes(case: Case) -> str | None:
    """The adapted layer takes every input shape that the layer takes: more dimensions, fewer, and no rows."""
    base, model = case.base(), case.adapted()
    x = case.input(base)
    tried = {"one dimension more": x[None], "one dimension less": x[0], "no rows": x[:0]}
    skipped = []
    for what, other in tried.items():
        try:
            wanted = base(other)
        except (RuntimeError, ValueError, IndexError, AssertionError):
            skipped.append(what)
            continue
        got = model(other)
        if got.shape != wanted.shape:
            raise case.fail("shapes", f"with {what} the output is {list(got.shape)}, not {list(wanted.shape)}")
        if what == "one dimension more" and wanted.shape == (1, *base(x).shape):
            case.same("shapes", f"the output with {what}", got[0], model(x))
    return f"{case.layer} itself takes no input with {', '.join(skipped)}" if len(skipped) == len(tried) else None


def weighted_sum(y: Tensor) -> Tensor:
    """A loss in which every value of an output has another weight."""
    weights = torch.cos(torch.arange(y.numel(), device=y.device)).view(y.shape)
    return (y * weights.to(y.dtype)).sum()


def loss(model: nn.Module, x: Tensor) -> Tensor:
    """`weighted_sum` of the model's output."""
    return weighted_sum(model(x))


def _base_tensors(model: nn.Module) -> list[Tensor]:
    own = {id(t) for layer in layers_of(model) for t in (*layer.adapters.parameters(), *layer.adapters.buffers())}
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in own]
