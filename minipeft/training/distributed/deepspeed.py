"""DeepSpeed's ZeRO (arXiv:1910.02054) with `Updater`: its configuration, and what does not work with it.

DeepSpeed itself is imported only if it is used.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from minipeft.errors import ConfigError
from minipeft.files.base_samples import remember_base

if TYPE_CHECKING:
    from accelerate import Accelerator  # type: ignore[import-untyped]


def asked_for() -> bool:
    """Whether ``accelerate launch`` was told to use DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def process_group_options() -> list[Any]:
    """`kwargs_handlers` for an Accelerator with DeepSpeed, which on a CPU counts one process if no backend is named."""
    from accelerate.utils import InitProcessGroupKwargs  # type: ignore[import-untyped]

    return [] if torch.accelerator.is_available() else [InitProcessGroupKwargs(backend="gloo")]


def check_flags(flags: Any) -> None:
    """Raise ConfigError for a flag of `examples/train.py` that does not go with DeepSpeed."""
    if flags.save_every or flags.resume:
        raise ConfigError(
            "--save_every and --resume do not go with DeepSpeed, which cuts up the optimizer's state; leave them out."
        )
    if flags.fsdp or flags.auto_batch:
        raise ConfigError("--fsdp and --auto_batch do not go with DeepSpeed; leave them out.")
    if flags.push_to_hub:
        raise ConfigError("--push_to_hub does not go with DeepSpeed; push the adapter after the run.")


def configure(accelerator: Accelerator, micro_batch: int, clip: float) -> None:
    """Write an `Updater`'s settings into DeepSpeed's configuration. Call it before a model is loaded.

    Raises:
        ConfigError: DeepSpeed's configuration contradicts these, or DeepSpeed is not in use or would round the weights.
    """
    if accelerator.deepspeed_plugin is None:
        raise ConfigError("accelerate is told to use both DeepSpeed and the CPU without it; unset ACCELERATE_USE_CPU.")
    if accelerator.mixed_precision != "no":
        raise ConfigError(
            f"mixed_precision {accelerator.mixed_precision}: DeepSpeed would round the weights themselves; give 'no'."
        )
    config = accelerator.deepspeed_plugin.deepspeed_config
    for name in ("optimizer", "scheduler"):
        if name in config:
            raise ConfigError(f"DeepSpeed's configuration has its own {name}; leave it out, the run has one.")
    meant = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_clipping": clip,
        "train_batch_size": micro_batch * accelerator.num_processes,
        "gradient_accumulation_steps": 1,  # the Updater accumulates
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW is enough
    }
    for name, value in meant.items():
        if config.get(name, "auto") not in ("auto", value):
            raise ConfigError(
                f"DeepSpeed's {name} is {config[name]}, and must be {value} here; leave it out of its configuration."
            )
    config.update(meant)
    # Under ZeRO-3 transformers would split every base it loads, even the one that checks the saved adapter.
    from transformers.integrations import deepspeed as of_transformers

    of_transformers.unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]


def prepare(accelerator: Accelerator, model: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
    """DeepSpeed's engine and optimizer. The model may be split afterwards, but still recognises its base."""
    remember_base(model)
    engine, optimizer = accelerator.prepare(model, optimizer)
    return engine, optimizer


@contextlib.contextmanager
def whole_adapter(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """A context in which each process has the whole adapter, which ZeRO-3 splits; without DeepSpeed it does nothing."""
    if accelerator.deepspeed_plugin is None:
        yield
        return
    import deepspeed  # type: ignore[import-not-found,import-untyped,unused-ignore]

    with deepspeed.zero.GatheredParameters([parameter for parameter in model.parameters() if parameter.requires_grad]):
        yield
