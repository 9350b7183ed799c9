"""One training step of a model without values, as the ledger sees it."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.errors import ConfigError, MinipeftError, told_error
from minipeft.kernels import matmul
from minipeft.kernels.chunked_cross_entropy import CHUNK_BYTES
from minipeft.kernels.dropout_mask import ROWS
from minipeft.kernels.functional import tensors_in
from minipeft.kernels.keeps_inputs import ELEMENTS
from minipeft.kernels.lora_gradients import SLICE
from minipeft.memory.sample_slices import DEFAULT_ROWS
from minipeft.planning.batch import training_batch
from minipeft.planning.hollow import Hollow
from minipeft.planning.ledger import Ledger
from minipeft.transformers_model import vocabulary_size


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


def peak_of_step(model: nn.Module, hollow: Hollow, batch: int, length: int) -> tuple[Counter[str], list[str]]:
    """Bytes by use at the peak of an AdamW step that is not the first, and the names of modules that do not run in it.

    Args:
        model: in training mode, with hollow weights; its gradients are None.
        hollow: the context in which its memory was made.
        batch, length: sequences in the step, and tokens in each.

    Raises:
        ConfigError: what the model reads is not known, or it refuses this length.
    """
    ledger, trained = hollow.ledger, [p for p in model.parameters() if p.requires_grad]
    with hollow:
        optimizer = torch.optim.AdamW(trained)
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        ledger.name(tensors_in([list(state.values()) for state in optimizer.state.values()]), "optimizer")
        for memory in ledger.alive.values():
            memory.taken = False
        start, ledger.use, ledger.words = len(ledger.log), "activations", vocabulary_size(model)
        try:
            inputs = training_batch(model, batch, length)
            loss = _loss(model(**inputs))
        except MinipeftError:
            raise
        except Exception as error:  # whatever a model raises for an input
            raise ConfigError(
                f"{type(model).__name__} cannot learn from {batch} x {length} token ids ({told_error(error)})."
            ) from error
        ledger.use = "temporary"
        loss.backward()  # type: ignore[no-untyped-call]
        left_out = _left_out(model, ledger)
        ledger.name((parameter.grad for parameter in trained), "gradients")
        optimizer.step()
        optimizer.zero_grad()
    ledger.words = None
    return ledger.peak(start), left_out


def _left_out(model: nn.Module, ledger: Ledger) -> list[str]:
    """The largest modules none of whose parameters any operation has taken, but for originals that a copy stands in for."""
    found: list[str] = []
    for name, module in model.named_modules():
        if ".base_layer." in f"{name}." or any(name.startswith(f"{outer}.") for outer in found):
            continue
        own = [ledger.alive[p.untyped_storage()._cdata] for p in module.parameters()]
        if own and not any(memory.taken for memory in own):
            found.append(name)
    return found


def _loss(output: Any) -> Tensor:
    loss = getattr(output, "loss", None)
    return output[0].float().square().mean() if loss is None else loss  # of a body without a head: its hidden state
