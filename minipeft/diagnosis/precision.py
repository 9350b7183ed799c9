"""Dtypes, devices and modes: what makes a right update vanish, overflow or never be computed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from minipeft.diagnosis.check import Seen, Setup, about, check
from minipeft.errors import shown

# Of bfloat16: a change below this share of a value is rounded away, at least in half of all cases.
HALF_SPACING = 2.0**-9
TO_FLOAT = "for p in filter(lambda p: p.requires_grad, model.parameters()): p.data = p.data.float()"
LOST = 0.5  # share of a factor's values
OF_ADAPTERS = re.compile(r"\b(adapters\.|(lora|vera)_dropout\b)")  # in names of modules, ours and PEFT's


@check(
    "float16-trained",
    "A gradient scaler refuses it ('Attempting to unscale FP16 gradients'), and without one small gradients are zero.",
)
def float16(setup: Setup) -> Iterable[Seen]:
    """Parameters in float16 require a gradient."""
    training = setup.view.training
    parts = [p for p in training if any(t.dtype == torch.float16 for t in p.trained)]
    fix = f"{TO_FLOAT}  # autocast_adapter_dtype=True, the default, does so from the start"
    return about(parts, "its parameters train in float16.", fix, of=training)


@check(
    "update-lost-to-rounding",
    "Adam moves each value by the learning rate, and bfloat16 rounds the sum back to the value.",
)
def lost_to_rounding(setup: Setup) -> Iterator[Seen]:
    """Most values of a bfloat16 factor are too large to be changed by one step."""
    rates = setup.rates if setup.is_adam else {}
    trained = [(part, p, rates[id(p)]) for part in setup.view.training for p in part.trained if id(p) in rates]
    shares = [(part, _lost(p, rate), rate) for part, p, rate in trained if p.dtype == torch.bfloat16 and not p.is_meta]
    lost = {(part.layer, part.adapter): (part, share, rate) for part, share, rate in shares if share > LOST}
    if lost:
        _, share, rate = max(lost.values(), key=lambda found: found[1])
        yield from about(
            (part for part, _, _ in lost.values()),
            f"at learning rate {rate:g} a step leaves up to {share:.0%} of a factor's bfloat16 values unchanged.",
            TO_FLOAT,
        )


def _lost(parameter: nn.Parameter, rate: float) -> float:
    """The share of a parameter's values that a change by the rate is too small for."""
    return float((parameter.detach().abs() * HALF_SPACING > rate).float().mean())


@check("mixed-devices", "The forward pass fails there.", stops=True)
def mixed_devices(setup: Setup) -> Iterator[Seen]:
    """An adapter is on another device than its layer."""
    parts = []
    for part in setup.view.parts:
        base = {p.device for p in part.base.parameters() if not p.is_meta}
        own = {p.device for p in part.parameters.values()}
        if part.active and base and own - base:
            parts.append(part)
    if parts:
        here, there = next(iter(parts[0].parameters.values())).device, next(parts[0].base.parameters()).device
        yield from about(parts, f"the adapter is on {here}, its layer on {there}.", f"model.to({str(there)!r})")


@check("dropout-in-eval", "The outputs are random, and differ from those in training by chance.")
def dropout_in_eval(setup: Setup) -> Iterator[Seen]:
    """The model is in evaluation mode, and a dropout is not."""
    if setup.view.root.training or setup.optimizer is not None:
        return
    parts = [part for part in setup.view.acting if part.dropout and part.drops]
    if parts:
        yield from about(
            parts,
            f"it drops {parts[0].dropout:.0%} of its inputs although the model is in evaluation mode.",
            "model.eval()  # after the adapter was added",
        )
    own = [name for name, module in _dropouts(setup) if module.training]
    if own:
        yield Seen(shown(own, 3), "this dropout is in training mode, and the model is not.", "model.eval()")


@check(
    "eval-in-training",
    "Dropout and gradient checkpointing are off, so training takes another course than it is meant to.",
)
def eval_in_training(setup: Setup) -> Iterator[Seen]:
    """There is an optimizer, and the model is in evaluation mode, which makes a difference."""
    root = setup.view.root
    if setup.optimizer is None or not setup.view.training or root.training:
        return
    waiting = [name for name, module in _dropouts(setup) if not module.training]
    waiting += [part.layer for part in setup.view.training if part.dropout and not part.drops]
    checkpointed = any(getattr(module, "gradient_checkpointing", False) is True for module in root.modules())
    if waiting or checkpointed:
        what = f"{len(waiting)} dropouts" if waiting else "gradient checkpointing"
        yield Seen(
            type(root).__name__, f"it is in evaluation mode, and has {what}.", "model.train()  # a Trainer does so"
        )


def _dropouts(setup: Setup) -> list[tuple[str, nn.Module]]:
    """The base's own dropouts that are not 0."""
    found = [
        (name, module)
        for name, module in setup.view.root.named_modules()
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
    ]
    return [(name, module) for name, module in found if not OF_ADAPTERS.search(name)]
