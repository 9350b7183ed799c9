"""Which arrays are alive, and what they are for: a log of their making and freeing, from which the peak is read."""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(eq=False)
class Memory:
    """The memory of an array: its bytes, what it is for, whether its values are missing, and whether an operation took it."""

    nbytes: int
    use: str
    hollow: bool = False
    taken: bool = False
    watch: object = None


@dataclass(eq=False)
class Ledger:
    """The memory that was made, and the order in which it was made and freed."""

    use: str = "weights"  # of what is made next
    words: int | None = None  # arrays whose last dimension this is hold logits
    alive: dict[int, Memory] = field(default_factory=dict)  # by the address of the storage
    log: list[tuple[Memory, int]] = field(default_factory=list)  # made: its bytes, freed: minus its bytes

    def note(self, tensor: Tensor, *, hollow: bool = False) -> None:
        """Take in a tensor's memory if it is new; with `hollow`, its values are missing from now on."""
        if tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        address = storage._cdata
        memory = self.alive.get(address)
        if memory is None:
            is_logits = self.words is not None and tensor.dim() > 1 and tensor.shape[-1] == self.words
            memory = self.alive[address] = Memory(storage.nbytes(), "logits" if is_logits else self.use)
            self.log.append((memory, memory.nbytes))
            memory.watch = weakref.ref(storage, functools.partial(self._freed, address))
        memory.hollow |= hollow

    def _freed(self, address: int, _: object) -> None:
        memory = self.alive.pop(address)
        self.log.append((memory, -memory.nbytes))

    def is_hollow(self, tensor: Tensor) -> bool:
        """Whether a tensor has no values."""
        memory = self.alive.get(tensor.untyped_storage()._cdata)
        return memory is not None and memory.hollow

    def take(self, tensors: Iterable[Tensor]) -> None:
        """Remember that an operation takes these tensors."""
        for tensor in tensors:
            memory = self.alive.get(tensor.untyped_storage()._cdata)
            if memory is not None:
                memory.taken = True

    def name(self, tensors: Iterable[Tensor | None], use: str) -> None:
        """Say what tensors are for."""
        for tensor in tensors:
            if tensor is not None:
                self.note(tensor)
                self.alive[tensor.untyped_storage()._cdata].use = use

    def peak(self, since: int) -> Counter[str]:
        """Bytes by use when they were most, from this place of the log on."""
        most, total, end = -1, 0, 0
        for place, (_, change) in enumerate(self.log, 1):
            total += change
            if place > since and total > most:
                most, end = total, place
        at_peak: Counter[str] = Counter()
        for memory, change in self.log[:end]:
            at_peak[memory.use] += change
        return at_peak
