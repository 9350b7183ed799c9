"""`minipeft.diagnose`: what is wrong with a set-up, without training anything."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from minipeft.diagnosis import acting, base, labels, learning, numbers, precision, rates, vocabulary
from minipeft.diagnosis.check import Check, Finding, Setup
from minipeft.diagnosis.our_view import our_view
from minipeft.diagnosis.peft_view import has_peft_layers, peft_view
from minipeft.diagnosis.view import View
from minipeft.ecosystem.wrapper_names import unwrapped
from minipeft.errors import ConfigError, DataError
from minipeft.injection.state import STATE

GROUPS = (numbers, base, acting, learning, rates, precision, labels, vocabulary)
CHECKS: tuple[Check, ...] = tuple(
    sorted(
        (found for group in GROUPS for found in vars(group).values() if isinstance(found, Check)),
        key=lambda check: check.needs_trial,
    )
)
STOPS = {check.name for check in CHECKS if check.stops}


def diagnose(
    model: nn.Module,
    batch: Mapping[str, Any] | None = None,
    optimizer: Optimizer | None = None,
    tokenizer: Any = None,
    *,
    adapter_dir: str | PathLike[str] | None = None,
) -> list[Finding]:
    """Look for what is wrong with an adapted model, minipeft's or PEFT's, as it would be trained or used now.

    The batch is run once, with a backward pass if an active adapter trains. Afterwards the model, its gradients, modes and
    buffers, the optimizer and all random generators are what they were, bit for bit.

    Args:
        model: with adapters; wrappers such as DDP and ``torch.compile`` are looked into.
        batch: what the model is called with, with labels if it trains. Without one, what only a pass shows is not looked for.
        optimizer: of the run. With one, the model is taken to be in training.
        tokenizer: that made the batch, one of transformers'.
        adapter_dir: the directory that the active adapter was loaded from, to compare its keys.

    Returns:
        The findings, what explains others first; none for a healthy set-up.

    Raises:
        DataError: the model cannot take the batch, or it trains and the batch has no labels.
        ConfigError: an argument is of another kind, or the adapters are not on layers, such as prompts.
        CheckpointError: `adapter_dir` holds no adapter.
    """
    _check_arguments(model, batch, optimizer)
    view = view_of(model)
    if not view.parts:
        return [_no_adapter(view)]
    setup = Setup(view, batch, optimizer, tokenizer, None if adapter_dir is None else Path(adapter_dir))
    findings: list[Finding] = []
    for check in CHECKS:
        names = {finding.name for finding in findings}
        if check.needs_trial and (batch is None or names & STOPS):
            break
        if not names.intersection(check.unless):
            findings += check.findings(setup)
    return findings


def view_of(model: nn.Module) -> View:
    """The view of a model, whoever adapted it; without parts if nobody did.

    Raises ConfigError if PEFT gave it a method without layers, such as prompt tuning, or it holds several adapted models.
    """
    called = unwrapped(model)
    ours = [module for module in called.modules() if STATE in vars(module)]
    if len(ours) > 1:
        raise ConfigError(
            f"{type(called).__name__} holds {len(ours)} adapted models; call diagnose with one at a time."
        )
    if ours:
        return our_view(called, ours[0])
    inner = getattr(called, "get_base_model", None)
    root = inner() if callable(inner) else called
    if has_peft_layers(root):
        return peft_view(called, root)
    configs = getattr(called, "peft_config", None)
    if isinstance(configs, dict) and configs:
        method = type(next(iter(configs.values()))).__name__
        raise ConfigError(f"{method} puts nothing on layers, which is all that diagnose looks at.")
    return View(model=called, root=called)


def _no_adapter(view: View) -> Finding:
    return Finding(
        "no-adapter",
        type(view.root).__name__,
        "neither minipeft nor PEFT has put an adapter into this model.",
        "Nothing of it is adapted, and all of it may train.",
        "model = minipeft.get_lora_model(model, minipeft.LoraConfig(target_modules='all-linear'))",
    )


def _check_arguments(model: object, batch: object, optimizer: object) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"diagnose takes a model, not {type(model).__name__}.")
    if batch is not None and not isinstance(batch, Mapping):
        raise DataError(
            f"batch must be what the model is called with, a mapping by argument, not {type(batch).__name__}."
        )
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise ConfigError(f"optimizer must be one of torch's or like it, not {type(optimizer).__name__}.")
