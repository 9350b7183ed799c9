"""Whether as many processes run as a launcher was asked for: some launchers start fewer and say nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import distributed as dist

from minipeft.errors import ConfigError

TWO_ON_CPU = (
    "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 --num_machines 1 "
    "--mixed_precision no --dynamo_backend no"
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
