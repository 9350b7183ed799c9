"""The loss of each adapter in a batch whose rows use different ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from minipeft.errors import ConfigError
from minipeft.injection.rows import BASE, numbers, taken
from minipeft.injection.rows_of_call import names_of_rows


def per_adapter_loss(
    logits: Tensor, labels: Tensor, adapter_names: Sequence[str], *, ignore_index: int = -100, shift: bool = True
) -> dict[str, Tensor]:
    """The mean cross entropy of each adapter's own tokens, as if it had been trained alone.

    ``sum(per_adapter_loss(...).values()).backward()`` gives each adapter the gradient of its own loss. A loss that is not
    finite stays with its adapter.

    Args:
        logits: shape (rows, length, classes); or (rows, classes), one label a row.
        labels: shape (rows, length), or (rows,).
        adapter_names: as the model was called with; rows with ``"__base__"`` have no loss.
        ignore_index: a label that does not count. With no other label in its rows, an adapter's loss is 0.
        shift: each position predicts the next label, as in a causal language model; False for an encoder-decoder and for
            labels of tokens. One label a row is never shifted.

    Returns:
        The adapters' names, in the order of the rows -> a scalar in float32 at least.

    Raises:
        ConfigError: logits, labels and names do not belong together.
    """
    for name, tensor in (("logits", logits), ("labels", labels)):
        if not isinstance(tensor, Tensor):
            raise ConfigError(f"per_adapter_loss: {name} must be a tensor, not {type(tensor).__name__}.")
    count = len(names_of_rows(adapter_names))
    if logits.shape[:-1] != labels.shape or len(labels) != count:
        raise ConfigError(
            f"per_adapter_loss: logits {tuple(logits.shape)}, labels {tuple(labels.shape)} and {count} names must agree on the "
            "rows, and on the length."
        )
    if shift and labels.ndim > 1:
        logits, labels = logits[:, :-1], labels[:, 1:]
    wide = logits if logits.dtype.itemsize >= 4 else logits.float()
    losses = F.cross_entropy(
        wide.reshape(-1, wide.shape[-1]), labels.reshape(-1), ignore_index=ignore_index, reduction="none"
    )
    sums, tokens = losses.view(count, -1).sum(1), (labels != ignore_index).view(count, -1).sum(1)
    found = {}
    for name in dict.fromkeys(adapter_names):
        own = numbers([row for row, used in enumerate(adapter_names) if used == name], labels.device)
        if name != BASE:
            found[name] = taken(sums, own).sum() / taken(tokens, own).sum().clamp_min(1)
    return found
