"""The Accelerator of a run, or an error that says why what was asked for would not happen.

Some launchers start fewer processes than they were told to, and say nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers  # type: ignore[import-untyped]
from accelerate.utils import GradientAccumulationPlugin  # type: ignore[import-untyped]
from torch import distributed as dist

from minipeft.errors import ConfigError
from minipeft.training.distributed import deepspeed

TWO_ON_CPU = (
    "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 --num_machines 1 "
    "--mixed_precision no --dynamo_backend no"
)


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


def must_use_cpu(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether several processes were started on a machine without an accelerator.

    ``Accelerator(cpu=True)`` then joins them. Without it each would train alone, into the same directory, as with plain
    ``torchrun`` on such a machine.
    """
    return int(environment.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()


def restarts() -> int:
    """How often the launcher has restarted these processes because one of them died (``--max_restarts``)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def join_after_restart() -> None:
    """After a restart (``--max_restarts``), make the processes find each other and not the dead ones.

    With torch 2.13, the static rendezvous of ``accelerate launch`` uses one store for all attempts, with no prefix per
    attempt: a process may read the address of a dead one and fail. Call this before anything starts torch.distributed;
    on the first attempt it does nothing.
    """
    attempt = restarts()
    if attempt == 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, is_master=False
    )
    on_cpu = must_use_cpu() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    device = torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()
    backend = dist.get_default_backend_for_device(device or "cpu")
    prefixed = dist.PrefixStore(f"minipeft/attempt_{attempt}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=prefixed, rank=rank, world_size=world_size)


def check_processes(running: int, script: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError, with the command that works, if fewer processes train together than were asked for."""
    asked = environment.get("WORLD_SIZE")
    # `accelerate launch --cpu --num_processes 2` runs one process, but still sets the address where others would join.
    if asked is None and "MASTER_ADDR" in environment and "ACCELERATE_MIXED_PRECISION" in environment:
        asked = "several"
    if asked is None or asked == str(running):
        return
    raise ConfigError(
        f"{asked} processes were asked for, but {running} {'trains' if running == 1 else 'train'} together. "
        f"Two processes on a CPU: {TWO_ON_CPU} {script}"
    )
