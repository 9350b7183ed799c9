"""How much of a difference between packed documents and documents alone is rounding."""

from __future__ import annotations

import torch

from minipeft.kernels.functional import HALF


def rounding_leak(dtype: torch.dtype) -> float:
    """The most that rounding changes in the logits of one document if another document of its row changes.

    As a share of the largest logit, by their dtype. Masked attention changes no bit; a grouped product of experts may round
    differently.
    """
    return 4e-3 if dtype in HALF else 1e-5


def rounding_share(dtype: torch.dtype) -> float:
    """The most that packed documents differ from each alone by rounding, as a share of what they would if they were one text."""
    return 0.2 if dtype in HALF else 1e-3
