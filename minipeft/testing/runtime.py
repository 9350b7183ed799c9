"""What else an adapted model goes through: copying, pickling, compiling, recomputing, switching off, and failing."""

from __future__ import annotations

import copy
import importlib
import pickle
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minipeft.errors import MinipeftError, TargetError
from minipeft.injection.wrapper import Wrapper
from minipeft.model import get_adapter_model
from minipeft.testing.behaviour import loss, weighted_sum
from minipeft.testing.case import Case, Holder, fingerprint, move


def copies(case: Case) -> str | None:
    """A deep copy and a pickle compute the same, and share no trainable parameter with the original."""
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
    return pickle.loads(pickle.dumps(model))  # safe: it was written right here


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
    torch.autograd.backward(weighted_sum(compiled))
    _same_gradients(case, "one_graph", model, expected)
    return None


def _compiles(model: nn.Module, x: Tensor) -> bool:
    torch._dynamo.reset()
    x = x.detach().requires_grad_(x.is_floating_point())  # as behind another adapter
    try:
        torch.compile(model, fullgraph=True, backend="eager")(x)
    except Exception:  # whatever it is, it is not the adapter's fault
        return False
    return True


def checkpointing(case: Case) -> str | None:
    """Gradient checkpointing does not change the gradients."""
    model, x = case.adapted().train(), case.input(case.base())
    expected = _gradients(model, x)
    model.zero_grad()
    torch.autograd.backward(weighted_sum(checkpoint(model, x, use_reentrant=False)))
    _same_gradients(case, "checkpointing", model, expected)
    return None


def offloading(case: Case) -> str | None:
    """On a base that accelerate offloads, output and gradients are the same, and the adapter is where the layer runs."""
    base, plain = case.base(), case.base().requires_grad_(False)
    x = case.input(plain)
    try:
        importlib.import_module("accelerate").cpu_offload(base.requires_grad_(False), execution_device=x.device)
        works = torch.equal(base(x), plain(x))
    except Exception:  # whatever it is, it is not the adapter's fault
        works = False
    if not works:
        return f"{case.layer} itself does not work when accelerate offloads it"
    try:
        model = case.adapted(base=base)
    except TargetError as error:
        return f"offloaded, {case.layer} is refused ({error})"
    expected = case.adapted()
    if any(tensor.is_meta for tensor in model.adapter_state_dict().values()):
        raise case.fail("offloading", "the adapter is made on the meta device, without values")
    case.same("offloading", "the output on an offloaded base", model(x), expected(x))
    _same_gradients(case, "offloading", _backward(model, x), _gradients(expected, x))
    return None


def disabled(case: Case) -> str | None:
    """Inside ``disable_adapter`` the model is its base, bit for bit; afterwards the adapter acts and trains as before."""
    model, base = case.adapted(), case.base().requires_grad_(False)  # frozen too: torch's attention has a path for that
    x = case.input(base)
    expected, trains = model(x), [p.requires_grad for p in model.parameters()]
    with model.disable_adapter():
        if not torch.equal(model(x), base(x)):
            raise case.fail("disabled", "switched off, it does not compute what its base does")
    if not torch.equal(model(x), expected) or [p.requires_grad for p in model.parameters()] != trains:
        raise case.fail("disabled", "switched on again, it is not what it was")
    return None


class Stubborn(Holder):
    """A holder whose layer cannot be wrapped, so that an injection fails after all before it was done."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.layer.forward = self.layer.forward  # so the wrapper is a new object, which has to be assigned

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Wrapper):
            raise MemoryError("a part of the model that cannot be replaced")
        super().__setattr__(name, value)


class Pair(nn.Module):
    """Two holders, in the order of injection."""

    def __init__(self, first: Holder, second: Holder) -> None:
        super().__init__()
        self.first, self.second = first, second


def failed_injection(case: Case) -> str | None:
    """An injection that fails, in its plan or half way through, leaves the model bit for bit as it was."""
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
            raise case.fail("failed_injection", f"{what} stops the injection, but the model was changed") from None
        raise case.fail("failed_injection", f"{what} does not stop the injection")
    return None


def _backward(model: nn.Module, x: Tensor) -> nn.Module:
    model.zero_grad()
    torch.autograd.backward(loss(model, x))
    return model


def _gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    _backward(model, x)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _same_gradients(case: Case, check: str, model: nn.Module, expected: dict[str, Tensor]) -> None:
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if set(got) != set(expected):
        raise case.fail(check, f"other parameters get a gradient: {sorted(set(got) ^ set(expected))}")
    for name, grad in got.items():
        case.same(check, f"the gradient of {name}", grad, expected[name])
