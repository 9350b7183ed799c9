"""What an adapted layer does: its output, its gradients, and what it leaves alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minipeft.errors import MinipeftError
from minipeft.kernels.frozen_linear import held_or_made
from minipeft.model import get_adapter_model
from minipeft.testing.case import (
    Case,
    Pair,
    Stubborn,
    bits,
    fingerprint,
    layers_of,
    move,
    read_and_written,
    relative_error,
)


def layer_facts(case: Case) -> str | None:
    """The ops say of the layer what is so: its shape, and that a weight read and written back is the same layer."""
    model = case.adapted(moved=False)
    x = case.input(case.base())
    for layer in layers_of(model):
        base, ops, weight = layer.base_layer, layer.ops, layer.ops.read_weight(layer.base_layer)
        if tuple(weight.shape) != tuple(ops.shape(base)):
            raise case.fail("layer_facts", f"shape says {ops.shape(base)}, read_weight gives {tuple(weight.shape)}")
        written = read_and_written(layer)
        if type(written) is type(base) and bits(ops.read_weight(written)) != bits(weight):
            raise case.fail("layer_facts", "a weight that is read and written back is another weight")
        if ops.is_linear_call(base):
            wanted = F.linear(x, weight, ops.read_bias(base))
            case.same("layer_facts", "what is_linear_call calls the output", base(x), wanted)
        made = ops.weight_of_call(base.train(), x)
        if made is not None:
            wanted = F.linear(x, held_or_made(made, x.dtype), ops.read_bias(base))
            case.same("layer_facts", "what weight_of_call multiplies by", base(x), wanted)
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
    """Only adapters train: an optimizer step leaves every bit of the base as it is, and changes the output."""
    model, base = case.adapted(), case.base()
    x, before = case.input(base), [bits(tensor) for tensor in _base_tensors(model)]
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = model(x).detach().clone()
    optimizer = torch.optim.SGD(trained, lr=0.1)
    torch.autograd.backward(_loss(model.train(), x))
    optimizer.step()
    if [bits(tensor) for tensor in _base_tensors(model)] != before:
        raise case.fail("frozen_base", "an optimizer step changed the base")
    if torch.equal(model.eval()(x), expected):
        raise case.fail("frozen_base", "an optimizer step did not change the output")
    return None


def gradients(case: Case) -> str | None:
    """Every trainable parameter gets a finite gradient that is not zero; the input's is the slope of the output."""
    dtype = torch.float64 if case.no(torch.float64) is None else torch.float32
    model, base = case.adapted(dtype).train(), case.base(dtype)
    x = case.input(base)
    if relative_error(model(x), base(x)) < 1e-3:
        raise case.fail("gradients", "moving the adapter's parameters does not change the output")
    x = x.requires_grad_() if x.is_floating_point() else x
    torch.autograd.backward(_loss(model, x))
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
            direction, step = torch.sin(torch.arange(x.numel(), dtype=dtype).view(x.shape)), 1e-5
            slope = (_loss(model, x + step * direction) - _loss(model, x - step * direction)) / (2 * step)
        got = (x.grad * direction).sum()
        if not abs(float(got - slope)) <= 1e-6 * float(x.grad.norm() * direction.norm()):
            raise case.fail("gradients", f"the input's gradient says {got:.6g}, the output's slope is {slope:.6g}")
    return None


def ownership(case: Case) -> str | None:
    """An adapter owns its parameters and nothing of the layer, of which it must not keep a second reference."""
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
    """Neither the layer nor its adapter writes what it is given, input or output: another module may hold it."""
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
    """What input dimensions the layer takes, the adapted layer takes: more of them, fewer, and no rows at all."""
    base, model = case.base(), case.adapted()
    x = case.input(base)
    tried = {"a dimension more": x[None], "a dimension fewer": x[0], "no rows": x[:0]}
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
        if what == "a dimension more" and wanted.shape == (1, *base(x).shape):
            case.same("shapes", f"the output with {what}", got[0], model(x))
    return f"{case.layer} itself takes no input with {', '.join(skipped)}" if len(skipped) == len(tried) else None


# -------------------------------------------------------------------------------------------------------- copies
def copies(case: Case) -> str | None:
    """A deep copy and a pickle compute the same, and share nothing that trains with the original."""
    model, x = case.adapted(), case.input(case.base())
    expected = model(x)
    try:
        copied, pickled = copy.deepcopy(model), _pickled(model)
    except Exception as error:
        try:
            _pickled(copy.deepcopy(case.base()))
        except Exception as own:
            return f"{case.layer} itself cannot be copied or pickled ({own})"
        raise case.fail("copies", f"it cannot be copied or pickled: {error}") from error
    for what, other in (("deepcopy", copied), ("pickle", pickled)):
        if not torch.equal(other(x), expected):
            raise case.fail("copies", f"its {what} computes something else")
        move(other, seed=5)
        if torch.equal(other(x), expected):
            raise case.fail("copies", f"moving the parameters of its {what} does nothing there")
    if not torch.equal(model(x), expected):
        raise case.fail("copies", "moving the parameters of a copy changes the original")
    return None


def _pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))  # of what has just been written here


def one_graph(case: Case) -> str | None:
    """``torch.compile(fullgraph=True)`` sees one graph, with the same output and gradients."""
    model, x = case.adapted(), case.input(case.base())
    expected = _gradients(model, x)
    torch._dynamo.reset()
    try:
        compiled = torch.compile(model, fullgraph=True, backend="eager")(x)
    except Exception:
        if _compiles(case.base(), x):
            raise
        return f"{case.layer} itself does not compile to one graph"
    finally:
        torch._dynamo.reset()
    case.same("one_graph", "the compiled output", compiled, model(x))
    model.zero_grad()
    torch.autograd.backward(_of(compiled))
    _same_gradients(case, "one_graph", model, expected)
    return None


def _compiles(model: nn.Module, x: Tensor) -> bool:
    torch._dynamo.reset()
    x = x.detach().requires_grad_(x.is_floating_point())  # an adapter may stand in front of the layer
    try:
        torch.compile(model, fullgraph=True, backend="eager")(x)
    except Exception:  # whatever it is, it is not the adapter's
        return False
    return True


def checkpointing(case: Case) -> str | None:
    """Under gradient checkpointing the gradients are those without it."""
    model, x = case.adapted().train(), case.input(case.base())
    expected = _gradients(model, x)
    model.zero_grad()
    torch.autograd.backward(_of(checkpoint(model, x, use_reentrant=False)))
    _same_gradients(case, "checkpointing", model, expected)
    return None


def disabled(case: Case) -> str | None:
    """In ``disable_adapter`` the model is its base, bit for bit; after it, the adapter acts and trains as before."""
    model, base = case.adapted(), case.base()
    x = case.input(base)
    expected, trains = model(x), [p.requires_grad for p in model.parameters()]
    with model.disable_adapter():
        if not torch.equal(model(x), base(x)):
            raise case.fail("disabled", "switched off, it does not compute what its base does")
    if not torch.equal(model(x), expected) or [p.requires_grad for p in model.parameters()] != trains:
        raise case.fail("disabled", "switched on again, it is not what it was")
    return None


def failed_injection(case: Case) -> str | None:
    """An injection that fails, while it is planned or half way through, leaves the model bit for bit as it was."""
    for what in ("a pattern that matches nothing", "a part that cannot be replaced"):
        model: nn.Module
        if what.startswith("a pattern"):
            model, config = case.base(), case.config(also=["no_such_module"])
        else:
            model, config = Pair(case.base(), case.base(kind=Stubborn)), case.config()
        before = fingerprint(model)
        try:
            get_adapter_model(model, config)
        except (MinipeftError, MemoryError):
            if fingerprint(model) == before:
                continue
            raise case.fail("failed_injection", f"{what} stops the injection, but it leaves a trace") from None
        raise case.fail("failed_injection", f"{what} does not stop the injection")
    return None


# ------------------------------------------------------------------------------------------------------- helpers
def _base_tensors(model: nn.Module) -> list[Tensor]:
    own = {id(t) for layer in layers_of(model) for t in (*layer.adapters.parameters(), *layer.adapters.buffers())}
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in own]


def _of(y: Tensor) -> Tensor:
    """A loss that weighs every value of an output differently."""
    weights = torch.cos(torch.arange(y.numel(), device=y.device)).view(y.shape)
    return (y * weights.to(y.dtype)).sum()


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return _of(model(x))


def _gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.autograd.backward(_loss(model, x))
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _same_gradients(case: Case, check: str, model: nn.Module, expected: dict[str, Tensor]) -> None:
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if set(got) != set(expected):
        raise case.fail(check, f"other parameters get a gradient: {sorted(set(got) ^ set(expected))}")
    for name, grad in got.items():
        case.same(check, f"the gradient of {name}", grad, expected[name])
