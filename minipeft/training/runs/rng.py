"""The random generators that a training step draws from, as tensors: torch's, CUDA's, Python's and numpy's."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minipeft.errors import CheckpointError, all_or_nothing, shown
from minipeft.training.distributed.ranks import gather

PYTHON_VERSION = 3  # of random.getstate(), since Python 3.2


def rng_state() -> dict[str, Tensor]:
    """The state of this process's generators, by name. Reading it draws nothing.

    ``torch`` and ``cuda.<index>`` are uint8, as torch gives them; ``python`` and ``numpy`` are int64 words.
    ``python.gauss`` and ``numpy.gauss`` are float64 of shape (1,): the second normal number of a pair, or NaN if none is
    waiting. CUDA's are included once CUDA is in use.

    Raises:
        CheckpointError: numpy's global generator is not the Mersenne Twister.
    """
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state |= {f"cuda.{index}": words for index, words in enumerate(torch.cuda.get_rng_state_all())}
    _, words, gauss = random.getstate()
    state["python"] = torch.tensor(words, dtype=torch.int64, device="cpu")
    state["python.gauss"] = torch.tensor([math.nan if gauss is None else gauss], dtype=torch.float64, device="cpu")
    state_of_numpy: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, cached = state_of_numpy
    if kind != "MT19937":
        raise CheckpointError(f"numpy's global generator is {kind}, whose state cannot be saved; MT19937's can.")
    state["numpy"] = torch.tensor([*keys.tolist(), position], dtype=torch.int64, device="cpu")
    state["numpy.gauss"] = torch.tensor([cached if has_gauss else math.nan], dtype=torch.float64, device="cpu")
    return state


@all_or_nothing
def set_rng_state(state: Mapping[str, Tensor]) -> None:
    """Set this process's generators to what `rng_state` gave; generators that it does not name are left alone.

    Raises:
        CheckpointError: this is not such a state, or it names a CUDA device that is not here.
    """
    check_rng_state(state)
    torch.set_rng_state(state["torch"])
    for name in _devices(state):
        torch.cuda.set_rng_state(state[name], int(name.removeprefix("cuda.")))
    _set_python(random, state)
    if "numpy" in state:
        _set_numpy(np.random, state)


def check_rng_state(state: Mapping[str, Tensor]) -> None:
    """Raise as `set_rng_state` does, and set nothing."""
    devices = _devices(state)
    here = torch.cuda.device_count() if devices else 0
    absent = [name for name in devices if not name[5:].isdecimal() or int(name[5:]) >= here]
    if absent:
        raise CheckpointError(
            f"the checkpoint has random states of {shown(absent)}, and there are {here} CUDA devices."
        )
    if torch.cuda.is_initialized() and not devices:  # type: ignore[no-untyped-call]
        raise CheckpointError("the checkpoint has no random states of CUDA devices, and CUDA is in use here.")
    try:  # generators that nobody draws from
        torch.Generator("cpu").set_state(state["torch"])
        _set_python(random.Random(), state)
        if "numpy" in state:
            _set_numpy(np.random.RandomState(), state)
        if any(state[name].dtype != torch.uint8 for name in devices):
            raise TypeError("CUDA's must be uint8")
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"this is not a state of random generators ({error!r:.100}): {shown(state)}.") from None


def gathered_rng_states() -> dict[str, Tensor]:
    """The states of all processes, each name prefixed by ``rank<number>.``; every process calls it."""
    states = enumerate(gather(rng_state()))
    return {f"rank{rank}.{name}": tensor for rank, state in states for name, tensor in state.items()}


def _devices(state: Mapping[str, Tensor]) -> list[str]:
    return [name for name in state if name.startswith("cuda.")]


def _set_python(generator: Any, state: Mapping[str, Tensor]) -> None:
    generator.setstate((PYTHON_VERSION, tuple(state["python"].tolist()), _or_none(state["python.gauss"])))


def _set_numpy(generator: Any, state: Mapping[str, Tensor]) -> None:
    *words, position = state["numpy"].tolist()
    gauss = _or_none(state["numpy.gauss"])
    generator.set_state(("MT19937", words, position, int(gauss is not None), gauss or 0.0))


def _or_none(gauss: Tensor) -> float | None:
    value = gauss.item()
    return None if math.isnan(value) else value
