"""Arrays with a shape and no values: a training step runs as it would, and computes nothing.

Within `Hollow` a large array is asked for and never written, so the operating system gives no memory for it. An operation on
such an array gives another one, with the shape that torch's own rules (its "meta" kernels) say. All the Python code of a
model runs, so it keeps, frees and recomputes what it would in training. Token ids, positions and masks are small and have
values, so code that looks at them gets true answers. Code that asks a hollow array gets the answer of random numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from minipeft.kernels.functional import tensors_in
from minipeft.planning.ledger import Ledger

SMALL = 2**20  # elements: a result that is no larger, and comes from values, has values
SAMPLED = 2**24  # elements: random numbers stand in for hollow arrays up to this size
SHARING = {"aten::_unsafe_view", "aten::lift_fresh"}  # views that torch does not call views


class Hollow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the context large arrays are hollow, and the ledger follows all arrays."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = Ledger()
        self._shapes: dict[Any, Any] = {}  # results on the meta device; blocks are alike, so most are known

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: torch would import its compiler and call it around each operation."""
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self._run(function, args, kwargs or {})
        for tensor in tensors_in(result):
            self.ledger.note(tensor)
        return result

    def _run(self, function: Any, args: Any, kwargs: Any) -> Any:
        facts = _facts(function)
        if facts.is_view:
            return function(*args, **kwargs)
        given = tensors_in((args, kwargs))
        if any(tensor.is_meta for tensor in given):
            return function(*args, **kwargs)
        self.ledger.take(given)
        is_hollow = any(self.ledger.is_hollow(tensor) for tensor in given)
        if is_hollow and facts.name in ANSWERS:
            return ANSWERS[facts.name](given[0])
        if facts.writes:
            return self._written(function, args, kwargs) if is_hollow else function(*args, **kwargs)
        if facts.name == "aten::embedding":
            self._check_rows(*args[:2])
        shapes = self._on_meta(function, args, kwargs, given)
        if not is_hollow and all(shape.numel() <= SMALL for shape in tensors_in(shapes)):
            return function(*args, **kwargs)
        selects = shapes is None or any(not shape.is_floating_point() for shape in tensors_in(shapes))
        if selects and sum(tensor.numel() for tensor in given) <= SAMPLED:
            args, kwargs = tree_map_only(Tensor, self._with_values, (args, kwargs))
            return function(*args, **kwargs)
        _advance(function, args, kwargs)
        return tree_map_only(Tensor, self.made, shapes)

    def made(self, shape: Tensor) -> Tensor:
        """A new hollow array, of the shape, layout and dtype of a tensor on the meta device."""
        tensor = torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype)
        self.ledger.note(tensor, hollow=True)
        return tensor

    def _written(self, function: Any, args: Any, kwargs: Any) -> Any:
        """What an operation returns that writes into its arguments, which are hollow from now on."""
        _advance(function, args, kwargs)
        facts = _facts(function)
        targets = [t for where in facts.writes for t in tensors_in(_argument(where, args, kwargs))]
        for target in targets:
            self.ledger.note(target, hollow=True)
        returned = facts.returned
        return None if not returned else targets[0] if returned == 1 else tuple(targets[:returned])

    def _on_meta(self, function: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        """The result of an operation as tensors on the meta device; None if its shape depends on values."""
        key = (function, _key((args, kwargs)))
        if key not in self._shapes:
            args, kwargs = tree_map_only(Tensor, _to_meta, (args, kwargs))
            kwargs = {name: value for name, value in kwargs.items() if name != "generator"}
            if _facts(function).takes_device:
                kwargs["device"] = torch.device("meta")
            try:
                self._shapes[key] = function(*args, **kwargs)
            except Exception:  # kernels say in many ways that they need values
                self._shapes[key] = None
        return self._shapes[key]

    def _check_rows(self, table: Tensor, ids: Tensor) -> None:
        """Raise IndexError as torch would: a table of positions, for example, ends somewhere."""
        if ids.numel() and not self.ledger.is_hollow(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(table):
            raise IndexError(f"its table has {len(table)} rows, and row {int(ids.max())} is asked for")

    def _with_values(self, tensor: Tensor) -> Tensor:
        if not self.ledger.is_hollow(tensor):
            return tensor
        if not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor.dtype)


@dataclass(frozen=True)
class _Facts:
    """What is asked of each operation; torch takes long to answer."""

    name: str
    is_view: bool
    writes: tuple[tuple[int, str], ...]  # place and name of the arguments that it writes to
    returned: int
    draws: bool
    chance: tuple[int, str] | None  # place and name of the argument that says how much a draw drops
    takes_device: bool


@functools.cache
def _facts(function: Any) -> _Facts:
    schema = function._schema
    arguments = [(place, argument.name, argument.alias_info) for place, argument in enumerate(schema.arguments)]
    return _Facts(
        schema.name,
        function.is_view or schema.name in SHARING,
        tuple((place, name) for place, name, alias in arguments if alias is not None and alias.is_write),
        len(schema.returns),
        torch.Tag.nondeterministic_seeded in function.tags,
        next(((place, name) for place, name, _ in arguments if name == "dropout_p"), None),
        any(name == "device" for _, name, _ in arguments),
    )


def _zero(tensor: Tensor) -> bool | int | float | complex:
    return tensor.dtype is torch.bool or torch.zeros((), dtype=tensor.dtype).item()


# What code is told that asks a hollow array for one value: any two are equal, and the size of a difference is 0.
ANSWERS: dict[str, Callable[[Tensor], Any]] = {"aten::equal": lambda tensor: True, "aten::_local_scalar_dense": _zero}


def _key(value: Any) -> Any:
    """What the shape of a result may depend on, to look it up by."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, tuple | list):
        return tuple(map(_key, value))
    return (
        tuple((name, _key(item)) for name, item in value.items()) if isinstance(value, dict) else (type(value), value)
    )


def _to_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _advance(function: Any, args: Any, kwargs: Any) -> None:
    """Change the state of torch's generator if the operation would have drawn from it."""
    facts = _facts(function)
    if (
        facts.draws
        and kwargs.get("generator") is None
        and (facts.chance is None or _argument(facts.chance, args, kwargs))
    ):
        torch.rand(())


def _argument(where: tuple[int, str], args: Any, kwargs: Any) -> Any:
    place, name = where
    return args[place] if place < len(args) else kwargs.get(name)
