"""One forward pass, and a backward pass if something trains, after which everything is as it was, bit for bit."""

from __future__ import annotations

import contextlib
import random
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from minipeft.diagnosis.view import View
from minipeft.errors import DataError, told_error
from minipeft.injection.rollback import unchanged_afterwards
from minipeft.injection.watch import Pass, watched
from minipeft.injection.wrapper import Switch
from minipeft.kernels.generators import generators_kept

SEED = 0
LARGE = 2**16  # elements


@dataclass
class Trial:
    """What became of a batch."""

    seen: Pass  # which modules were called and which weights were read
    idle: set[str]  # names of the adapted layers that were left out although the module around them ran
    loss: float | None  # its value; None if the model returned none
    trained: bool  # whether it ran as in training, for a loss; `gradients` is then what came of it
    warned: list[str]  # what was warned about meanwhile
    broken: str | None  # name of the first module that returned a NaN
    # The largest magnitude in the gradient of each trainable parameter that got one, by its id
    gradients: dict[int, float]


def try_batch(view: View, batch: Mapping[str, Any], *, must_train: bool) -> Trial:
    """Run the batch: in training mode, with a backward pass, if an active adapter trains; else as the model is.

    Raises DataError if the model cannot take the batch, or it is to be trained and returns no loss.
    """
    training = bool(view.learning)
    switch: Any = next((other for other in view.others if isinstance(other, Switch)), Switch())
    with left_alone(view):
        names = {id(module): name for name, module in view.root.named_modules()}
        with watched(switch) as seen, _first_nan(names) as broken, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            output = forward(view, batch, training=training)
        loss = _loss(output)
        if loss is None and training and must_train:
            raise DataError(
                f"{type(view.root).__name__} returns no loss for this batch, which has {', '.join(map(str, batch))}: training "
                "needs labels in it."
            )
        if loss is not None and loss.requires_grad:
            _backward(view, loss)
        return Trial(
            seen=seen,
            idle=set(view.idle(seen)),
            loss=None if loss is None else float(loss),
            trained=loss is not None and training,
            warned=[str(warning.message) for warning in warned],
            broken=next(iter(broken), None),
            gradients={
                id(p): float(p.grad.abs().max())
                for p in view.model.parameters()
                if p.grad is not None and p.grad.numel()
            },
        )


def forward(view: View, batch: Mapping[str, Any], *, training: bool) -> Any:
    """Call the model with seeded random generators, inside `left_alone`; raises DataError if it cannot take the batch."""
    device = next((p.device for p in view.root.parameters() if not p.is_meta), torch.device("cpu"))
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    if training:
        view.model.train()
    torch.default_generator.manual_seed(SEED)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(SEED)
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(training):
            return view.model(**inputs)
    except Exception as error:
        raise DataError(
            f"{type(view.root).__name__} cannot take this batch ({type(error).__name__}: {told_error(error)}); it has "
            f"{', '.join(f'{name} {tuple(v.shape)}' if isinstance(v, Tensor) else str(name) for name, v in batch.items())}."
        ) from error


def _backward(view: View, loss: Tensor) -> None:
    try:
        loss.backward()  # type: ignore[no-untyped-call]
    except Exception as error:
        raise DataError(
            f"the backward pass of {type(view.root).__name__} fails ({type(error).__name__}: {told_error(error)})."
        ) from error


def logits_of(output: Any) -> Tensor | None:
    """The logits that a model returned."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else None


def _loss(output: Any) -> Tensor | None:
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if found is None and isinstance(output, tuple) and output:
        found = output[0]
    return found if isinstance(found, Tensor) and found.numel() == 1 else None


@contextlib.contextmanager
def _first_nan(names: Mapping[int, str]) -> Iterator[list[str]]:
    """Collects the names of the modules that return a NaN; infinities may be masks."""
    found: list[str] = []

    def look(module: nn.Module, args: object, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) and output else output
        if not found and isinstance(value, Tensor) and value.is_floating_point() and bool(value.isnan().any()):
            found.append(names.get(id(module)) or type(module).__name__)

    handle = register_module_forward_hook(look)
    try:
        yield found
    finally:
        handle.remove()


@contextlib.contextmanager
def left_alone(view: View) -> Iterator[None]:
    """Within the block the model may be run; afterwards it, its gradients and all random generators are what they were."""
    modules = list(view.model.modules())
    parameters = list(view.model.parameters())
    gradients = [parameter.grad for parameter in parameters]
    # Hooks after a gradient, with which some train without an optimizer's step.
    found = (getattr(parameter, "_post_accumulate_grad_hooks", None) for parameter in parameters)
    hooks = [(own, own.copy()) for own in found if own]
    with unchanged_afterwards(*modules, *view.others), _generators_kept():
        _copy_buffers(modules)
        try:
            for parameter in parameters:
                parameter.grad = None
            for own, _ in hooks:
                own.clear()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            for own, content in hooks:
                own.update(content)


def _copy_buffers(modules: list[nn.Module]) -> None:
    """Let modules run with copies of their buffers. Large tables of integers are weights that no call changes."""
    copies: dict[int, Tensor] = {}
    for module in modules:
        for name, buffer in module._buffers.items():
            if buffer is not None and (buffer.is_floating_point() or buffer.numel() < LARGE):
                module._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    numpy = sys.modules.get("numpy")
    own, foreign = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with generators_kept():
            yield
    finally:
        random.setstate(own)
        if numpy is not None:
            numpy.random.set_state(foreign)
