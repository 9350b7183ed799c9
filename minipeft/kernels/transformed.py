"""Whether torch records or transforms what is computed: only its own operations will do then, without hand-written backward passes."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether this runs under a compiler, `torch.export`, or as `is_traced` says."""
    return torch.compiler.is_compiling() or _is_traced()


def is_compiled() -> bool:
    """Whether this runs under ``torch.compile``, whose graphs stay in this process and may hold operations of ours."""
    return torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()


def is_traced() -> bool:
    """Whether this runs under ``torch.jit.trace``, ``make_fx``, a transform of ``torch.func``, or in forward mode."""
    return not torch.compiler.is_dynamo_compiling() and _is_traced()


def _is_traced() -> bool:  # questions that dynamo cannot trace
    return (
        torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    )
