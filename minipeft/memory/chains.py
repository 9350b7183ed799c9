"""Recomputed blocks in groups: only the first block of a group keeps its input, and the others' are computed again from it.

With groups of about the square root of the number of blocks, what is kept grows with that root, for one more forward pass
(Chen et al., 2016, arXiv:1604.06174).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from minipeft.injection.checkpointing import ActingNow, switch_of
from minipeft.memory import sample_slices

CHAINS = "_minipeft_chains"  # in a block's __dict__: the model's `Chains`
Call = Callable[..., Any]
Place = tuple[tuple[int, ...], tuple[int, ...], int]  # shape, stride and offset of a view of a block's input


class Chains:
    """The groups of a model's forward pass, one of which is being made."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.chain: Chain | None = None
        self.last: Callable[[], Any] = lambda: None  # the output of the last block

    def __reduce__(self) -> Any:
        return Chains, (self.size,)

    def run(self, block: nn.Module, function: Call, args: tuple[Any, ...], checkpointed: Call) -> Any:
        """``checkpointed(function, *args)`` in slices, as a link of the present group or the first of a new one."""
        x: Tensor = args[0]
        if self.chain is None or self.last() is not x:
            self.chain = Chain(x)
        chain = self.chain
        index = chain.add(block, function, args[1:])
        memory, start = x.untyped_storage().data_ptr(), int(x.storage_offset())  # and not x, which the hooks would keep

        def pack(tensor: Tensor) -> Tensor | Place:
            if tensor.untyped_storage().data_ptr() == memory:
                return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()) - start
            return tensor

        def unpack(kept: Tensor | Place) -> Tensor:
            return kept if isinstance(kept, Tensor) else torch.as_strided(chain.input(index), *kept)

        follows = index > 0 and x.is_contiguous()
        with saved_tensors_hooks(pack, unpack) if follows else contextlib.nullcontext():
            output = sample_slices.run(block, function, args, checkpointed)
        self.last = weakref.ref(_hidden(output))
        if len(chain.links) == self.size:
            self.chain = None  # complete: only the backward pass needs it, and holds it
        return output


class Chain:
    """One group in one forward pass."""

    def __init__(self, first: Tensor) -> None:
        self.first = first.detach()
        self.links: list[tuple[nn.Module, Call, tuple[Any, ...], Any, ActingNow]] = []
        device = first.device.type
        self.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        self._inputs: list[Tensor] = []

    def add(self, block: nn.Module, function: Call, args: tuple[Any, ...]) -> int:
        """Note a block, its further arguments, the state of the random generators and who acts; returns its place."""
        kept = ActingNow(switch_of(block))
        self.links.append((block, function, args, sample_slices.random_states(self.first.device), kept))
        return len(self.links) - 1

    def input(self, index: int) -> Tensor:
        """The input of a block, computed again. Those of the blocks behind it are forgotten."""
        if index >= len(self._inputs):
            self._inputs = self._computed()
        del self._inputs[index + 1 :]
        return self._inputs[index]

    def _computed(self) -> list[Tensor]:
        device, dtype, enabled = self.autocast
        devices = [self.first.device] if self.first.is_cuda else []
        inputs = [self.first]
        # As in training, to the last bit; but nothing is kept for a backward pass.
        with (
            torch.enable_grad(),
            saved_tensors_hooks(lambda _: None, _never),
            torch.autocast(device, dtype, enabled),
            torch.random.fork_rng(devices),
        ):
            for block, function, args, states, kept in self.links[:-1]:
                _set_random_states(self.first, states)
                with kept.again():
                    output = sample_slices.run(block, function, (inputs[-1], *args), _call)
                inputs.append(_hidden(output).detach().contiguous())
        return inputs


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


def _call(function: Call, *args: Any) -> Any:
    return function(*args)


def _never(_: Any) -> Tensor:
    raise AssertionError("nothing was kept")


def _set_random_states(x: Tensor, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if x.is_cuda:
        torch.cuda.set_rng_state(states[1], x.device)
