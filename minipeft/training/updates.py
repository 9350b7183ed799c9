"""One update of the weights: forward and backward passes over each process's share, one exchange, one step.

The gradient is that of the mean loss over all tokens of the update, for any number of processes and passes and however
uneven their shares. It is exchanged once per update, in one piece: an adapter's gradient is small, so sending it during
the backward pass, as DDP does, gains nothing. Until then no process waits for another, so a process that runs out of
memory can say so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from minipeft.errors import StateError, told_error
from minipeft.injection.module_tree import wrappers
from minipeft.injection.step_hooks import after_step, extra_loss, has_schedule, refuse_idle_layers
from minipeft.injection.training_guard import check_training
from minipeft.training.data.collate import Batch, Store, eval_batches, model_inputs
from minipeft.training.data.encoding import IGNORED
from minipeft.training.data.order import Update
from minipeft.training.distributed.ranks import summed

if TYPE_CHECKING:
    from accelerate import Accelerator  # type: ignore[import-untyped]

LossSum = Callable[[nn.Module, Batch], Tensor]


def loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    """Sum of a causal language model's cross-entropies of all predicted tokens, in nats, a float32 scalar; it may be lean."""
    labels = batch["labels"]
    inputs = model_inputs(batch)
    # A DeepSpeed engine passes on its model's attributes.
    if model.training and getattr(model, "_minipeft_lean", None) is not None:
        output = model(**inputs, labels=labels, num_items_in_batch=1)
        if output.logits is None:  # otherwise the loss is transformers' own, in its own precision
            return output.loss
        logits = output.logits
    else:
        logits = model(**inputs).logits
    logits = logits[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="sum")


class Updater:
    """Makes the updates of a run. Calls `minipeft.extra_loss` and `minipeft.after_step` for methods that need them.

    Args:
        accelerator: of the run; its own accumulation stays at 1.
        model: on its device, not wrapped; it may be sharded by `minipeft.training.distributed.sharding.shard`.
        optimizer: prepared by the accelerator.
        micro_batch: examples per forward pass of one process.
        clip: largest norm of the gradient; a larger one is scaled down to it.
        auto_batch: if any process runs out of memory, halve `micro_batch` on all and repeat the update.
        loss: sum of the losses of a batch.
        engine: DeepSpeed's, of this model and optimizer; it exchanges gradients, clips and steps itself.

    Raises:
        StateError: `auto_batch` or the method's schedule does not work with a sharded model or DeepSpeed, or the engine
            clips or divides differently, an adapter that trains is merged, or the optimizer has none of its parameters.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        micro_batch: int,
        clip: float,
        auto_batch: bool = False,
        loss: LossSum = loss_sum,
        engine: Any = None,
    ) -> None:
        self.accelerator, self.model, self.optimizer, self.loss = accelerator, model, optimizer, loss
        self.engine = engine
        # Indices of parameters that got a gradient; DeepSpeed takes a missing one for zeros.
        self.reached: set[int] = set()
        self.micro_batch, self.clip, self.auto_batch = micro_batch, clip, auto_batch
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.sharded = isinstance(model, FSDPModule)
        self.scheduled = has_schedule(model)
        refuse_idle_layers(model)
        if auto_batch and (self.sharded or engine is not None):
            raise StateError(
                "auto_batch does not work with a sharded model or DeepSpeed: processes wait for each other within a pass."
            )
        if self.scheduled and (self.sharded or engine is not None):
            raise StateError(
                "the adapter's own schedule needs whole tensors; it does not work with a sharded model or DeepSpeed."
            )
        if engine is None and not self.sharded:
            check_training(model, optimizer)
        if engine is not None:
            self._check_engine()
            for index, parameter in enumerate(self.parameters):
                parameter.register_hook(partial(self._reach, index))  # type: ignore[no-untyped-call]
        elif accelerator.num_processes > 1 and not self.sharded:
            _take_from_first(model, self.parameters)

    def __call__(self, update: Update) -> float:
        """Make an update and return its mean loss in nats per token, without the method's extra loss.

        Raises:
            StateError: memory runs out, and `auto_batch` is off or there is only one example at a time.
        """
        total = self._gradients(update)
        while total is None:
            self._halve()
            total = self._gradients(update)
        if self.engine is not None:
            self._check_reached(bool(self.reached))
            self.engine.step()
            return total / update.tokens
        if not self.sharded:
            self._exchange()
        self.accelerator.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        if self.scheduled and not self.optimizer.step_was_skipped:  # type: ignore[attr-defined]
            after_step(self.model, update.number)
        self.optimizer.zero_grad()
        return total / update.tokens

    def _gradients(self, update: Update) -> float | None:
        """Add up this process's gradients. Returns the sum of the losses of all processes; None if memory ran out."""
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        engine = self.engine
        # fully_shard and DeepSpeed divide by the number of processes.
        scale = (world_size if self.sharded or engine is not None else 1) / update.tokens
        losses: list[Tensor] = []
        sums = torch.zeros(2, dtype=torch.float64, device="cpu")  # of losses, and of processes out of memory
        batches = update.batches(rank, world_size, self.micro_batch)
        try:
            for number, batch in enumerate(batches, 1):
                if isinstance(self.model, FSDPModule):
                    self.model.set_requires_gradient_sync(number == len(batches))
                if engine is not None:
                    engine.set_gradient_accumulation_boundary(is_boundary=number == len(batches))
                batch = _on(self.accelerator.device, batch)
                with self.accelerator.autocast():
                    loss = self.loss(self.model if engine is None else engine, batch)
                (self.accelerator if engine is None else engine).backward(loss * scale)
                losses.append(loss.detach())
            if self.scheduled and rank == 0:  # once, as the gradients of all processes are summed
                self.accelerator.backward(extra_loss(self.model))
        except (RuntimeError, MemoryError) as error:
            if self.sharded or engine is not None or not is_out_of_memory(error):
                raise
            if not self.auto_batch and world_size == 1:
                raise self._too_large(error) from None
            sums[1] = 1
        sums[0] = sum(map(float, losses))  # here and not after each pass, so that a GPU is waited for once
        sums = summed(sums, self.accelerator.device)
        return None if sums[1] else float(sums[0])

    def _halve(self) -> None:
        self.optimizer.zero_grad()
        clear_device_cache(garbage_collection=True)
        if self.micro_batch == 1 or not self.auto_batch:
            raise self._too_large(None)
        self.micro_batch = (self.micro_batch + 1) // 2
        self.accelerator.print(f"out of memory: now {self.micro_batch} examples at a time, in more passes per update")

    def _too_large(self, error: BaseException | None) -> StateError:
        detail = "" if error is None else f" ({told_error(error, 120)})"
        return StateError(
            f"out of memory with {self.micro_batch} examples at a time{detail}; lower the batch size or the length, "
            "or turn on lean, checkpointing or auto_batch."
        )

    @torch.no_grad()
    def _exchange(self) -> None:
        """Sum the gradients over the processes. One may have none for a parameter, such as an expert's."""
        here = [float(p.grad is not None) for p in self.parameters]
        if self.accelerator.num_processes > 1:
            reached = torch.tensor(here, device=self.parameters[0].device)
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
            flat = torch.cat([reached, *(part.flatten().float() for part in parts)])
            dist.all_reduce(flat)
            reached, *sums = torch.split(flat, [len(reached), *(part.numel() for part in parts)])
            here = reached.tolist()
            for parameter, part, total, some in zip(self.parameters, parts, sums, here, strict=True):
                parameter.grad = part.copy_(total.view_as(part)) if some else None
        self._check_reached(any(here))

    def _check_reached(self, some: bool) -> None:
        if not some:
            raise StateError(
                "no trainable parameter got a gradient: the loss does not depend on the adapter. Check what the model "
                "calls, whether an adapter is merged, and reentrant checkpointing."
            )

    def _reach(self, index: int, gradient: Tensor) -> None:
        self.reached.add(index)

    def _check_engine(self) -> None:
        """The engine must clip as this run does, and not divide by a number of passes, as the losses are sums."""
        clip, passes = self.engine.gradient_clipping(), self.engine.gradient_accumulation_steps()
        if (clip, passes) != (self.clip, 1):
            raise StateError(
                f"DeepSpeed has gradient_clipping {clip} and gradient_accumulation_steps {passes}; they must be "
                f"{self.clip} and 1, as minipeft accumulates itself."
            )


@torch.no_grad()
def _take_from_first(model: nn.Module, parameters: list[nn.Parameter]) -> None:
    """Give every process the first one's values of what trains, and of what else adapters hold, such as a random factor."""
    held = [t for _, wrapper in wrappers(model) for t in (*wrapper.adapters.parameters(), *wrapper.adapters.buffers())]
    for tensor in {id(tensor): tensor for tensor in (*parameters, *held)}.values():
        value = tensor.contiguous()
        dist.broadcast(value, 0)
        tensor.copy_(value)


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, model: nn.Module, store: Store, micro_batch: int, loss: LossSum = loss_sum
) -> float:
    """Mean loss in nats per token over all examples; each counts once, on any number of processes.

    `model`, `micro_batch` and `loss` are as for `Updater`; the model is left in evaluation mode.
    """
    model.eval()
    losses = []
    for batch in eval_batches(store, micro_batch, accelerator.process_index, accelerator.num_processes):
        with accelerator.autocast():
            losses.append(loss(model, _on(accelerator.device, batch)))
    total = torch.tensor([sum(map(float, losses))], dtype=torch.float64, device="cpu")
    return float(summed(total, accelerator.device)) / int(store.targets.sum())


def _on(device: torch.device, batch: Batch) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device has no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or should_reduce_batch_size(error)
