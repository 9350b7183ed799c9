"""How much memory a training step will take, itemised, from the model's configuration alone."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from minipeft.config.adapter_config import HEADS_OF_TASK, AdapterConfig
from minipeft.config.options import integer, one_of
from minipeft.errors import ConfigError, LeanError, shown
from minipeft.files.save import adapter_tensors
from minipeft.files.tensor_bytes import header_of
from minipeft.injection.status import parameter_counts
from minipeft.memory.lean import lean
from minipeft.planning.base import DTYPES, Place, base_model, quiet
from minipeft.planning.hollow import Hollow
from minipeft.planning.step import peak_of_step, reads_text_alone, remarks_on, sized_for

TRAININGS = ("full", "lora", "lean")
DEVICES = ("cpu", "cuda")
ITEMS = ("weights", "adapters", "gradients", "optimizer", "activations", "temporary", "logits", "overhead")
ADAPTER = "default"
# Task types that train a fresh head in full, by the ending of the model's class. PEFT has none for pictures.
TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForImageClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
Adapt = Callable[[nn.Module, AdapterConfig], nn.Module]
LARGEST = 2**20  # sequences in a step, and tokens in one
MIB = 2**20
# What a process takes besides arrays. On a CPU, by benchmarks/estimate.py: what the matrix libraries set up, and the holes in
# glibc's heap, as a share of the arrays that come and go. On CUDA: torch's context, which was not measured.
RUNTIME = {"cpu": 40 * MIB, "cuda": 500 * MIB}
QUANTIZED = 25 * MIB  # the library, and what the float weights leave behind
HOLES = {"cpu": 0.1, "cuda": 0.0}


@dataclass(frozen=True)
class Setup:
    """How a model is going to be trained.

    Args:
        training: "full" (fine-tuning), "lora", or "lean", which is LoRA with `minipeft.lean`.
        checkpointing: of lean, see `minipeft.lean`.
        dtype: of the base, see `minipeft.planning.base.base_model`.
        quantize: None, or a kind of `minipeft.quantize`.
        batch: sequences in a step.
        length: tokens in each.
        device: "cpu" or "cuda"; on a GPU lean works on larger pieces.

    Raises:
        ConfigError: a value is not allowed, or does not go with another.
    """

    training: str = "lean"
    checkpointing: str | int | None = None
    dtype: str | None = None
    quantize: str | None = None
    batch: int = 1
    length: int = 512
    device: str = "cpu"

    def __post_init__(self) -> None:
        one_of("training", self.training, TRAININGS)
        one_of("device", self.device, DEVICES)
        one_of("dtype", self.dtype, (None, *DTYPES))
        integer("batch", self.batch, at_least=1, at_most=LARGEST)
        integer("length", self.length, at_least=1, at_most=LARGEST)
        if self.training != "lean" and self.checkpointing is not None:
            raise ConfigError(f'checkpointing={self.checkpointing!r} is an option of training="lean".')
        if self.training == "full" and self.quantize is not None:
            raise ConfigError("a quantized base is frozen, so it cannot be fine-tuned in full; take lora or lean.")


@dataclass(frozen=True)
class Estimate:
    """What a training step takes.

    Attributes:
        model: name of the model's class.
        setup: what it is for.
        parameters: of the model with its adapters; a quantized weight counts as many as it packs.
        trainable: those that train.
        adapter_file: bytes of the tensors in ``adapter_model.safetensors`` with their header; 0 for full fine-tuning.
        memory: bytes at the peak by what they are for, see `ITEMS`; "temporary" is what the backward pass makes and drops.
        remarks: sentences on what was assumed, and on parts of the model that the step does not run.
        chunks_loss: whether `minipeft.lean` computes this model's loss in chunks.
    """

    model: str
    setup: Setup
    parameters: int
    trainable: int
    adapter_file: int
    memory: Mapping[str, int]
    remarks: tuple[str, ...] = ()
    chunks_loss: bool = True

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return sum(self.memory.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "peak": self.peak}


class Planner:
    """A model that is built and adapted once, to look at it with several batches.

    Args:
        place: see `minipeft.planning.base.base_model`.
        config: of the adapter.
        setup: how it is trained.
        adapt: `minipeft.get_adapter_model`, which stands above this package.

    Raises:
        MinipeftError: the model cannot be built, adapted, or made lean.
    """

    def __init__(self, place: Place, config: AdapterConfig, setup: Setup, adapt: Adapt) -> None:
        self.setup, self.hollow, self.chunks_loss = setup, Hollow(), True
        self.model = base_model(place, self.hollow, setup.dtype, setup.quantize)
        own = {id(parameter) for parameter in self.model.parameters()}
        ledger = self.hollow.ledger
        with quiet(), self.hollow, sized_for(setup.device):
            if setup.training != "full":
                if config.task_type is None and config.modules_to_save is None:
                    config = replace(config, task_type=task_type(self.model))
                self.model = adapt(self.model, config)
                added = [parameter for parameter in self.model.parameters() if id(parameter) not in own]
                ledger.name(added, "adapters")
            ledger.use = "activations"
            if setup.training == "lean":
                self.chunks_loss = _made_lean(self.model, setup.checkpointing)

    def estimate(self, batch: int | None = None) -> Estimate:
        """The estimate, for the batch of the setup or another one; raises ConfigError if the model refuses it."""
        setup = self.setup if batch is None else replace(self.setup, batch=batch)
        gc.collect()  # of an earlier step
        with quiet(), sized_for(setup.device):
            found, left_out = peak_of_step(self.model, self.hollow, setup.batch, setup.length)
        holes = HOLES[setup.device] * (found["activations"] + found["temporary"])
        quantized = QUANTIZED if setup.quantize and setup.device == "cpu" else 0
        found["overhead"] = RUNTIME[setup.device] + int(holes) + quantized
        trainable, parameters = parameter_counts(self.model)
        return Estimate(
            model=type(self.model).__name__,
            setup=setup,
            parameters=parameters,
            trainable=trainable,
            adapter_file=0 if setup.training == "full" else self._file_bytes(),
            memory={item: found[item] for item in ITEMS},
            remarks=tuple(self._remarks(left_out)),
            chunks_loss=self.chunks_loss,
        )

    def _remarks(self, left_out: list[str]) -> Iterator[str]:
        yield from remarks_on(self.model)
        if left_out:
            yield f"Not run in this step, so without activations: {shown(left_out)}."
        if not self.chunks_loss:
            yield "The loss is not computed in chunks: this model takes lean(model, chunked_loss=False)."

    def _file_bytes(self) -> int:
        tensors = adapter_tensors(self.model, ADAPTER)
        return len(header_of(tensors, {})[0]) + sum(tensor.nbytes for tensor in tensors.values())


def task_type(model: nn.Module) -> str | None:
    """The task type by which the head of a classifier trains in full."""
    task = next((task for ending, task in TASKS.items() if type(model).__name__.endswith(ending)), None)
    has_head = any(isinstance(getattr(model, name, None), nn.Module) for name in HEADS_OF_TASK.get(task or "", ()))
    return task if has_head else None


def _made_lean(model: nn.Module, checkpointing: str | int | None) -> bool:
    """Make a model lean; returns whether its loss is computed in chunks, which some models do not allow."""
    if not reads_text_alone(model):
        raise LeanError(
            f"lean() is for models that read token ids alone, and {type(model).__name__} is not one; take lora."
        )
    try:
        lean(model, checkpointing)
        return True
    except LeanError:
        lean(model, checkpointing, chunked_loss=False)
        return False
