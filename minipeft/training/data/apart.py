"""Whether a model keeps packed documents apart: a probe of the model itself, since its family does not tell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minipeft.errors import told_error
from minipeft.kernels.packed_documents import rounding_leak, rounding_share
from minipeft.training.data.collate import Example, collate, model_inputs
from minipeft.training.data.packing import joined

LENGTHS = ((5, 7), (8, 2))  # of the documents in two rows: the second row needs padding


@torch.no_grad()
def why_not_apart(model: Any) -> str | None:
    """Run short documents packed and alone; None if the logits agree, else what is wrong, as the end of a sentence."""
    was_training = model.training
    model.eval()
    try:
        leak, packed, plain, dtype = _measured(model)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        return f"cannot compute packed documents ({told_error(error, 100)})"
    finally:
        model.train(was_training)
    if leak <= rounding_leak(dtype) and packed <= rounding_share(dtype) * plain:
        return None
    return f"mixes packed documents (their logits differ by {packed:.1e} from those of each alone)"


def _measured(model: Any) -> tuple[float, float, float, torch.dtype]:
    """What documents change in the one behind them, as a share of the largest logit; how far packed and plainly
    joined documents are from each alone; and the type of the logits."""
    size = model.config.get_text_config().vocab_size
    numbers = iter(range(1000))
    rows = [[_document(numbers, length, size) for length in lengths] for lengths in LENGTHS]
    together = [joined(row) for row in rows]
    others = [joined([_document(numbers, len(first.input_ids), size), second]) for first, second in rows]
    alone = [torch.cat([_logits(model, [document])[0] for document in row]) for row in rows]
    packed, plain = _logits(model, together), _logits(model, [Example(*row[:2]) for row in together])
    changes = zip((packed - _logits(model, others)).abs(), LENGTHS, strict=True)
    leak = max(float(row[first : first + second].max()) for row, (first, second) in changes)
    return leak / float(packed.abs().max()), _difference(packed, alone), _difference(plain, alone), packed.dtype


def _document(numbers: Iterator[int], length: int, vocabulary: int) -> Example:
    ids = np.array([(37 * next(numbers) + 11) % vocabulary for _ in range(length)], np.int32)
    return Example(ids, ids)


def _logits(model: Any, examples: list[Example]) -> Tensor:
    batch = {name: tensor.to(model.device) for name, tensor in collate(examples, 0).items()}
    logits: Tensor = model(**model_inputs(batch)).logits
    return logits


def _difference(logits: Tensor, alone: list[Tensor]) -> float:
    """The largest difference of any token's logits."""
    return max(float((row[: len(own)] - own).abs().max()) for row, own in zip(logits, alone, strict=True))
