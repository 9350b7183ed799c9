"""The method contract: what a way of adapting a layer must say, and what it may say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from typing_extensions import Self

from minipeft.config.adapter_config import AdapterConfig
from minipeft.errors import CheckpointError, shown
from minipeft.kernels.functional import is_column_major, low_rank_product
from minipeft.layers.base import LayerOps
from minipeft.methods.swapping import copy_tensors, unlike


class Adapter(nn.Module, ABC):
    """One adapter on one layer. Its parameters live in it and nowhere else; it sees the layer only through `LayerOps`.

    Register a subclass with ``register_method``. It must have:

    * ``__init__(base, ops, config, shared)``, which makes the parameters;
    * ``forward(base, ops, x, y) -> y'``, the adapted output;
    * one of ``merge(W, b) -> (W', b')``, `delta` and `factors`. A method that adds to the weight gives one of the last
      two, and its merge follows;
    * `config_class`, if it has options. ``register_method`` makes one for a method without options.

    All other methods are optional. Overriding one is all it takes: the library looks at which ones a class overrides.

    Args:
        base: the frozen layer. Read it but do not keep it: the adapter must not own a second reference.
        ops: how to read the layer and follow its computation.
        config: the configuration for this module.
        shared: what `share` returned for this injection.
    """

    contract: ClassVar[str] = "Adapter"
    needs_one_of: ClassVar[tuple[str, ...]] = ("merge", "delta", "factors")
    config_class: ClassVar[type[AdapterConfig]]
    runs_base: ClassVar[bool] = False  # `forward` may get y=None, and then computes the layer's output itself
    is_tied: bool = False  # whether it is on layers tied to its own too, see `ties`
    scaling: float | None = None  # the factor of the whole update, if there is one: see `rescale`
    strength: float = 1.0  # what `set_scale` multiplies it by
    rank: int | None = None  # of the update, as the configuration says it
    is_vacant: bool = False  # see `vacate`
    key_prefix: str = ""  # before its keys in a file, for an adapter from `AdapterConfig.companions`

    # Must say:

    @abstractmethod
    def __init__(self, base: nn.Module, ops: LayerOps, config: Any, shared: object | None) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, base: nn.Module, ops: LayerOps, x: Tensor, y: Any) -> Tensor:
        """The adapted output, from the layer's input x and its output y (..., out); must not change y in place."""

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The canonical weight (out, in) and bias (out,) with the adapter folded in, as new tensors.

        Both come in float32 or float64; the caller rounds once to the layer's dtype. By default ``W + delta(W)`` and
        `merge_bias`. It must be differentiable in the adapter's parameters, and so must `delta` and `factors`: code that
        reads the layer's weight instead of calling the layer gets the merged one, in training too.
        """
        update = self.delta(weight)
        if update is None:
            raise NotImplementedError(f"{type(self).__name__} has none of merge, delta and factors")
        return weight + update.to(weight.dtype), self.merge_bias(bias)

    # May say, about adding to the weight. Both make merging cheaper; None if the merge is not such a sum.

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(up, down), shapes (out, r) and (r, in) in float32 or float64, if ``merge(W, b) == (W + up @ down, b)``.

        A permanent merge is then one product added in place.
        """
        return None

    def stacked_factors(self) -> tuple[Tensor, Tensor] | None:
        """(up, down) of the update of the weight alone, shapes (matrices, out, r) and (matrices, r, in).

        As `factors`, but whatever the bias does, and for each of the matrices that the weight is a stack of, such as
        experts. By default `factors` as a stack of one.
        """
        factors = self.factors()
        return None if factors is None else (factors[0].unsqueeze(0), factors[1].unsqueeze(0))

    def call_factors(self) -> tuple[Tensor, Tensor] | None:
        """`factors`, if a call of the layer now adds ``up @ down @ x`` to its output and does nothing else.

        By default in evaluation only, since in training a method may drop out parts. Rows of a batch with different
        adapters then go through two products together.
        """
        return None if self.training or self.overrides("before") else self.factors()

    def delta(self, weight: Tensor) -> Tensor | None:
        """The dense update (out, in) in float32 or float64, if ``merge(W, b)[0] == W + delta(W)``.

        It must not depend on the values of `weight`, only on its shape and memory layout. By default the product of
        `factors`. A merge that is a sum can be undone bit for bit without keeping a copy of W.
        """
        factors = self.factors()
        return None if factors is None else low_rank_product(*factors, column_major=is_column_major(weight))

    def merge_bias(self, bias: Tensor | None) -> Tensor | None:
        """The bias (out,) that goes with ``W + delta(W)``; by default the layer's own. Without `factors` if it is another.

        What it adds must not depend on the bias, so that adapters which add may be merged in any order.

        Raises:
            MergeError: the layer has no bias to change.
        """
        return bias

    # May say, about the layer:

    @classmethod
    def share(cls, sites: Sequence[tuple[nn.Module, LayerOps]], config: AdapterConfig) -> object | None:
        """Make what all adapters of one injection share, from the (layer, ops) of each; by default nothing."""
        return None

    def before(self, base: nn.Module, ops: LayerOps, x: Tensor) -> Tensor:
        """The input that the layer, and every adapter before this one, sees instead of x; by default x itself.

        For a method that changes the input: ``W -> W diag(l)`` is ``before = l * x``. `forward` still gets the original
        x, with the y of the changed one. Such a method cannot have `runs_base`. Module hooks do not see this call.
        """
        return x

    def merge_after(
        self, weight: Tensor, bias: Tensor | None, base_weight: Tensor, base_bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """`merge` into a weight and bias that may hold other adapters already; the last two are the layer's own.

        Override it if what the adapter does depends on the values of the base weight or bias. It is then merged together
        with the other active adapters of its layer, or not at all.
        """
        return self.merge(weight, bias)

    def for_tied(self, base: nn.Module, ops: LayerOps) -> Self:
        """This adapter, with the same parameter objects, for another layer tied to the weight of the first.

        Overriding it says that the method also adapts tied layers, unless `ties` says otherwise.
        """
        raise NotImplementedError(f"{type(self).__name__} does not adapt tied layers")

    @classmethod
    def ties(cls, config: AdapterConfig) -> bool:
        """Whether an adapter with this configuration is put on layers tied to its own too, by `for_tied`."""
        return cls.overrides("for_tied")

    def base_loaded(self, base: nn.Module, ops: LayerOps) -> None:
        """Read again what the adapter keeps of the layer's values: ``load_state_dict`` may have given it others.

        Override it if `__init__` keeps a copy of some of them that is not in the ``state_dict``, for use while another
        adapter is merged into the layer.
        """

    def changed_rows(self) -> tuple[Tensor, Tensor] | None:
        """(indices (n,), change (n, in)) if all it does is to add the change to these rows of W (columns in an embedding).

        With it, `minipeft.lean` can run an adapted output head on a part of the tokens at a time.
        """
        return None

    def weight_factors(self) -> tuple[Tensor, Tensor, float] | None:
        """(A, B, scaling) if all that `forward` does to a layer now is to add ``scaling * B A`` to its weight.

        A and B are differentiable, in the shapes of `LayerOps.factor_shapes`, and not copies as those of `stacked_factors`. With
        them, fused experts form no weight.
        """
        return None

    # May say, about files:

    def file_tensors(self) -> dict[str, Tensor]:
        """What is saved: the key after the module's name in a file -> the live tensor."""
        return dict(self.named_parameters())

    def shared_tensors(self) -> dict[str, Tensor]:
        """What is saved once for all layers, made by `share`: the key after ``base_model.`` in a file -> the live tensor."""
        return {}

    def untouched(self, weight: Tensor, brought: Collection[int] = ()) -> Tensor:
        """The part of the canonical weight that is sampled to recognise the base; not the part that the file brings along.

        Args:
            weight: shape (out, in).
            brought: rows of a table that the file brings besides the adapter's own.
        """
        return weight

    @classmethod
    def file_options(cls, values: Mapping[str, Any], adapters: Mapping[str, Self], compact: bool) -> dict[str, Any]:
        """Options of ``adapter_config.json`` that depend on the adapters, to replace those in `values`.

        Args:
            values: the contents of the file so far.
            adapters: the adapters, by the name of their module.
            compact: whether `compacted` is going to leave something out. A checkpoint, from which training resumes, is
                written whole.
        """
        return {}

    @classmethod
    def compacted(cls, tensors: dict[str, Tensor], values: Mapping[str, Any]) -> dict[str, Tensor]:
        """What is written of the saved tensors (copies, by key), given the contents of ``adapter_config.json``."""
        return tensors

    # May say, about `hotswap_adapter`:

    def check_room(self, rank: int) -> None:
        """Check that there can be `room_for` this rank.

        Raises:
            ConfigError: the adapter has a larger rank, or its rank cannot change.
        """

    def room_for(self, rank: int) -> None:
        """Make room for adapters of up to this rank, and keep no number that would become a constant of a compiled graph.

        By default nothing: only files of the same shapes and numbers can be swapped in.
        """

    def misfit(self, other: Self) -> str:
        """Why `take` cannot take this adapter for the same layer, or "". By default, tensors and numbers must be alike."""
        return unlike(self, other)

    def take(self, other: Self) -> None:
        """Copy another adapter's values into this one's tensors; called without gradients, and only if there is no `misfit`."""
        copy_tensors(self, other)

    def vacate(self, base: nn.Module, ops: LayerOps) -> None:
        """Leave the layer exactly as it is, with the same tensors: the adapter to be swapped in does not adapt it."""
        raise NotImplementedError(f"{type(self).__name__} cannot stay and do nothing")

    # May say, about training:

    @classmethod
    def after_step(cls, adapters: Mapping[str, Self], config: Any, step: int) -> None:
        """What to do after an optimizer step, before the gradients are set to zero.

        Args:
            adapters: all parts of one adapter, by the name of their module.
            config: the configuration of the adapter, for the modules that have none of their own.
            step: number of the optimizer step, from 0.

        Raises:
            StateError: a gradient that is needed is missing.
        """

    @classmethod
    def extra_loss(cls, adapters: Mapping[str, Self], config: Any) -> Tensor | None:
        """A scalar to add to the model's loss, such as a regularisation, or None; arguments as in `after_step`."""
        return None

    def training_state(self) -> dict[str, Tensor]:
        """What resuming a run needs besides the parameters: name, without '/' -> tensor."""
        return {}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `training_state` gave; the tensors then belong to the adapter.

        Raises:
            CheckpointError: the state is not that of such an adapter, which is left as it is.
        """
        if state:
            raise CheckpointError(
                f"{type(self).__name__} has no training state, but the checkpoint has {shown(state, 3)}."
            )

    # For the library:

    def rescale(self, scale: float) -> None:
        """Multiply the whole update by `scale`: that of the configuration times this, whatever it was before.

        A method whose update has one factor keeps it as `scaling`, set in `__init__`, and reads it at every use: in
        `forward`, and in `factors` or `delta`.
        """
        full: float | None = self.__dict__.setdefault("full_scaling", self.scaling)
        assert full is not None
        self.scaling, self.strength = full * scale, scale

    @property
    def is_scalable(self) -> bool:
        """Whether the update is a sum that `scaling` multiplies; a method that multiplies the weight has no such factor."""
        own = type(self)  # asked of the class itself: DoRA takes back what its parent says
        return isinstance(self.scaling, int | float) and (
            own.factors is not Adapter.factors or own.delta is not Adapter.delta
        )

    def adds(self, weight: Tensor) -> bool:
        """Whether the adapter only adds to this canonical weight. One that does more does not commute with other adapters."""
        return self.factors() is not None or self.delta(weight) is not None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep claims and code together: what a parent says about a method is dropped by a class that replaces it."""
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        runs_base = own.get("runs_base", cls.runs_base and "forward" not in own)
        cls.runs_base = runs_base and not cls.overrides("before")
        # They say the same thing in different ways.
        together = ("merge", "delta", "factors", "stacked_factors", "merge_after")
        if "call_factors" not in own and not own.keys().isdisjoint((*together, "forward", "before")):
            cls.call_factors = Adapter.call_factors  # type: ignore[method-assign]
        if not own.keys().isdisjoint(together):
            for name in together:
                setattr(cls, name, own.get(name, vars(Adapter)[name]))
        if not own.keys().isdisjoint((*together, "forward")):
            cls.weight_factors = own.get("weight_factors", Adapter.weight_factors)  # type: ignore[method-assign]

    @classmethod
    def overrides(cls, *names: str) -> bool:
        """Whether this class or one of its parents replaces a method of one of these names."""
        parents, own = cls.__mro__[: cls.__mro__.index(Adapter)], vars(Adapter)
        return any(vars(parent).get(name, own[name]) is not own[name] for parent in parents for name in names)

    @classmethod
    def give_config_class(cls, method: str) -> None:
        """Make the configuration class of a method that has none, since it has no options."""
        if not hasattr(cls, "config_class"):
            # Named so that pickle finds it.
            names = {"method": method, "__module__": cls.__module__, "__qualname__": f"{cls.__qualname__}.config_class"}
            cls.config_class = type(f"{cls.__name__}Config", (AdapterConfig,), names)
