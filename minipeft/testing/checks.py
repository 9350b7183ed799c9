"""The checks, in the order in which they run: those that explain the failure of others come first."""

from __future__ import annotations

from collections.abc import Callable

import torch

from minipeft.testing.behaviour import (
    frozen_base,
    gradients,
    identity_at_init,
    layer_facts,
    not_in_place,
    ownership,
    shapes,
)
from minipeft.testing.case import Case
from minipeft.testing.files import files, whole_state
from minipeft.testing.merging import merges
from minipeft.testing.reads import acts, reads
from minipeft.testing.runtime import checkpointing, copies, disabled, failed_injection, offloading, one_graph

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
    reads,
    acts,
    files,
    whole_state,
    copies,
    one_graph,
    checkpointing,
    offloading,
)
