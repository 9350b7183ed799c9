"""How many processes a launcher was asked for, and whether that many run: some launchers start fewer, and say nothing."""

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

    ``Accelerator(cpu=True)`` then joins them. Without it, each would train by itself, into the same directory: this is
    what plain ``torchrun`` on such a machine does.
    """
    return int(environment.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()


def restarts(environment: Mapping[str, str] = os.environ) -> int:
    """How often the launcher has started these processes anew after one of them died (``--max_restarts``)."""
    return int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))


def join_after_restart(environment: Mapping[str, str] = os.environ) -> None:
    """Let the processes of a launch that was restarted (``--max_restarts``) find each other, and not the dead ones.

    With torch 2.13 the launcher's static rendezvous, which ``accelerate launch`` uses, keeps one store for all attempts,
    without a prefix for each: a process may read the address of one that has died, and fail. To be called before
    anything starts torch.distributed; nothing to do at a first attempt.
    """
    attempt = restarts(environment)
    if attempt == 0 or environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    world_size, rank = int(environment["WORLD_SIZE"]), int(environment["RANK"])
    store = dist.TCPStore(  # type: ignore[attr-defined]
        environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), world_size, is_master=False
    )
    on_cpu = must_use_cpu(environment) or environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    device = torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()
    backend = dist.get_default_backend_for_device(device or "cpu")
    prefixed = dist.PrefixStore(f"minipeft/attempt_{attempt}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=prefixed, rank=rank, world_size=world_size)


def check_processes(running: int, script: str, environment: Mapping[str, str] = os.environ) -> None:
    """Compare the number of processes that train together with what the launcher was asked for.

    Args:
        running: ``accelerator.num_processes``.
        script: for the command in the message.
        environment: what the launcher has set.

    Raises:
        ConfigError: fewer run; it says which command starts them.
    """
    asked = environment.get("WORLD_SIZE")
    # With --cpu, `accelerate launch --num_processes 2` runs one process, but announces where the others would meet it.
    if asked is None and "MASTER_ADDR" in environment and "ACCELERATE_MIXED_PRECISION" in environment:
        asked = "several"
    if asked is None or asked == str(running):
        return
    raise ConfigError(
        f"{asked} processes were asked for, but {running} {'trains' if running == 1 else 'train'} together. "
        f"Two processes on a CPU: {TWO_ON_CPU} {script}"
    )
