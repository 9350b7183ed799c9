"""The random generators that a training step draws from, as tensors: torch's, CUDA's, Python's and numpy's."""

from __future__ import annotations

import hashlib
import math
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minipeft.errors import CheckpointError, shown
from minipeft.training.distributed.ranks import gather_bytes

PYTHON_VERSION = 3  # of random.getstate(), since Python 3.2


def rng_state() -> dict[str, Tensor]:
    """State of this process's generators, by name.

    ``torch`` and ``cuda.<index>`` are uint8 as torch gives them, ``python`` and ``numpy`` int64 words; ``python.gauss``
    and ``numpy.gauss`` are float64 of shape (1,), the second half of a pair of normal numbers, NaN where there is none.
    CUDA's are there once CUDA is in use, numpy's once it is imported. Drawing from none of them, this changes none.

    Raises:
        CheckpointError: numpy's global generator is not the Mersenne Twister.
    """
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state |= {f"cuda.{index}": words for index, words in enumerate(torch.cuda.get_rng_state_all())}
    _, words, gauss = random.getstate()
    state["python"] = torch.tensor(words, dtype=torch.int64)
    state["python.gauss"] = torch.tensor([math.nan if gauss is None else gauss], dtype=torch.float64)
    if "numpy" in sys.modules:
        import numpy as np

        state_of_numpy: Any = np.random.get_state(legacy=True)
        kind, keys, position, has_gauss, cached = state_of_numpy
        if kind != "MT19937":
            raise CheckpointError(f"numpy's global generator is {kind}, whose state cannot be saved; MT19937's can.")
        state["numpy"] = torch.tensor([*keys.tolist(), position], dtype=torch.int64)
        state["numpy.gauss"] = torch.tensor([cached if has_gauss else math.nan], dtype=torch.float64)
    return state


def set_rng_state(state: Mapping[str, Tensor]) -> None:
    """Set this process's generators to what `rng_state` gave; those that are not named stay as they are.

    Raises:
        CheckpointError: this is no such state, or it names a CUDA device that is not here; nothing was changed.
    """
    check_rng_state(state)
    torch.set_rng_state(state["torch"])
    for name in state:
        if name.startswith("cuda."):
            torch.cuda.set_rng_state(state[name], int(name.removeprefix("cuda.")))
    random.setstate((PYTHON_VERSION, tuple(state["python"].tolist()), _or_none(state["python.gauss"])))
    if "numpy" in state:
        import numpy as np

        *words, position = state["numpy"].tolist()
        cached = _or_none(state["numpy.gauss"])
        np.random.set_state(
            ("MT19937", np.array(words, dtype=np.uint32), position, int(cached is not None), cached or 0.0)
        )


def check_rng_state(state: Mapping[str, Tensor]) -> None:
    """Raise unless `set_rng_state` can take this; see there."""
    devices = [name for name in state if name.startswith("cuda.")]
    here = torch.cuda.device_count() if devices else 0
    absent = [name for name in devices if not name[5:].isdecimal() or int(name[5:]) >= here]
    if absent:
        raise CheckpointError(
            f"the checkpoint has random states of {shown(absent)}, and there are {here} CUDA devices."
        )
    if torch.cuda.is_initialized() and not devices:  # type: ignore[no-untyped-call]
        raise CheckpointError("the checkpoint has no random states of CUDA devices, and CUDA is in use here.")
    like: dict[str, tuple[torch.dtype, int | None]] = {
        "torch": (torch.uint8, torch.get_rng_state().numel()),
        "python": (torch.int64, 625),
        "python.gauss": (torch.float64, 1),
        "numpy": (torch.int64, 625),
        "numpy.gauss": (torch.float64, 1),
        **dict.fromkeys(devices, (torch.uint8, None)),
    }
    wanted = {"torch", "python", "python.gauss"} | ({"numpy", "numpy.gauss"} if "numpy" in state else set())
    right = wanted | set(devices) == state.keys() and all(
        tensor.dtype == like[name][0] and tensor.ndim == 1 and like[name][1] in (None, tensor.numel())
        for name, tensor in state.items()
    )
    if not right:
        raise CheckpointError(f"this is no state of random generators: {shown(state)}.")


def gathered_rng_states() -> dict[str, Tensor]:
    """The states of all processes, each name with ``rank<number>.`` before it; called by every process.

    Raises:
        CheckpointError: the processes do not have the same generators.
    """
    mine = dict(sorted(rng_state().items()))
    layout = repr([(name, tensor.dtype, tensor.shape) for name, tensor in mine.items()])
    digest = torch.tensor(list(hashlib.sha256(layout.encode()).digest()), dtype=torch.uint8)
    if any(not torch.equal(digest, other) for other in gather_bytes(digest)):
        raise CheckpointError("the processes have different random generators (CUDA's, numpy's); they must be alike.")
    packed = torch.cat([tensor.contiguous().view(torch.uint8) for tensor in mine.values()])
    sizes = [tensor.nbytes for tensor in mine.values()]
    states = {}
    for rank, payload in enumerate(gather_bytes(packed)):
        for (name, tensor), part in zip(mine.items(), torch.split(payload, sizes), strict=True):
            states[f"rank{rank}.{name}"] = part.clone().view(tensor.dtype)
    return states


def _or_none(gauss: Tensor) -> float | None:
    value = gauss.item()
    return None if math.isnan(value) else value
