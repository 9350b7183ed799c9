"""Whether a model keeps packed documents apart: a probe of the model itself, since its family does not tell."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from minipeft.training.data.collate import Batch, Example, collate, model_inputs
from minipeft.training.data.packing import joined

LENGTHS = ((5, 7), (8, 2))  # of the documents in two rows: the second row needs padding
# Share of what plain packing changes: float32 leaves about 1e-5 of it, a leak into one of many layers far more.
SINGLE, HALF = 1e-2, 0.2


@torch.no_grad()
def why_not_apart(model: Any) -> str | None:
    """Run short documents packed and alone; None if the logits agree, else what is wrong, as the end of a sentence.

    Args:
        model: a causal language model of transformers; afterwards in the mode that it was in.
    """
    size = model.config.get_text_config().vocab_size
    numbers = iter(range(sum(map(sum, LENGTHS))))
    rows = [[_document(numbers, length, size) for length in lengths] for lengths in LENGTHS]
    was_training = model.training
    model.eval()
    try:
        alone = [[_logits(model, collate([document], 0))[0] for document in row] for row in rows]
        together = [joined(row) for row in rows]
        plain = _difference(_logits(model, collate([Example(*row[:2]) for row in together], 0)), alone)
        packed = _difference(_logits(model, collate(together, 0)), alone)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        return f"takes no position ids for them ({' '.join(str(error).split())[:100]})"
    finally:
        model.train(was_training)
    share = SINGLE if alone[0][0].dtype == torch.float32 else HALF
    if packed <= share * plain:
        return None
    return f"lets them influence each other (logits differ by {packed:.1e} from each document alone)"


def _document(numbers: Any, length: int, vocabulary: int) -> Example:
    ids = np.array([(37 * next(numbers) + 11) % vocabulary for _ in range(length)], np.int32)
    return Example(ids, ids)


def _logits(model: Any, batch: Batch) -> Tensor:
    logits: Tensor = model(**model_inputs({name: tensor.to(model.device) for name, tensor in batch.items()})).logits
    return logits


def _difference(logits: Tensor, alone: list[list[Tensor]]) -> float:
    """The largest difference of any document's logits."""
    parts = zip(logits, (torch.cat(row) for row in alone), strict=True)
    return max(float((row[: len(own)] - own).abs().max()) for row, own in parts)
