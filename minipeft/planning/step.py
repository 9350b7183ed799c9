"""One training step of a model without values, as the ledger sees it."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.errors import ConfigError, told_error
from minipeft.kernels import matmul
from minipeft.kernels.chunked_cross_entropy import CHUNK_BYTES
from minipeft.kernels.dropout_mask import ROWS
from minipeft.kernels.keeps_inputs import ELEMENTS
from minipeft.kernels.lora_gradients import SLICE
from minipeft.memory.sample_slices import DEFAULT_ROWS
from minipeft.planning.hollow import Hollow, tensors_in
from minipeft.transformers_model import main_input_name, vocabulary_size


@contextlib.contextmanager
def sized_for(device: str) -> Iterator[None]:
    """Within the context, slices and chunks are as large as on this kind of device: "cpu" or "cuda"."""
    before, worth_it = (
        [(sizes, sizes["cpu"]) for sizes in (CHUNK_BYTES, DEFAULT_ROWS, ELEMENTS, ROWS, SLICE)],
        matmul.WORTH_IT,
    )
    for sizes, _ in before:
        sizes["cpu"] = sizes[device]
    if device != "cpu":
        matmul.WORTH_IT = sys.maxsize  # products are torch's own there, and not by way of float32
    try:
        yield
    finally:
        matmul.WORTH_IT = worth_it
        for sizes, value in before:
            sizes["cpu"] = value


def peak_of_step(model: nn.Module, hollow: Hollow, batch: int, length: int) -> Counter[str]:
    """Bytes by use at the peak of an AdamW step that is not the first.

    Args:
        model: in training mode, with hollow weights; its gradients are None.
        hollow: the context in which its memory was made.
        batch, length: sequences in the step, and tokens in each.

    Raises:
        ConfigError: the model does not learn from token ids alone, or refuses this length.
    """
    ledger, trained = hollow.ledger, [p for p in model.parameters() if p.requires_grad]
    with hollow:
        optimizer = torch.optim.AdamW(trained)
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        ledger.name(tensors_in([list(state.values()) for state in optimizer.state.values()]), "optimizer")
        start, ledger.use, ledger.words = len(ledger.log), "activations", vocabulary_size(model)
        try:
            inputs = _inputs(model, batch, length)
            loss = _loss(model(**inputs))
        except Exception as error:  # whatever a model raises for an input
            raise ConfigError(
                f"{type(model).__name__} cannot learn from {batch} x {length} token ids ({told_error(error)})."
            ) from error
        ledger.use = "temporary"
        loss.backward()  # type: ignore[no-untyped-call]
        ledger.name((parameter.grad for parameter in trained), "gradients")
        optimizer.step()
        optimizer.zero_grad()
    ledger.words = None
    return ledger.peak(start)


def _inputs(model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    if main_input_name(model) != "input_ids":
        raise ValueError(f"it reads {main_input_name(model)}")
    ids = torch.randint(vocabulary_size(model) or 2, (batch, length))
    return {"input_ids": ids, **_labels(model, ids)}


def _loss(output: Any) -> Tensor:
    loss = getattr(output, "loss", None)
    return output[0].float().square().mean() if loss is None else loss  # of a body without a head: its hidden state


def _labels(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    takes = inspect.signature(model.forward).parameters
    if "start_positions" in takes:
        return {"start_positions": ids[:, 0] * 0, "end_positions": ids[:, 0] * 0}
    if "labels" in takes:
        one_each = "SequenceClassification" in type(model).__name__
        few = ids[:, 0] * 0 if one_each else ids * 0
        return {"labels": few if one_each or "TokenClassification" in type(model).__name__ else ids}
    return {"decoder_input_ids": ids} if "decoder_input_ids" in takes else {}
