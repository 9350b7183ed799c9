"""What is checked before an adapter is written: that its file will hold the values, and that it can be read again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from minipeft.errors import CheckpointError, shown
from minipeft.files.atomic import Pieces
from minipeft.files.strict_json import MAX_CONFIG_BYTES
from minipeft.files.tensor_file import MAX_DIMENSIONS, header_is_too_long


def check_values(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors without their values.

    Raises:
        CheckpointError: a file with them would be worth nothing.
    """
    # AdaLoRA may leave a layer no rank, but then its tensors have two dimensions.
    empty = [
        key
        for key, tensor in tensors.items()
        if tensor.shape == (0,) or tensor.is_meta or hasattr(tensor, "full_tensor")
    ]
    if empty:
        raise CheckpointError(
            f"{directory}: {shown(empty, 3)} of {len(tensors)} tensors to save are not whole in this process, as FSDP2 and "
            "DeepSpeed's ZeRO-3 shard them. Pass the gathered ones: save_pretrained(..., "
            "state_dict=accelerator.get_state_dict(model)), called on every process."
        )


def warn_if_unreadable(directory: Path, tensors: Mapping[str, Tensor], weights: Pieces, config: bytes) -> None:
    """Warn about a file that is written and that `load_adapter` will refuse; no values are lost that training made."""
    broken = [key for key, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    reasons = {
        f"it holds NaN or infinity in {shown(broken, 3)}, so the training has diverged": broken,
        f"a tensor has more than {MAX_DIMENSIONS} dimensions": any(t.ndim > MAX_DIMENSIONS for t in tensors.values()),
        "it has complex numbers": any(t.is_complex() for t in tensors.values()),
        "the header of its weights is too long": header_is_too_long(weights.header, weights.nbytes),
        f"its configuration is longer than {MAX_CONFIG_BYTES:,} bytes": len(config) > MAX_CONFIG_BYTES,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        warnings.warn(f"{directory} is saved, but cannot be loaded again: {'; '.join(found)}.", stacklevel=5)
