"""The Accelerator of a run, or an error that says why what was asked for would not happen."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers  # type: ignore[import-untyped]
from accelerate.utils import GradientAccumulationPlugin  # type: ignore[import-untyped]

from minipeft.errors import ConfigError
from minipeft.training.distributed import deepspeed
from minipeft.training.distributed.launch import check_processes, join_after_restart, must_use_cpu


def start_accelerator(mixed_precision: str | None, trackers: Sequence[str], directory: Path) -> Accelerator:
    """Join the processes that the launcher started.

    Args:
        mixed_precision: "no", "bf16" or "fp16"; None takes what ``accelerate launch`` was told.
        trackers: names of accelerate's trackers.
        directory: where trackers write their files.

    Raises:
        ConfigError: fewer processes run than were asked for, a tracker or a library is missing, the precision does not
            work on this device, or accelerate is configured for a way of training that an `Updater` does not know.
    """
    for name in trackers:
        _check_tracker(name)
    join_after_restart()
    accelerator = _accelerator(mixed_precision, trackers, directory)
    check_processes(accelerator.num_processes, sys.argv[0])
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("--mixed_precision fp16 does nothing on a CPU; give bf16 or no.")
    if accelerator.distributed_type.value in ("FSDP", "MEGATRON_LM"):
        raise ConfigError(
            f"accelerate is configured for {accelerator.distributed_type.value}; configure plain data parallelism, "
            "and give --fsdp here."
        )
    return accelerator


def _accelerator(mixed_precision: str | None, trackers: Sequence[str], directory: Path) -> Accelerator:
    with_deepspeed = deepspeed.asked_for()
    try:
        return Accelerator(
            mixed_precision=mixed_precision,
            cpu=None if with_deepspeed else must_use_cpu() or None,
            kwargs_handlers=deepspeed.process_group_options() if with_deepspeed else None,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the Updater accumulates
            log_with=list(trackers) or None,
            project_dir=directory,
        )
    except ImportError as error:
        raise ConfigError(str(error)) from None
    except ValueError as error:
        asked = "DeepSpeed" if with_deepspeed else f"--mixed_precision {mixed_precision}"
        raise ConfigError(f"{asked}: {error}") from None


def _check_tracker(name: str) -> None:
    """Refuse a tracker whose package is missing: accelerate leaves it out without a word."""
    if name not in LOGGER_TYPE_TO_CLASS:
        raise ConfigError(f"--log_with {name}: no such tracker; there are {', '.join(LOGGER_TYPE_TO_CLASS)}.")
    if name not in map(str, get_available_trackers()):
        raise ConfigError(
            f"--log_with {name}: its package is not installed; pip install {name}, or leave the flag out."
        )
