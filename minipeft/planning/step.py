"""One training step of a model without values, as the ledger sees it, and what the model reads in it."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections import Counter
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.ecosystem.transformers_model import main_input_name, vocabulary_size
from minipeft.errors import ConfigError, MinipeftError, told_error
from minipeft.kernels import matmul
from minipeft.kernels.chunked_cross_entropy import CHUNK_BYTES
from minipeft.kernels.dropout_mask import ROWS
from minipeft.kernels.functional import tensors_in
from minipeft.kernels.keeps_inputs import ELEMENTS
from minipeft.kernels.lora_gradients import SLICE
from minipeft.memory.sample_slices import DEFAULT_ROWS
from minipeft.planning.hollow import Hollow
from minipeft.planning.ledger import Ledger

# Models that learn one label per text or picture, or one per token, by the ending of their class's name.
ONE_LABEL = ("ForSequenceClassification", "ForImageClassification")
LABEL_PER_TOKEN = ("ForTokenClassification",)


@contextlib.contextmanager
def sized_for(device: str) -> Iterator[None]:
    """Within the context, slices and chunks are as large as on this kind of device: "cpu" or "cuda"."""
    before = [(sizes, sizes["cpu"]) for sizes in (CHUNK_BYTES, DEFAULT_ROWS, ELEMENTS, ROWS, SLICE)]
    worth_it = matmul.WORTH_IT
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


def training_batch(model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    """Inputs and labels of one step: `batch` texts of `length` tokens each, or as many pictures or recordings.

    A picture has the size that the configuration names, and a recording the longest.
    Raises ConfigError if the model reads something whose size is not known.
    """
    takes, main = inspect.signature(model.forward).parameters, main_input_name(model)
    ids = torch.randint(vocabulary_size(model) or 2, (batch, length))
    if type(model).__name__.endswith("ForMultipleChoice"):
        raise _unknown(model, "several texts at a time")
    if main == "input_ids":
        inputs = {"input_ids": ids} | (
            {"pixel_values": torch.zeros(batch, *_picture(model))} if _compares(takes) else {}
        )
    elif main == "pixel_values":
        inputs = {"pixel_values": torch.zeros(batch, *_picture(model))}
    elif main == "input_features" and "labels" in takes:
        inputs = {"input_features": torch.zeros(batch, *_frames(model))}
    else:
        raise _unknown(model, main)
    return {**inputs, **_labels(model, ids, takes, reads_text=main != "pixel_values")}


def reads_text_alone(model: nn.Module) -> bool:
    """Whether token ids are all that a step of this model needs."""
    return main_input_name(model) == "input_ids" and not _compares(inspect.signature(model.forward).parameters)


def remarks_on(model: nn.Module) -> list[str]:
    """What is to know of such a batch, in sentences."""
    takes, main = inspect.signature(model.forward).parameters, main_input_name(model)
    found = []
    if main == "pixel_values" or _compares(takes):
        found.append(f"Each row has a picture of {' x '.join(map(str, _picture(model)[1:]))} pixels.")
    if main == "input_features":
        found.append(f"Each row has a recording of {_frames(model)[1]} frames, the longest; the tokens are its text.")
    return found


def _compares(takes: Container[str]) -> bool:
    """Whether a model compares texts with pictures, as CLIP does; others that take both can do without pictures."""
    return "pixel_values" in takes and "return_loss" in takes


def _labels(model: nn.Module, ids: Tensor, takes: Any, reads_text: bool) -> dict[str, Any]:
    name = type(model).__name__
    if "start_positions" in takes:
        return {"start_positions": ids[:, 0] * 0, "end_positions": ids[:, 0] * 0}
    if "return_loss" in takes:
        return {"return_loss": True}
    if "labels" not in takes:
        return {"decoder_input_ids": ids} if "decoder_input_ids" in takes else {}
    if name.endswith(ONE_LABEL):
        return {"labels": ids[:, 0] * 0}
    if not reads_text and "decoder_input_ids" not in takes:
        raise _unknown(model, "labels of its own kind")
    return {"labels": ids * 0 if name.endswith(LABEL_PER_TOKEN) else ids}


def _picture(model: nn.Module) -> tuple[int, ...]:
    """Channels, height and width."""
    config: Any = model.config
    own = next((part for part in (config, getattr(config, "vision_config", None)) if hasattr(part, "image_size")), None)
    size = getattr(own, "image_size", None)
    sides = list(size) if isinstance(size, list | tuple) else [size, size]
    found = [number for number in (getattr(own, "num_channels", None), *sides) if isinstance(number, int)]
    if len(found) != 3:
        raise _unknown(model, "pictures")
    return tuple(found)


def _frames(model: nn.Module) -> tuple[int, int]:
    """Of Whisper, whose recordings are padded to one length: bands, and frames, which its convolutions halve."""
    config: Any = model.config
    if getattr(config, "model_type", None) != "whisper":
        raise _unknown(model, "recordings")
    return config.num_mel_bins, 2 * config.max_source_positions


def _unknown(model: nn.Module, what: str) -> ConfigError:
    return ConfigError(
        f"{type(model).__name__} reads {what}, whose number and size its configuration does not say, so its training "
        "cannot be estimated."
    )
