"""A tiny batch, run before and after a change that must not affect what a model learns."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.ecosystem.transformers_model import main_input_name, media_input
from minipeft.errors import LeanError
from minipeft.kernels.full_precision import full_precision
from minipeft.kernels.generators import generators_kept
from minipeft.layers.base import layer_ops
from minipeft.layers.quantized import QuantizedLinearOps
from minipeft.python.interrupts import interrupts_deferred

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # relative; half precision:
HALF_TOLERANCE = 5e-2  # or as much as one rounding of the embeddings changes, see `_rounded_once_more`
MOST = 0.5  # of such noise, beyond which nothing would be proved
SEED = 20


class Probe:
    """Loss and gradients of a model as it is now, to compare with those of the changed model.

    The model runs in training mode and full precision with seeded random generators. The generators, the modules' modes
    and the buffers are restored afterwards, and nothing is written to ``.grad``.
    """

    def __init__(self, model: nn.Module, *, with_labels: bool) -> None:
        self.with_labels = with_labels
        reads = media_input(model) or main_input_name(model)  # a class may only have inherited its `main_input_name`
        if reads != "input_ids":
            raise LeanError(
                f"lean() is for models that read token ids, and {type(model).__name__} reads {reads}. To save memory, call "
                "its gradient_checkpointing_enable()."
            )
        try:
            self.loss, self.gradients = _run(model, with_labels)
        except Exception as error:
            raise LeanError(
                f"{type(model).__name__} cannot be run on a tiny batch of token ids{' with labels' * with_labels} "
                f"({type(error).__name__}: {error}), which lean() needs to prove that it changes nothing."
            ) from error
        self.tolerance = self.of_gradients = _tolerance(model)
        if self.tolerance == HALF_TOLERANCE:
            with _rounded_once_more(model):
                _, others = _run(model, with_labels)
            noise = _relative(others, self.gradients)
            self.of_gradients = min(noise, MOST) if noise > self.tolerance else self.tolerance

    def compare(self, model: nn.Module) -> None:
        """Raise a LeanError if the model's loss or gradients differ from what they were."""
        try:
            loss, gradients = _run(model, self.with_labels)
        except LeanError:
            raise
        except Exception as error:
            raise LeanError(
                f"{type(model).__name__} does not compute its loss by loss_function(logits, labels) "
                f"({type(error).__name__}: {error}); pass chunked_loss=False."
            ) from error
        errors = {
            "loss": (_relative([loss], [self.loss]), self.tolerance),
            "gradients": (_relative(gradients, self.gradients), self.of_gradients),
        }
        for what, (size, tolerance) in errors.items():
            if not size <= tolerance:
                raise LeanError(
                    f"{type(model).__name__}: with lean() the {what} would differ by {size:.2g} of their size on a tiny batch. "
                    "chunked_loss=False or fast_linear=False may help."
                )


def _tolerance(model: nn.Module) -> float:
    """By the dtype of the model, or that of half precision if a layer rounds its input, as int8 does on a GPU."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    for module in model.modules():
        ops = layer_ops(module)
        if isinstance(ops, QuantizedLinearOps):
            if not ops.calls_linear(module, like.new_empty(1, ops.shape(module)[1])):
                return HALF_TOLERANCE
    return TOLERANCE.get(like.dtype, HALF_TOLERANCE)


def _run(model: nn.Module, with_labels: bool) -> tuple[Tensor, list[Tensor]]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = next(model.parameters()).device
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.randint(
        len(embeddings.weight), (2, 8), generator=torch.Generator("cpu").manual_seed(SEED), device="cpu"
    ).to(device)
    inputs = {"input_ids": ids}
    if with_labels:
        inputs["labels"] = ids.masked_fill(
            torch.arange(8, device=device) < torch.tensor([[3], [0]], device=device), -100
        )
    elif getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    with _as_in_training(model), torch.enable_grad(), full_precision():
        output = model(**inputs)
        result = output.loss if with_labels else getattr(output, "logits", None)
        result = output[0] if result is None else result  # of a body without a head: its hidden state
        loss: Tensor = result if with_labels else _uneven_mean_square(result)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True) if loss.requires_grad else ()
    return loss.detach(), [g for g in gradients if g is not None]


def _uneven_mean_square(output: Tensor) -> Tensor:
    """A mean square in which features count differently: the plain one of a normalized output is the same for all inputs."""
    return (output.float().square() * torch.linspace(0, 1, output.shape[-1], device=output.device)).mean()


@contextlib.contextmanager
def _rounded_once_more(model: nn.Module) -> Iterator[None]:
    """Half of the embeddings' numbers are one rounding smaller.

    What that changes is what a deep model in half precision does not determine: at 8 B parameters a tenth of the gradients.
    """

    def smaller(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return None
        some = torch.rand(output.shape, generator=torch.Generator("cpu").manual_seed(SEED), device="cpu") < 0.5
        return torch.where(some.to(output.device), output * (1 - torch.finfo(output.dtype).eps / 2), output)

    hook = model.get_input_embeddings().register_forward_hook(smaller)  # type: ignore[operator]
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _as_in_training(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with generators_kept():
        torch.manual_seed(SEED)
        try:
            model.train()
            yield
        finally:
            with interrupts_deferred(), torch.no_grad():
                for module, mode in modes:
                    module.training = mode
                for buffer, value in buffers:
                    buffer.copy_(value)


def _relative(found: list[Tensor], wanted: list[Tensor]) -> float:
    if len(found) != len(wanted):
        return float("inf")
    size = _norm(wanted)
    error = _norm([f - w for f, w in zip(found, wanted, strict=True)])
    return error / size if size > 0 else error


def _norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
