"""Adapters from the directories below one root: loaded when a request names them, and let go when memory is needed."""

from __future__ import annotations

import itertools
import os
import time
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from minipeft.errors import CheckpointError, ConfigError, MinipeftError, OccupiedError, RequestError, hint, shown
from minipeft.files.file_names import CONFIG_FILE, WEIGHTS_FILE
from minipeft.injection.module_tree import wrappers_of
from minipeft.injection.rows import BASE
from minipeft.model import AdaptedModel, load_adapter

Stamp = tuple[tuple[str, int, int], ...]  # name, time and size of each file
MiB = 2**20
PATIENCE = 10.0  # seconds until a refused adapter is tried again: the reason may have gone, as a missing permission


class Resident(NamedTuple):
    """An adapter in the model: its name there, the bytes of its tensors, and the files that it was read from."""

    name: str  # not the directory's, which may not be allowed as one
    size: int
    stamp: Stamp


class Refusal(NamedTuple):
    """Why an adapter cannot be used: no exception, which would keep all that was in memory where it was raised."""

    message: str
    status: int  # of HTTP
    until: float  # seconds of `time.monotonic`


class Adapters:
    """The adapters of a model that one thread loads and lets go.

    Args:
        model: the base; it becomes adapted with the first adapter, and plain again without any.
        root: the directory whose directories are adapters. Nothing else is ever opened.
        limit: bytes that all of them may take together.
    """

    def __init__(self, model: nn.Module, root: Path, limit: int) -> None:
        if not os.path.isdir(root):
            raise ConfigError(f"{root} is not a directory; give the one that holds the adapters' directories.")
        self.model, self.root, self.limit = model, Path(os.path.realpath(root)), limit
        self.resident: OrderedDict[str, Resident] = OrderedDict()  # by directory; the one used last comes last
        self._known: dict[str, tuple[Stamp, int | Refusal]] = {}  # the size of an adapter, or why it cannot be used
        self._numbers = itertools.count()

    def names(self) -> list[str]:
        """The directories of the root that look like adapters.

        Raises:
            RequestError: with status 503 if the root cannot be read.
        """
        try:
            found = [name for name in sorted(os.listdir(self.root)) if self._is_below(name)]
        except OSError as error:
            raise RequestError(f"the adapters cannot be listed ({error.strerror}).", 503) from error
        return [name for name in found if {CONFIG_FILE, WEIGHTS_FILE} & _names_in(self.root / name)]

    def directory(self, name: str) -> Path:
        """The directory of this name, directly below the root.

        Raises:
            RequestError: with status 400 if it is a path, 404 if there is none.
        """
        if not name or name in (".", "..") or {"/", "\\", "\0"} & {*name}:
            raise RequestError(f"model must be the name of an adapter and not a path: {name!r:.100}.")
        if not self._is_below(name):
            known = self.names()
            raise RequestError(f"no model {name!r:.100}{hint(name, known)}; there are: {shown(known)}.", 404)
        return self.root / name

    def acquire(self, name: str, used: Collection[str]) -> str | None:
        """The name in the model of the adapter from this directory, loaded if need be.

        Returns:
            None if it has to wait until some of `used` are not.

        Raises:
            RequestError: the adapter cannot be used.
        """
        directory = self.directory(name)
        stamp = _stamp(directory)
        here = self.resident.get(name)
        if here is not None and here.stamp == stamp:
            self.resident.move_to_end(name)
            return here.name
        if here is not None and here.name in used:
            return None  # replaced on disk, while the old one still answers
        if here is not None:
            self._let_go(name)
        before, known = self._known.get(name, (None, 0))
        if before == stamp and isinstance(known, Refusal) and time.monotonic() < known.until:
            raise RequestError(known.message, known.status)
        if before != stamp or isinstance(known, Refusal):
            known = sum(size for file, _, size in stamp if file.endswith(".safetensors"))
        try:
            return self._load(directory, stamp, used) if self._make_room(name, known, used) else None
        except OccupiedError:  # it excludes one that is here, so it needs the model for itself
            self._known[name] = stamp, self.limit
            return self.acquire(name, used)
        except MinipeftError as error:
            refused = _for_clients(error, self.root)
            self._known[name] = stamp, Refusal(str(refused), refused.status, time.monotonic() + PATIENCE)
            raise refused from error

    def _load(self, directory: Path, stamp: Stamp, used: Collection[str]) -> str | None:
        name, inner = directory.name, f"served_{next(self._numbers)}"
        load_adapter(self.model, directory, inner, local_files_only=True)
        self.resident[name] = Resident(inner, _bytes(self.model, inner), stamp)
        self._known[name] = stamp, self.resident[name].size
        try:
            self._try_out(inner, name)
            fits = self._make_room(name, 0, {*used, inner})  # it may take more than its file does
        except BaseException:
            self._let_go(name)
            raise
        if not fits:
            self._let_go(name)
        return inner if fits else None

    def _make_room(self, name: str, size: int, used: Collection[str]) -> bool:
        """Let go of those that have not been used for longest, until there is room; False if those in use take it.

        Raises:
            RequestError: it is too large by itself.
        """
        own = self.resident[name].size if name in self.resident else size
        if own > self.limit:
            raise RequestError(
                f"{name!r} takes {own / MiB:.1f} MiB, and all adapters may take {self.limit / MiB:.1f} MiB."
            )
        for other in [other for other, resident in self.resident.items() if resident.name not in used]:
            if self._total() + size > self.limit:
                self._let_go(other)
        return self._total() + size <= self.limit

    def _total(self) -> int:
        return sum(resident.size for resident in self.resident.values())

    def _let_go(self, name: str) -> None:
        inner = self.resident.pop(name).name
        model = cast(AdaptedModel, self.model)
        others = [other for other in model.adapter_configs if other != inner]
        if others:
            model.delete_adapter(inner, activate=others[:1])  # which act does not matter: each row names its own
        else:
            model.unload()

    @torch.no_grad()
    def _try_out(self, inner: str, name: str) -> None:
        """Run a row with the adapter next to one without, so that one that cannot work is found before others run with it."""
        model: Any = self.model
        ids = torch.arange(6, device=next(model.parameters()).device).view(2, 3)
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=[inner, BASE])
        if not output.logits[0].isfinite().all():
            raise CheckpointError(f"{name!r} gives values that are not finite.")

    def _is_below(self, name: str) -> bool:
        """Whether it is a directory that no link leads out of the root."""
        place = os.path.realpath(self.root / name) if len(name) < 256 else ""
        return os.path.isdir(place) and os.path.dirname(place) == str(self.root)


def _names_in(directory: Path) -> set[str]:
    """What is in a directory; nothing if it cannot be read, or has just been removed."""
    try:
        return {*os.listdir(directory)}
    except OSError:
        return set()


def _stamp(directory: Path) -> Stamp:
    try:
        found = [(entry.name, entry.stat()) for entry in os.scandir(directory) if entry.is_file()]
    except OSError as error:
        raise RequestError(f"{directory.name!r} cannot be read ({error.strerror}).", 404) from error
    return tuple(sorted((name, state.st_mtime_ns, state.st_size) for name, state in found))


def _bytes(model: nn.Module, adapter_name: str) -> int:
    """Bytes of an adapter's tensors, each counted once."""
    parts = [wrapper.adapters[adapter_name] for _, wrapper in wrappers_of(model, adapter_name)]
    tensors = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def _for_clients(error: MinipeftError, root: Path) -> RequestError:
    """The error for a client, who is not told where the root is."""
    status = error.status if isinstance(error, RequestError) else 400
    return RequestError(str(error).replace(f"{root}{os.sep}", ""), status)
