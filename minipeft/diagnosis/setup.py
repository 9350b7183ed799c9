"""What a diagnosis looks at: the model as a view, the batch, the optimizer and the tokenizer, and a trial of the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minipeft.diagnosis.trial import Trial
from minipeft.diagnosis.view import View

IGNORED = -100  # the label that the loss leaves out


@dataclass
class Setup:
    """See `minipeft.diagnosis.diagnose.diagnose`."""

    view: View  # of the model
    batch: Mapping[str, Any] | None  # what the model is called with
    optimizer: Any  # of the run, possibly in a wrapper of accelerate's
    tokenizer: Any  # that made the batch
    adapter_dir: Path | None  # where an adapter was loaded from
    trial: Trial | None = None  # what became of the batch; None before that

    @property
    def is_training(self) -> bool:
        """Whether this is a set-up for training, not for use: it has an optimizer, or the model is in training mode."""
        return self.optimizer is not None or self.view.root.training

    @cached_property  # asked for each parameter
    def rates(self) -> dict[int, float]:
        """The learning rate of each parameter in the optimizer, by its id: that of the schedule's peak, if there is one."""
        groups = self.optimizer.param_groups if self.optimizer is not None else ()
        return {id(p): float(group.get("initial_lr", group["lr"])) for group in groups for p in group["params"]}

    @property
    def is_adam(self) -> bool:
        """Whether the optimizer moves each value by about the learning rate, whatever the size of the gradient."""
        return "adam" in type(getattr(self.optimizer, "optimizer", self.optimizer)).__name__.lower()

    @property
    def is_causal(self) -> bool:
        """Whether the model predicts each token from those before it, and shifts the labels itself."""
        can_generate = getattr(self.view.root, "can_generate", None)
        return not self.is_encoder_decoder and callable(can_generate) and bool(can_generate())

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model reads one sequence and writes another."""
        return bool(getattr(getattr(self.view.root, "config", None), "is_encoder_decoder", False))

    def tensor(self, name: str) -> Tensor | None:
        """A tensor of the batch."""
        found = None if self.batch is None else self.batch.get(name)
        return found if isinstance(found, Tensor) else None

    def trainable_base(self) -> dict[str, nn.Parameter]:
        """The base's parameters that require a gradient, without the biases that an adapter's ``bias`` option trains."""
        biases = any(getattr(config, "bias", "none") != "none" for config in self.view.configs.values())
        return {
            name: parameter
            for name, parameter in self.view.base.items()
            if parameter.requires_grad and not (biases and name.endswith("bias"))
        }
