"""Optimizers and schedules by the names that transformers' Trainer has for them."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from minipeft.errors import ConfigError
from minipeft.training.lora_plus import lora_plus_groups

TORCH: dict[str, dict[str, Any]] = {"adamw_torch": {}, "adamw_torch_fused": {"fused": True}}
BITSANDBYTES = {"adamw_8bit": "AdamW8bit", "adamw_bnb_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit"}
NAMES = (*TORCH, *BITSANDBYTES)
# Those that need no more than a warm-up and a number of updates.
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
WARMUP_RATIO = 0.1


def check_optimizer(name: str, sharded: bool = False) -> None:
    """Raise ConfigError if the name is unknown, its package is missing, or it does not take `sharded` parameters."""
    if name not in NAMES:
        raise ConfigError(f"--optim {name}: choose one of {', '.join(NAMES)}.")
    if name in BITSANDBYTES and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"--optim {name} needs bitsandbytes: pip install bitsandbytes, or take adamw_torch.")
    if name in BITSANDBYTES and sharded:
        raise ConfigError(f"--optim {name} does not go with --fsdp; take adamw_torch.")


def make_optimizer(model: nn.Module, name: str, rate: float, weight_decay: float, lora_plus_ratio: float) -> Optimizer:
    """An optimizer of the parameters that require a gradient.

    `lora_plus_ratio` says how many times faster B learns than A, arXiv:2402.12354.
    """
    check_optimizer(name)
    groups = [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]
    if lora_plus_ratio != 1:
        groups = lora_plus_groups(model, rate, lora_plus_ratio, weight_decay)
    if name in TORCH:
        return AdamW(groups, lr=rate, weight_decay=weight_decay, **TORCH[name])
    import bitsandbytes

    return getattr(bitsandbytes.optim, BITSANDBYTES[name])(groups, lr=rate, weight_decay=weight_decay)


def warmup_share(schedule: str, ratio: float | None) -> float:
    """The share of the updates in which the learning rate rises; `WARMUP_RATIO` if the schedule has a warm-up.

    Raises:
        ConfigError: it has none, and a share was given; or the share is not from 0 to 1.
    """
    if schedule == "constant" and ratio:
        raise ConfigError("--warmup_ratio: constant has no warm-up; take --lr_scheduler_type constant_with_warmup.")
    if ratio is not None and not 0 <= ratio <= 1:
        raise ConfigError(f"--warmup_ratio {ratio}: give a share of the updates, from 0 to 1.")
    return WARMUP_RATIO if ratio is None else ratio


def continue_schedule(schedule: LambdaLR) -> None:
    """Set the rates that a schedule has where it stands, after the state of a shorter one was loaded into it."""
    rates = [
        base * share(schedule.last_epoch) for base, share in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates
