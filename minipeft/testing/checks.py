"""The promises in the order in which they are tried: those that explain a failure of the others come first."""

from __future__ import annotations

from collections.abc import Callable

import torch

from minipeft.testing.behaviour import (
    checkpointing,
    copies,
    disabled,
    failed_injection,
    frozen_base,
    gradients,
    identity_at_init,
    layer_facts,
    not_in_place,
    one_graph,
    ownership,
    shapes,
)
from minipeft.testing.case import Case
from minipeft.testing.files import files
from minipeft.testing.merging import merges

Check = Callable[[Case], "str | None"]
CHECKS: tuple[Check, ...] = (
    layer_facts,
    ownership,
    failed_injection,
    not_in_place,
    identity_at_init,
    frozen_base,
    gradients,
    disabled,
    shapes,
    merges(torch.float64),
    merges(torch.float32),
    merges(torch.bfloat16),
    files,
    copies,
    one_graph,
    checkpointing,
)
