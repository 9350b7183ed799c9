"""The method contract: what a way of adapting a layer must tell the rest of the library."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from typing_extensions import Self

from minipeft.config import AdapterConfig
from minipeft.errors import CheckpointError, shown
from minipeft.kernels.functional import is_column_major, low_rank_product
from minipeft.layers.base import LayerOps

# What a class says of one of its methods does not hold for another one, written in a subclass: (method, what is said).
SAYS = (
    ("forward", "runs_base"),
    ("before", "runs_base"),
    ("merge", "delta"),
    ("merge", "factors"),
    ("delta", "factors"),
)


class Adapter(nn.Module, ABC):
    """One adapter on one layer. Its parameters live in it and nowhere else; it sees the layer only through `LayerOps`.

    Register a subclass with ``register_method``. It is called as a module, so that hooks (FSDP's, for one) fire.

    Args:
        base: the frozen layer. Read it, never keep it: the adapter must not own a second reference.
        ops: how to read and follow that layer.
        config: the configuration that holds for this module.
        shared: what `share` returned for this injection.
    """

    contract: ClassVar[str] = "Adapter"
    reads_base: ClassVar[bool] = False  # what `forward` does depends on the values of the base weight, not on y alone
    runs_base: ClassVar[bool] = False  # `forward` may get y=None, and then computes the base's output itself
    acts_before: ClassVar[bool] = False  # whether `before` does anything; found out, not said
    adapts_tied_layers: ClassVar[bool] = (
        False  # other layers that hold the very weight are adapted along, by `for_tied`
    )
    config_class: ClassVar[type[AdapterConfig]]
    # What stands before its keys in a file, where it comes along with another method (see `AdapterConfig.companions`).
    key_prefix: str = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.acts_before = cls.before is not Adapter.before
        for method, said in SAYS:
            if method in vars(cls) and said not in vars(cls):
                setattr(cls, said, getattr(Adapter, said))

    @classmethod
    def share(cls, sites: Sequence[tuple[nn.Module, LayerOps]], config: AdapterConfig) -> object | None:
        """Make what all adapters of one injection have in common, from the (layer, ops) of each; by default nothing."""
        return None

    @abstractmethod
    def __init__(self, base: nn.Module, ops: LayerOps, config: Any, shared: object | None) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, base: nn.Module, ops: LayerOps, x: Tensor, y: Any) -> Tensor:
        """The adapted output, from the layer's input x and output y (..., out), a tensor; never in place on y."""

    def before(self, base: nn.Module, ops: LayerOps, x: Tensor) -> Tensor:
        """What the layer, and every adapter in front of this one, sees of the input x; by default x itself.

        For a method that changes the input instead of the output, so that adapters compose as their merges do:
        ``W -> W diag(l)`` is ``before = l * x``. `forward` then gets the y that came of it, beside the x that came in.
        Module hooks do not see this call, unlike that of the adapter.
        """
        return x

    @abstractmethod
    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The canonical weight (out, in) and bias (out,) with the adapter folded in, as new tensors.

        Both come in the dtype to compute in, float32 or float64; the caller rounds once to the layer's own.
        """

    def merge_after(self, weight: Tensor, bias: Tensor | None, base_weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """`merge` where other adapters may be folded into `weight` already, and `base_weight` is the layer's own.

        To be overridden where `reads_base` is True.
        """
        return self.merge(weight, bias)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(up, down), shapes (out, r) and (r, in), where ``merge(W, b) == (W + up @ down, b)``, else None.

        In float32 or float64. Optional, as is `delta`: both only make merging cheaper, and what a parent says of its
        `merge` is forgotten where a subclass overrides that.

        With the factors a merge for good is one product added in place, proved finite beforehand from their values.
        """
        return None

    def delta(self, weight: Tensor) -> Tensor | None:
        """The dense update (out, in) in float32 or float64 where ``merge(W, b)[0] == W + delta(W)``, else None.

        It does not depend on the values of `weight`, which only shows how the result had best lie in memory. By default
        the product of `factors`, if any.

        A merge that is a plain sum can be undone bit for bit without keeping a copy of W.
        """
        factors = self.factors()
        return None if factors is None else low_rank_product(*factors, column_major=is_column_major(weight))

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """What training moves; by default every parameter. Others must be created without ``requires_grad``."""
        return self.parameters()

    def changed_rows(self) -> tuple[Tensor, Tensor] | None:
        """(indices (n,), change (n, in)) where all the adapter does is to add the change to these rows of W, else None.

        Optional: an output head that is adapted so, `minipeft.lean` can still run a part of the tokens at a time.
        """
        return None

    def for_tied(self, base: nn.Module, ops: LayerOps) -> Self:
        """The same adapter, its parameters the same objects, for another layer that holds the very same weight.

        To be overridden where `adapts_tied_layers` is True.
        """
        raise NotImplementedError(f"{type(self).__name__} does not follow ties")

    def untouched(self, weight: Tensor) -> Tensor:
        """The part of a layer's canonical weight by which a file knows its base again: by default all of it.

        To be overridden by a method whose files bring some of the weight along.
        """
        return weight

    def changes_nothing(self) -> bool:
        """Whether the adapter, as it stands, leaves its layer's output as it is; False where that is not easily told."""
        return False

    def snapshot(self) -> Self:
        """A frozen copy, which later changes to this adapter leave alone; what never changes may be shared."""
        return copy.deepcopy(self).requires_grad_(False)

    # ----------------------------------------------------------------------------------------------------- training
    @classmethod
    def after_step(cls, adapters: Mapping[str, Self], config: Any, step: int) -> None:
        """What is due after optimizer step number `step`, before the gradients are set to zero; by default nothing.

        Args:
            adapters: all of one adapter's parts, by the name of the module they are on.
            config: the configuration of the adapter, for the modules that have none of their own.
            step: counted by the caller, the first is 0.

        Raises:
            StateError: a gradient that is needed is not there.
        """

    @classmethod
    def extra_loss(cls, adapters: Mapping[str, Self], config: Any) -> Tensor | None:
        """A scalar to add to the model's loss, such as a regularisation, or None; arguments are those of `after_step`."""
        return None

    def training_state(self) -> dict[str, Tensor]:
        """What a run has to know of this adapter to go on, beside its parameters: name, without '/' -> tensor."""
        return {}

    def check_training_state(self, state: Mapping[str, Tensor]) -> None:
        """See whether `load_training_state` can take this, and change nothing; goes with `training_state`.

        Raises:
            CheckpointError: `training_state` gives no such thing of such an adapter.
        """
        if state:
            raise CheckpointError(f"{type(self).__name__} keeps no training state, and {shown(state, 3)} came.")

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `training_state` gave, in place of what there is; the tensors are the adapter's to keep."""

    # -------------------------------------------------------------------------------------------------------- files
    def file_tensors(self) -> dict[str, Tensor]:
        """What is saved: the key after the module's name in a file -> the live tensor."""
        return dict(self.named_parameters())

    def shared_tensors(self) -> dict[str, Tensor]:
        """What is saved once for all layers, `share`'s: the key after ``base_model.`` in a file -> the live tensor."""
        return {}

    @classmethod
    def file_options(cls, values: Mapping[str, Any], adapters: Mapping[str, Self]) -> dict[str, Any]:
        """Options in ``adapter_config.json`` that depend on what came of the adapters; `values` is what it holds else."""
        return {}

    @classmethod
    def compact_options(cls, values: Mapping[str, Any], adapters: Mapping[str, Self]) -> dict[str, Any]:
        """Options that say what `compacted` leaves out; a run's checkpoints, from which training goes on, leave nothing out."""
        return {}

    @classmethod
    def compacted(cls, tensors: dict[str, Tensor], values: Mapping[str, Any]) -> dict[str, Tensor]:
        """What is written of copies of the saved tensors, by key, given the contents of ``adapter_config.json``."""
        return tensors
